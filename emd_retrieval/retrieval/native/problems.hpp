// Transportation problems of queries against stored sets: what problems.cpp computes, compiled once
// for each instruction set, and what module.cpp hands it.
#pragma once

#include <cstdint>

namespace shortlist {

enum class Codec { float32, float16, int8 };

// Encoded sets of one shape. A node is its codes; int8 ones have a scale, before them or apart.
struct Format {
  Codec codec;
  int64_t nodes, channels;
  int64_t node_bytes;  // from one node to the next,
  int64_t codes_at;    // and where in a node its codes start
};

// Where the sets are: in memory, [count, nodes] nodes one after another, or each somewhere in a file.
struct Sets {
  Format format;
  const uint8_t* bytes;
  const float* scales;    // [count, nodes], where they lie apart; else null
  const int64_t* counts;  // [count], the nodes before the padding; null where all are real
  const int64_t* files;   // [count], descriptors; null for sets in memory
  const int64_t* offsets; // [count], in the files
  // Fills a buffer from a file; false if that is not possible.
  bool (*read)(int64_t file, int64_t offset, uint8_t* to, int64_t bytes);
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

constexpr int64_t kMostLanes = 16, kLine = 16;  // floats in the largest register, and in a cache line

// What a thread needs of its own, in floats: a query, a stored set before and after decoding, their
// products and norms.
inline int64_t workspace_floats(const Task& task) {
  const Format& format = task.sets.format;
  const int64_t stride = task.query_nodes + 1 + kMostLanes, nodes = format.nodes;
  const int64_t encoded = task.sets.files ? (nodes * format.node_bytes + 3) / 4 + kLine : 0;
  return stride * (format.channels + nodes + 1) + nodes * (format.channels + 1) + encoded;
}

struct Kernel {
  const char* instruction_set;
  // Writes pairs of the task's [queries, candidates] up to end - 1; false if a set cannot be read. Which
  // ones is taken from a counter that several threads may share.
  bool (*write)(const Task& task, int64_t* next, int64_t end, float* workspace);
};

#ifdef EMD_X86_KERNELS
extern const Kernel kernel_v2, kernel_v3, kernel_v4;
#else
extern const Kernel kernel_portable;
#endif

}  // namespace shortlist
