// Fuzzes the native core behind emd_retrieval.retrieval: problems written from encoded sets, in memory and in a
// file, and rows read from a file. Every buffer has the size that it must have, so the address sanitizer sees each
// step beyond; costs and weights of moderate features are held against plain loops in double, and sets in a file
// must give what the same sets in memory do.
#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "files.hpp"
#include "input.hpp"
#include "problems.hpp"

namespace {

using namespace shortlist;

std::vector<const Kernel*> kernels() {
#ifdef EMD_X86_KERNELS
  std::vector<const Kernel*> found{&kernel_v2};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    found.push_back(&kernel_v3);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&kernel_v4);
  return found;
#else
  return {&kernel_portable};
#endif
}

// A file without a name; what was in it before is gone.
int scratch_file(const std::vector<uint8_t>& bytes) {
  static FILE* const file = tmpfile();
  REQUIRE(file, "no temporary file");
  const int number = fileno(file);
  REQUIRE(ftruncate(number, 0) == 0 && pwrite(number, bytes.data(), bytes.size(), 0) == ssize_t(bytes.size()),
          "the temporary file cannot be written");
  return number;
}

double half_to_double(uint16_t code) {
  const int exponent = code >> 10 & 31, fraction = code & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return code >> 15 ? -size : size;
}

// Encoded sets, and the numbers that they stand for.
struct Stored {
  Codec codec;
  int64_t count, nodes, channels;
  bool scales_apart;
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<int64_t> counts;
  std::vector<double> values;

  int64_t code_bytes() const { return codec == Codec::float32 ? 4 : codec == Codec::float16 ? 2 : 1; }
  int64_t codes_at() const { return codec == Codec::int8 && !scales_apart ? 4 : 0; }
  int64_t node_bytes() const { return codes_at() + channels * code_bytes(); }
};

float moderate(Input& input) { return input.below(8) == 0 ? 0.f : float(std::ldexp(input.share() - 0.4, 3)); }

Stored make_sets(Input& input, bool tame) {
  Stored sets;
  sets.codec = Codec(input.below(3));
  sets.count = input.between(1, 4);
  sets.nodes = input.between(1, input.flip() ? 8 : 40);
  sets.channels = input.between(1, input.flip() ? 8 : 70);
  sets.scales_apart = sets.codec == Codec::int8 && input.flip();
  for (int64_t node = 0; node < sets.count * sets.nodes; node++) {
    float scale = 1;
    if (sets.codec == Codec::int8) scale = tame ? float(input.share()) : input.any_real<float>();
    const auto append = [&sets](const auto& code) {
      const auto* const from = reinterpret_cast<const uint8_t*>(&code);
      sets.bytes.insert(sets.bytes.end(), from, from + sizeof code);
    };
    if (sets.scales_apart)
      sets.scales.push_back(scale);
    else if (sets.codec == Codec::int8)
      append(scale);
    for (int64_t d = 0; d < sets.channels; d++) switch (sets.codec) {
        case Codec::float32: {
          const float code = tame ? moderate(input) : input.any_real<float>();
          append(code);
          sets.values.push_back(code);
          break;
        }
        case Codec::float16: {
          auto code = uint16_t(input.bits(2));
          if (tame) code = uint16_t(code & 0x83ff) | uint16_t(input.between(0, 18) << 10);
          append(code);
          sets.values.push_back(half_to_double(code));
          break;
        }
        case Codec::int8: {
          const auto code = int8_t(input.bits(1));
          append(code);
          sets.values.push_back(double(code) * double(scale));
        }
      }
  }
  if (input.flip())
    for (int64_t set = 0; set < sets.count; set++) sets.counts.push_back(input.between(1, sets.nodes));
  return sets;
}

struct Written {
  std::vector<float> cost, stored_weights, query_weights;
  bool whole;

  bool operator==(const Written& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return whole == other.whole && same(cost, other.cost) && same(stored_weights, other.stored_weights) &&
           same(query_weights, other.query_weights);
  }
};

Written write(const Kernel& kernel, Task task, int64_t pairs, int64_t split) {
  const int64_t nodes = task.sets.format.nodes;
  Written to{std::vector<float>(pairs * nodes * task.query_nodes), std::vector<float>(pairs * nodes),
             std::vector<float>(pairs * task.query_nodes), true};
  task.cost = to.cost.data();
  task.stored_weights = to.stored_weights.data();
  task.query_weights = to.query_weights.data();
  // Two threads would each take a part.
  for (const auto& [from, end] : {std::pair{int64_t{0}, split}, std::pair{split, pairs}}) {
    const int64_t floats = workspace_floats(task);
    auto* const memory = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{64}));
    int64_t next = from;
    to.whole &= kernel.write(task, &next, end, memory);
    ::operator delete(memory, std::align_val_t{64});
  }
  return to;
}

