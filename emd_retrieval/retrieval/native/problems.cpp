// Decoding, ground costs (Equation 2) and node weights (Equation 11) of one pair after another. The one
// product of raw nodes gives all three: cosines are it over the norms, weights are its means.
//
// No templates or inline functions of the standard library: the linker keeps one copy of each, perhaps
// that of an instruction set which the CPU lacks.
#include "problems.hpp"

#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define EMD_JOIN(a, b) a##b
#define EMD_NAME(a, b) EMD_JOIN(a, b)
#define EMD_QUOTE(a) #a
#define EMD_TEXT(a) EMD_QUOTE(a)

namespace shortlist {

namespace {

constexpr int64_t kLanes = EMD_LANES;
typedef float Floats __attribute__((vector_size(4 * EMD_LANES)));

constexpr int64_t kRows = 6;      // stored nodes of a block,
constexpr int64_t kTurn = 8;  // pairs between two looks at the shared counter
constexpr int64_t kVectors = 2;   // and vectors of query nodes: twelve sums fit into 16 registers
constexpr float kLeastNorm = 1e-12f;      // as torch.nn.functional.normalize
constexpr float kLeastWeight = 1.17549435e-38f * 1e6f;  // as matching.normalize_weights

inline Floats load(const float* from) {
  Floats vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void store(float* to, Floats vector) { memcpy(to, &vector, sizeof vector); }

void decode_half(const uint8_t* codes, float* to, int64_t count) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(  // the plain one warns under GCC 12
                                 0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 2 * i))));
#endif
#ifdef __F16C__
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 2 * i))));
#endif
  for (; i < count; i++) {
    uint16_t code;
    memcpy(&code, codes + 2 * i, sizeof code);
    // The exponent's bias is mended by a product, which also makes subnormal halves normal.
    const uint32_t magnitude = uint32_t(code & 0x7fff) << 13, sign = uint32_t(code & 0x8000) << 16;
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    memcpy(to + i, &bits, sizeof bits);
  }
}

// A set's nodes; scales are null where each lies before its node's codes.
void decode(const Format& format, const uint8_t* from, const float* scales, float* to) {
  const int64_t channels = format.channels;
  for (int64_t node = 0; node < format.nodes; node++, from += format.node_bytes, to += channels) {
    const uint8_t* const codes = from + format.codes_at;
    switch (format.codec) {
      case Codec::float32: memcpy(to, codes, channels * sizeof *to); break;
      case Codec::float16: decode_half(codes, to, channels); break;
      case Codec::int8: {
        float scale;
        memcpy(&scale, scales ? reinterpret_cast<const uint8_t*>(scales + node) : from, sizeof scale);
        for (int64_t d = 0; d < channels; d++) to[d] = int8_t(codes[d]) * scale;
      }
    }
  }
}

float square_of(const float* node, int64_t channels) {
  float sum = 0;
  for (int64_t d = 0; d < channels; d++) sum += node[d] * node[d];
  return sum;
}

inline float larger(float a, float b) { return a > b ? a : b; }

void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; i++) to[i] = value;
}

// A query, transposed: channel by channel a row of its nodes, then their mean, then zeros.
struct Query {
  int64_t stride;
  float* nodes;     // [channels, stride]
  float* inverses;  // [stride], one over each node's norm
  float scale;      // root mean square of the norms

  void take(const float* from, int64_t count, int64_t channels) {
    fill(nodes, channels * stride, 0);
    fill(inverses, stride, 0);
    double squares = 0;
    for (int64_t i = 0; i < count; i++) {
      const float* const node = from + i * channels;
      for (int64_t d = 0; d < channels; d++) {
        nodes[d * stride + i] = node[d];
        nodes[d * stride + count] += node[d] / float(count);
      }
      const float square = square_of(node, channels);
      inverses[i] = 1 / larger(__builtin_sqrtf(square), kLeastNorm);
      squares += square;
    }
    scale = float(__builtin_sqrt(squares / count));
  }
};

