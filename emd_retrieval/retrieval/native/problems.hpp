// Transportation problems of queries against stored sets: what problems.cpp computes, compiled once
// for each instruction set, and what module.cpp hands it.
#pragma once

#include <cstdint>

namespace shortlist {

enum class Codec { float32, float16, int8 };

// Stored sets as they lie in memory, [count, nodes, channels]; padding nodes are zero.
struct Sets {
  const void* codes;
  Codec codec;
  const float* scales;    // [count, nodes], for int8; else null
  const int64_t* counts;  // [count], the nodes before the padding; null where all are real
  int64_t nodes, channels;
};

struct Settings {
  bool uniform;         // equal weights instead of cross-reference ones
  float floor;          // added to every cross-reference weight
  bool relative_floor;  // in units of both sets' root-mean-square node norms
  float absent_cost;    // every cost of a candidate that is not there
};

// Queries, their candidates as rows of the sets (-1: none), and where the problems go. The stored set
// is the supplier, so that a problem is written in the order in which it is computed.
struct Task {
  Sets sets;
  Settings settings;
  const float* queries;  // [queries, query_nodes, channels]
  const int64_t* rows;   // [queries, candidates]
  const float* shifts;   // [queries, candidates], added to a candidate's costs; or null
  int64_t query_nodes, candidates;
  float* cost;            // [queries, candidates, nodes, query_nodes]
  float* stored_weights;  // [queries, candidates, nodes]
  float* query_weights;   // [queries, candidates, query_nodes]
};

constexpr int64_t kMostLanes = 16;

// What a thread needs of its own, in floats: a query, a stored set, their products and norms.
inline int64_t workspace_floats(const Task& task) {
  const int64_t stride = task.query_nodes + 1 + kMostLanes, nodes = task.sets.nodes;
  return stride * (task.sets.channels + nodes + 1) + nodes * (task.sets.channels + 1);
}

struct Kernel {
  const char* instruction_set;
  // Writes the pairs from..to - 1 of the task's [queries, candidates].
  void (*write)(const Task& task, int64_t from, int64_t to, float* workspace);
};

#ifdef EMD_X86_KERNELS
extern const Kernel kernel_v2, kernel_v3, kernel_v4;
#else
extern const Kernel kernel_portable;
#endif

}  // namespace shortlist