void check_pair(const Task& task, const Stored& sets, const Written& got, int64_t pair) {
  const int64_t n = sets.nodes, q = task.query_nodes, channels = sets.channels, row = task.rows[pair];
  const float* const cost = &got.cost[pair * n * q];
  const float* const stored_weights = &got.stored_weights[pair * n];
  const float* const query_weights = &got.query_weights[pair * q];
  const float shift = task.shifts ? task.shifts[pair] : 0;
  const auto near = [](double a, double b, double slack) { return std::fabs(a - b) <= slack * (1 + std::fabs(b)); };
  if (row < 0) {
    for (int64_t at = 0; at < n * q; at++) REQUIRE(cost[at] == task.settings.absent_cost, "absent: %g", cost[at]);
    return;
  }
  const int64_t count = sets.counts.empty() ? n : sets.counts[row];
  const double* const stored = &sets.values[row * n * channels];
  const float* const query = task.queries + pair / task.candidates * q * channels;
  const auto dot = [channels](const auto* a, const auto* b) {
    double sum = 0;
    for (int64_t d = 0; d < channels; d++) sum += double(a[d]) * double(b[d]);
    return sum;
  };
  std::vector<double> stored_relevance(count), query_relevance(q);
  double stored_squares = 0, query_squares = 0;
  for (int64_t j = 0; j < count; j++) {
    stored_squares += dot(stored + j * channels, stored + j * channels) / double(count);
    for (int64_t i = 0; i < q; i++) {
      const double product = dot(stored + j * channels, query + i * channels);
      const double norms = std::sqrt(dot(stored + j * channels, stored + j * channels)) *
                           std::sqrt(dot(query + i * channels, query + i * channels));
      const double cosine = norms > 0 ? product / norms : 0;
      REQUIRE(near(cost[j * q + i], 1 + shift - cosine, 1e-5), "cost [%d, %d] = %g, not %g", int(j), int(i),
              cost[j * q + i], 1 + shift - cosine);
      stored_relevance[j] += product / double(q);
      query_relevance[i] += product / double(count);
    }
  }
  for (int64_t i = 0; i < q; i++) query_squares += dot(query + i * channels, query + i * channels) / double(q);
  double floor = task.settings.floor;
  if (task.settings.relative_floor) floor *= std::sqrt(stored_squares) * std::sqrt(query_squares);
  // Relevance is a sum of products that may cancel: its rounding is that of the products.
  const double rounding = 1e-4 * std::sqrt(stored_squares) * std::sqrt(query_squares);
  const auto check_side = [&](const float* weights, std::vector<double> relevance, const char* side) {
    double total = 0, told = 0;
    const size_t nodes = relevance.size();
    for (double& weight : relevance) total += weight = std::max(weight, 0.0) + floor;
    for (size_t i = 0; i < nodes; i++) {
      told += weights[i];
      REQUIRE(weights[i] >= 0 && weights[i] <= 1.0001, "%s weight %g", side, weights[i]);
      if (task.settings.uniform)
        REQUIRE(near(weights[i], 1 / double(nodes), 1e-6), "%s weight %g", side, weights[i]);
      else if (total > 1e-20)
        REQUIRE(std::fabs(weights[i] - relevance[i] / total) <= 1e-5 + double(nodes) * rounding / total,
                "%s weight %g, not %g", side, weights[i], relevance[i] / total);
    }
    REQUIRE(near(told, 1, 1e-5), "%s weights sum to %g", side, told);
  };
  check_side(stored_weights, stored_relevance, "stored");
  check_side(query_weights, query_relevance, "query");
  for (int64_t j = count; j < n; j++) REQUIRE(stored_weights[j] == 0, "padding weighs %g", stored_weights[j]);
}

bool read_set(int64_t file, int64_t offset, uint8_t* to, int64_t bytes) {
  int error;
  return read_at(file, offset, to, bytes, error);
}