// products[j, i] = <stored node j, query node i> for rows stored nodes and vectors x kLanes query nodes.
template <int64_t rows, int64_t vectors>
void multiply(const float* stored, const Query& query, int64_t column, int64_t channels, float* products) {
  Floats sums[rows][vectors] = {};
  const float* from = query.nodes + column;
  for (int64_t d = 0; d < channels; d++, from += query.stride) {
    Floats nodes[vectors];
    for (int64_t v = 0; v < vectors; v++) nodes[v] = load(from + v * kLanes);
    for (int64_t j = 0; j < rows; j++)
      for (int64_t v = 0; v < vectors; v++) sums[j][v] += stored[j * channels + d] * nodes[v];
  }
  for (int64_t j = 0; j < rows; j++)
    for (int64_t v = 0; v < vectors; v++)
      store(products + j * query.stride + column + v * kLanes, sums[j][v]);
}

template <int64_t rows>
void multiply_rows(const float* stored, const Query& query, int64_t channels, float* products) {
  int64_t column = 0;
  for (; column + kVectors * kLanes <= query.stride; column += kVectors * kLanes)
    multiply<rows, kVectors>(stored, query, column, channels, products);
  if (column < query.stride) multiply<rows, 1>(stored, query, column, channels, products);
}

void multiply_all(const float* stored, int64_t count, const Query& query, int64_t channels, float* products) {
  using Block = void (*)(const float*, const Query&, int64_t, float*);
  static constexpr Block kBlocks[] = {nullptr,          multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                      multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};
  // Blocks of nearly equal height: a last block of one row would wait for its own sums.
  const int64_t blocks = (count + kRows - 1) / kRows;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t from = count * b / blocks, to = count * (b + 1) / blocks;
    kBlocks[to - from](stored + from * channels, query, channels, products + from * query.stride);
  }
}

// Weights from relevance scores: relu, the floor, and a total of one.
void normalize(float* weights, int64_t count, float floor) {
  double total = 0;
  for (int64_t i = 0; i < count; i++) {
    weights[i] = larger(larger(weights[i], 0) + floor, kLeastWeight);
    total += weights[i];
  }
  const float factor = float(1 / total);
  for (int64_t i = 0; i < count; i++) weights[i] *= factor;
}

class Writer {
 public:
  Writer(const Task& task, float* workspace)
      : task_{task}, nodes_{task.sets.format.nodes}, channels_{task.sets.format.channels} {
    const auto take = [&workspace](int64_t count) { return (workspace += count) - count; };
    query_.stride = (task.query_nodes + 1 + kLanes - 1) / kLanes * kLanes;
    query_.nodes = take(task.sets.format.channels * query_.stride);
    query_.inverses = take(query_.stride);
    products_ = take(task.sets.format.nodes * query_.stride);
    stored_ = take(task.sets.format.nodes * task.sets.format.channels);
    inverses_ = take(task.sets.format.nodes);
    // The system copies to the start of a cache line in less time.
    const int64_t beyond = reinterpret_cast<uintptr_t>(workspace) / sizeof(float) % kLine;
    encoded_ = reinterpret_cast<uint8_t*>(workspace + (kLine - beyond) % kLine);
  }

  void take_query(int64_t number) {
    query_.take(task_.queries + number * task_.query_nodes * channels_, task_.query_nodes,
                channels_);
  }

  bool write(int64_t pair) {
    const int64_t nodes = nodes_, query_nodes = task_.query_nodes, row = task_.rows[pair];
    float* const cost = task_.cost + pair * nodes * query_nodes;
    float* const stored_weights = task_.stored_weights + pair * nodes;
    float* const query_weights = task_.query_weights + pair * query_nodes;
    if (row < 0) {
      fill(cost, nodes * query_nodes, task_.settings.absent_cost);
      fill(stored_weights, nodes, 1 / float(nodes));
      fill(query_weights, query_nodes, 1 / float(query_nodes));
      return true;
    }
    const int64_t count = task_.sets.counts ? task_.sets.counts[row] : nodes;
    if (!take_set(row)) return false;
    multiply_all(stored_, count, query_, channels_, products_);
    const double squares = measure(count);
    write_costs(cost, count, task_.shifts ? 1 + task_.shifts[pair] : 1);
    if (task_.settings.uniform) {
      fill(stored_weights, count, 1 / float(count));
      fill(query_weights, query_nodes, 1 / float(query_nodes));
    } else {
      write_weights(stored_weights, query_weights, count, float(__builtin_sqrt(squares / count)));
    }
    fill(stored_weights + count, nodes - count, 0);
    return true;
  }

