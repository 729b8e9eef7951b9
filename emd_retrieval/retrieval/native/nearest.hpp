// From stored sets to the nearest candidates of each query: problems are written (problems.cpp) and
// handed to the exact solver (transport/native) a query at a time, so that they stay in the cache.
#pragma once

#include <cstdint>

#include "batch.hpp"
#include "problems.hpp"

namespace shortlist {

// Where the answers go, and how many: as emd::TopK.
struct Nearest {
  int64_t k;
  float* distance;  // [queries, k]
  int64_t* index;   // [queries, k]
  int64_t* solved;  // [queries]
};

struct Means {
  const Kernel& writer;
  const emd::Kernel& solver;
  int64_t most_pivots;
  int threads;
};

// False if a set cannot be read, or a problem has a fault; the task's places for problems are not used.
bool find_nearest(const Task& task, int64_t queries, const Nearest& nearest, const Means& means);

// Writes all of the task's problems; false if a set cannot be read.
bool write_all(const Task& task, int64_t queries, const Kernel& writer, int threads);

}  // namespace shortlist