void fuzz_problems(Input& input) {
  const bool tame = input.flip();
  const Stored sets = make_sets(input, tame);
  const int64_t queries = input.between(1, 3), candidates = input.between(1, 5), pairs = queries * candidates;
  const int64_t query_nodes = input.between(1, 40);
  std::vector<float> nodes(queries * query_nodes * sets.channels), shifts(input.flip() ? pairs : 0);
  for (float& node : nodes) node = tame ? moderate(input) : input.any_real<float>();
  for (float& shift : shifts) shift = float(4 * input.share() - 2);
  std::vector<int64_t> rows(pairs);
  for (int64_t& row : rows) row = input.between(-1, sets.count - 1);
  const Settings settings{input.flip(), input.flip() ? float(input.share()) : 1e-3f, input.flip(), 9};
  const Format format{sets.codec, sets.nodes, sets.channels, sets.node_bytes(), sets.codes_at()};
  const Sets in_memory{format,
                       sets.bytes.data(),
                       sets.scales.empty() ? nullptr : sets.scales.data(),
                       sets.counts.empty() ? nullptr : sets.counts.data(),
                       nullptr,
                       nullptr,
                       nullptr};
  Task task{in_memory,   settings,   nodes.data(), rows.data(), shifts.empty() ? nullptr : shifts.data(),
            query_nodes, candidates, nullptr,      nullptr,     nullptr};
  const int64_t split = input.between(0, pairs);
  for (const Kernel* kernel : kernels()) {
    const Written got = write(*kernel, task, pairs, split);
    REQUIRE(got.whole, "%s", kernel->instruction_set);
    if (tame)
      for (int64_t pair = 0; pair < pairs; pair++) check_pair(task, sets, got, pair);
    if (sets.scales_apart || !sets.counts.empty()) continue;
    // The same from a file, and from one that ends too early.
    const auto set_bytes = int64_t(sets.bytes.size()) / sets.count;
    const std::vector<int64_t> files(sets.count, scratch_file(sets.bytes));
    std::vector<int64_t> offsets(sets.count);
    for (int64_t set = 0; set < sets.count; set++) offsets[set] = set * set_bytes;
    Task from_file = task;
    from_file.sets = {format, nullptr, nullptr, nullptr, files.data(), offsets.data(), read_set};
    REQUIRE(write(*kernel, from_file, pairs, split) == got, "%s: file and memory differ", kernel->instruction_set);
    REQUIRE(ftruncate(int(files[0]), input.below(int64_t(sets.bytes.size()))) == 0, "ftruncate");
    const bool needs_last = std::find(rows.begin(), rows.end(), sets.count - 1) != rows.end();
    REQUIRE(!needs_last || !write(*kernel, from_file, pairs, split).whole, "read beyond the end");
  }
}

void fuzz_rows(Input& input) {
  std::vector<uint8_t> bytes(input.below(2000));
  for (uint8_t& byte : bytes) byte = uint8_t(input.bits(1));
  const int file = scratch_file(bytes);
  const int64_t count = input.between(1, 12), width = input.between(1, 60), size = int64_t(bytes.size());
  std::vector<int64_t> starts(count), lengths(input.flip() ? count : 0);
  for (int64_t row = 0; row < count; row++) {
    const int64_t kind = input.below(8);
    starts[row] = kind == 0 ? int64_t(input.bits(8) >> 1) : kind < 4 && row > 0 ? starts[row - 1] : input.below(size + 1);
    if (kind > 0 && kind < 4 && row > 0 && starts[row] < size) starts[row] += width;  // a neighbour
  }
  for (int64_t& length : lengths) length = input.between(0, width);
  std::vector<uint8_t> to(count * width, 0xee);
  const RowRead read{file, starts.data(), lengths.empty() ? nullptr : lengths.data(), width, to.data()};
  const ReadFailure failure = read_rows(read, 0, count);
  int64_t first_bad = -1;
  for (int64_t row = count - 1; row >= 0; row--) {
    const int64_t length = lengths.empty() ? width : lengths[row];
    if (length > 0 && starts[row] > size - length) first_bad = row;
  }
  REQUIRE(failure.row == first_bad, "row %d failed, not %d", int(failure.row), int(first_bad));
  for (int64_t row = 0; row < count && first_bad < 0; row++) {
    const int64_t length = lengths.empty() ? width : lengths[row];
    for (int64_t at = 0; at < width; at++)
      REQUIRE(to[row * width + at] == (at < length ? bytes[starts[row] + at] : 0), "row %d, byte %d", int(row), int(at));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  if (input.below(4) == 0)
    fuzz_rows(input);
  else
    fuzz_problems(input);
  return 0;
}