 private:
  bool take_set(int64_t row) {
    const Sets& sets = task_.sets;
    const int64_t bytes = nodes_ * sets.format.node_bytes;
    const uint8_t* encoded = encoded_;
    if (!sets.files)
      encoded = sets.bytes + row * bytes;
    else if (!sets.read(sets.files[row], sets.offsets[row], encoded_, bytes))
      return false;
    decode(sets.format, encoded, sets.scales ? sets.scales + row * nodes_ : nullptr, stored_);
    return true;
  }

  double measure(int64_t count) {
    double squares = 0;
    for (int64_t j = 0; j < count; j++) {
      const float square = square_of(stored_ + j * channels_, channels_);
      inverses_[j] = 1 / larger(__builtin_sqrtf(square), kLeastNorm);
      squares += square;
    }
    return squares;
  }

  void write_costs(float* cost, int64_t count, float one) const {
    const int64_t query_nodes = task_.query_nodes, all = nodes_ * query_nodes;
    for (int64_t j = 0; j < count; j++) {
      const float* const products = products_ + j * query_.stride;
      const int64_t start = j * query_nodes;
      if (start + query_.stride <= all) {
        // Whole vectors: what goes over the row's end is written again by the rows behind it.
        for (int64_t i = 0; i < query_nodes; i += kLanes)
          store(cost + start + i, one - load(products + i) * load(query_.inverses + i) * inverses_[j]);
      } else {
        for (int64_t i = 0; i < query_nodes; i++)
          cost[start + i] = one - products[i] * query_.inverses[i] * inverses_[j];
      }
    }
    fill(cost + count * query_nodes, all - count * query_nodes, one);
  }

  void write_weights(float* stored_weights, float* query_weights, int64_t count, float scale) const {
    const int64_t query_nodes = task_.query_nodes;
    for (int64_t j = 0; j < count; j++) stored_weights[j] = products_[j * query_.stride + query_nodes];
    for (int64_t i = 0; i < query_nodes; i += kLanes) {
      Floats sum{};
      for (int64_t j = 0; j < count; j++) sum += load(products_ + j * query_.stride + i);
      store(products_ + i, sum / float(count));
    }
    memcpy(query_weights, products_, query_nodes * sizeof *query_weights);
    const float floor = task_.settings.floor * (task_.settings.relative_floor ? query_.scale * scale : 1);
    normalize(query_weights, query_nodes, floor);
    normalize(stored_weights, count, floor);
  }

  const Task& task_;
  const int64_t nodes_, channels_;
  Query query_{};
  float* products_;  // [nodes, query stride]
  float* stored_;    // [nodes, channels]
  float* inverses_;  // [nodes], one over each norm
  uint8_t* encoded_;  // a set as its file has it
};

bool write(const Task& task, int64_t* next, int64_t end, float* workspace) {
  Writer writer(task, workspace);
  int64_t query = -1;
  for (;;) {
    const int64_t from = __atomic_fetch_add(next, kTurn, __ATOMIC_RELAXED);
    if (from >= end) return true;
    for (int64_t pair = from; pair < end && pair < from + kTurn; pair++) {
      if (pair / task.candidates != query) {
        query = pair / task.candidates;
        writer.take_query(query);
      }
      if (!writer.write(pair)) return false;
    }
  }
}

}  // namespace

extern const Kernel EMD_NAME(kernel_, EMD_KERNEL);
const Kernel EMD_NAME(kernel_, EMD_KERNEL){EMD_TEXT(EMD_KERNEL), write};

}  // namespace shortlist
