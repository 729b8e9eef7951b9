// The Python face: arrays and open files in, rows and problems out, on several threads. The callers
// check the arguments; what would read or write outside of an array is refused here as well.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "files.hpp"
#include "nearest.hpp"
#include "problems.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace {

using namespace shortlist;

template <class T, int dimensions>
using Array = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
template <class T, int dimensions>
using OptionalArray = std::optional<Array<T, dimensions>>;

std::vector<const Kernel*> runnable_kernels() {
#ifdef EMD_X86_KERNELS
  std::vector<const Kernel*> kernels;
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) kernels.push_back(&kernel_v4);
  if (v3) kernels.push_back(&kernel_v3);
  if (v2) kernels.push_back(&kernel_v2);
  return kernels;
#else
  return {&kernel_portable};
#endif
}

const Kernel& kernel_named(const std::optional<std::string>& instruction_set) {
  const auto kernels = runnable_kernels();
  if (kernels.empty()) throw std::runtime_error("this CPU lacks SSE4.2, which re-ranking needs");
  if (!instruction_set) return *kernels.front();
  for (const Kernel* kernel : kernels)
    if (*instruction_set == kernel->instruction_set) return *kernel;
  throw std::invalid_argument("instruction_set: this machine does not run " + *instruction_set);
}

void require(bool holds, const char* words) {
  if (!holds) throw std::invalid_argument(words);
}

Codec codec_of(const nb::dlpack::dtype& type) {
  if (type == nb::dtype<float>()) return Codec::float32;
  if (type == nb::dtype<int8_t>()) return Codec::int8;
  if (type == nb::dlpack::dtype{uint8_t(nb::dlpack::dtype_code::Float), 16, 1}) return Codec::float16;
  throw std::invalid_argument("codes: expected float32, float16 or int8");
}

Codec codec_named(const std::string& name) {
  if (name == "float32") return Codec::float32;
  if (name == "int8") return Codec::int8;
  if (name == "float16") return Codec::float16;
  throw std::invalid_argument("codec: expected float32, float16 or int8");
}

int64_t code_bytes(Codec codec) { return codec == Codec::float32 ? 4 : codec == Codec::float16 ? 2 : 1; }

bool read_set(int64_t file, int64_t offset, uint8_t* to, int64_t bytes) {
  int error;
  return read_at(file, offset, to, bytes, error);
}

// The arguments that both sources of sets share.
struct Query {
  Array<const float, 3> queries;
  Array<const int64_t, 2> rows;
  OptionalArray<const float, 2> shifts;
  Settings settings;
};

// The task, with no place for its problems yet. `count` sets are there.
Task task_of(const Query& query, const Sets& sets, int64_t count) {
  const auto& [queries, rows, shifts, settings] = query;
  const size_t channels = sets.format.channels;
  require(sets.format.nodes > 0 && queries.shape(1) > 0 && channels > 0, "codes, queries: expected nodes and channels");
  require(queries.shape(0) == rows.shape(0) && queries.shape(2) == channels,
          "queries: expected one a row of rows, and the channels of codes");
  require(!shifts || (shifts->shape(0) == rows.shape(0) && shifts->shape(1) == rows.shape(1)),
          "shifts: expected the shape of rows");
  for (size_t pair = 0; pair < rows.size(); pair++)
    require(rows.data()[pair] >= -1 && rows.data()[pair] < count, "rows: expected rows of codes, or -1");
  return {sets,
          settings,
          queries.data(),
          rows.data(),
          shifts ? shifts->data() : nullptr,
          int64_t(queries.shape(1)),
          int64_t(rows.shape(1)),
          nullptr,
          nullptr,
          nullptr};
}

// Where problems go.
struct Problems {
  Array<float, 4> cost;
  Array<float, 3> stored_weights, query_weights;
};

bool write(Task task, int64_t queries, const Problems& problems, int threads,
           const std::optional<std::string>& instruction_set) {
  const auto& [cost, stored_weights, query_weights] = problems;
  const size_t count = queries, candidates = task.candidates;
  const size_t nodes = task.sets.format.nodes, query_nodes = task.query_nodes;
  require(cost.shape(0) == count && cost.shape(1) == candidates && cost.shape(2) == nodes &&
              cost.shape(3) == query_nodes,
          "cost: wrong shape");
  require(stored_weights.shape(0) == count && stored_weights.shape(1) == candidates &&
              stored_weights.shape(2) == nodes,
          "stored_weights: wrong shape");
  require(query_weights.shape(0) == count && query_weights.shape(1) == candidates &&
              query_weights.shape(2) == query_nodes,
          "query_weights: wrong shape");
  task.cost = cost.data();
  task.stored_weights = stored_weights.data();
  task.query_weights = query_weights.data();
  const Kernel& kernel = kernel_named(instruction_set);
  if (cost.size() == 0) return true;
  const nb::gil_scoped_release release;
  return write_all(task, queries, kernel, threads);
}

void write_problems(const Array<const float, 3>& queries, const nb::ndarray<nb::ndim<3>, nb::c_contig, nb::ro>& codes,
                    const OptionalArray<const float, 2>& scales, const OptionalArray<const int64_t, 1>& counts,
                    const Array<const int64_t, 2>& rows, const OptionalArray<const float, 2>& shifts, bool uniform,
                    float floor, bool relative_floor, float absent_cost, const Array<float, 4>& cost,
                    const Array<float, 3>& stored_weights, const Array<float, 3>& query_weights, int threads,
                    const std::optional<std::string>& instruction_set) {
  const int64_t count = codes.shape(0), nodes = codes.shape(1), channels = codes.shape(2);
  const Codec codec = codec_of(codes.dtype());
  require((codec == Codec::int8) == scales.has_value(), "scales: expected with int8 codes, and only there");
  require(!scales || (int64_t(scales->shape(0)) == count && int64_t(scales->shape(1)) == nodes),
          "scales: expected one a node");
  require(!counts || int64_t(counts->shape(0)) == count, "counts: expected one a set");
  if (counts)
    for (int64_t set = 0; set < count; set++)
      require(counts->data()[set] >= 1 && counts->data()[set] <= nodes, "counts: expected 1 to nodes");
  const Sets sets{{codec, nodes, channels, channels * code_bytes(codec), 0},
                  static_cast<const uint8_t*>(codes.data()),
                  scales ? scales->data() : nullptr,
                  counts ? counts->data() : nullptr,
                  nullptr,
                  nullptr,
                  nullptr};
  const Settings settings{uniform, floor, relative_floor, absent_cost};
  write(task_of({queries, rows, shifts, settings}, sets, count), queries.shape(0),
        {cost, stored_weights, query_weights}, threads, instruction_set);
}

// Sets of a store's open files, one at each offset.
Sets sets_in(const Array<const int64_t, 1>& files, const Array<const int64_t, 1>& offsets,
             const std::string& codec_name, int64_t nodes, int64_t channels) {
  require(offsets.shape(0) == files.shape(0), "offsets: expected one a file");
  const Codec codec = codec_named(codec_name);
  const int64_t codes_at = codec == Codec::int8 ? int64_t(sizeof(float)) : 0;
  return {{codec, nodes, channels, codes_at + channels * code_bytes(codec), codes_at},
          nullptr,
          nullptr,
          nullptr,
          files.data(),
          offsets.data(),
          read_set};
}

bool write_problems_from_files(const Array<const float, 3>& queries, const Array<const int64_t, 1>& files,
                               const Array<const int64_t, 1>& offsets, const std::string& codec_name,
                               const Array<const int64_t, 2>& rows, const OptionalArray<const float, 2>& shifts,
                               bool uniform, float floor, bool relative_floor, float absent_cost,
                               const Array<float, 4>& cost, const Array<float, 3>& stored_weights,
                               const Array<float, 3>& query_weights, int threads,
                               const std::optional<std::string>& instruction_set) {
  const Sets sets = sets_in(files, offsets, codec_name, cost.shape(2), queries.shape(2));
  const Settings settings{uniform, floor, relative_floor, absent_cost};
  return write(task_of({queries, rows, shifts, settings}, sets, files.shape(0)), queries.shape(0),
               {cost, stored_weights, query_weights}, threads, instruction_set);
}

bool nearest_from_files(const Array<const float, 3>& queries, const Array<const int64_t, 1>& files,
                        const Array<const int64_t, 1>& offsets, const std::string& codec_name, int64_t nodes,
                        const Array<const int64_t, 2>& rows, const OptionalArray<const float, 2>& shifts,
                        bool uniform, float floor, bool relative_floor, float absent_cost,
                        const Array<float, 2>& distance, const Array<int64_t, 2>& index,
                        const Array<int64_t, 1>& solved, int64_t most_pivots, int threads) {
  const Sets sets = sets_in(files, offsets, codec_name, nodes, queries.shape(2));
  const Settings settings{uniform, floor, relative_floor, absent_cost};
  const Task task = task_of({queries, rows, shifts, settings}, sets, files.shape(0));
  require(nodes <= emd::kMaxNodes && task.query_nodes <= emd::kMaxNodes, "nodes, queries: expected 64 nodes at most");
  const size_t count = queries.shape(0), k = index.shape(1);
  require(k >= 1 && k <= rows.shape(1), "index: expected 1 to candidates places a query");
  require(index.shape(0) == count && distance.shape(0) == count && distance.shape(1) == k &&
              solved.shape(0) == count,
          "distance, index, solved: wrong shape");
  const auto solvers = emd::runnable_kernels();
  if (solvers.empty()) throw std::runtime_error("this CPU lacks SSE4.2, which re-ranking needs");
  const Nearest nearest{int64_t(k), distance.data(), index.data(), solved.data()};
  const Means means{kernel_named({}), *solvers.front(), most_pivots, threads};
  const nb::gil_scoped_release release;
  return find_nearest(task, count, nearest, means);
}

std::pair<int64_t, int> read_rows_of(int64_t file, const Array<const int64_t, 1>& starts,
                                     const OptionalArray<const int64_t, 1>& lengths, const Array<uint8_t, 2>& to,
                                     int threads) {
  const int64_t count = to.shape(0), width = to.shape(1);
  require(int64_t(starts.shape(0)) == count, "starts: expected one a row");
  require(!lengths || int64_t(lengths->shape(0)) == count, "lengths: expected one a row");
  for (int64_t row = 0; row < count; row++) {
    require(starts.data()[row] >= 0, "starts: expected zero or more");
    require(!lengths || (lengths->data()[row] >= 0 && lengths->data()[row] <= width),
            "lengths: expected zero to the width");
  }
  const RowRead read{file, starts.data(), lengths ? lengths->data() : nullptr, width, to.data()};
  ReadFailure first;
  std::mutex first_lock;
  {
    const nb::gil_scoped_release release;
    const int64_t parts = threads_for(count * (500 + width / 8.0), threads);
    on_threads(int(parts), [&](int part) {
      const ReadFailure failure = read_rows(read, count * part / parts, count * (part + 1) / parts);
      const std::lock_guard<std::mutex> hold(first_lock);
      if (failure.row >= 0 && (first.row < 0 || failure.row < first.row)) first = failure;
    });
  }
  return {first.row, first.error};
}

// An argument that is used where it lies: nanobind would else copy what does not fit, results included.
inline auto in_place(const char* name) { return nb::arg(name).noconvert(); }

}  // namespace

NB_MODULE(_problems, module) {
  module.doc() = "Rows of stored sets, and transportation problems of queries against them.";
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernel* kernel : runnable_kernels()) names.emplace_back(kernel->instruction_set);
    return names;
  });
  module.def("write_problems", write_problems, in_place("queries"), in_place("codes"), in_place("scales").none(),
             in_place("counts").none(), in_place("rows"), in_place("shifts").none(), nb::arg("uniform"),
             nb::arg("floor"), nb::arg("relative_floor"), nb::arg("absent_cost"), in_place("cost"),
             in_place("stored_weights"), in_place("query_weights"), nb::arg("threads"),
             nb::arg("instruction_set").none());
  module.def("write_problems_from_files", write_problems_from_files, in_place("queries"), in_place("files"),
             in_place("offsets"), nb::arg("codec"), in_place("rows"), in_place("shifts").none(), nb::arg("uniform"),
             nb::arg("floor"), nb::arg("relative_floor"), nb::arg("absent_cost"), in_place("cost"),
             in_place("stored_weights"), in_place("query_weights"), nb::arg("threads"),
             nb::arg("instruction_set").none());
  module.def("nearest_from_files", nearest_from_files, in_place("queries"), in_place("files"), in_place("offsets"),
             nb::arg("codec"), nb::arg("nodes"), in_place("rows"), in_place("shifts").none(), nb::arg("uniform"),
             nb::arg("floor"), nb::arg("relative_floor"), nb::arg("absent_cost"), in_place("distance"),
             in_place("index"), in_place("solved"), nb::arg("most_pivots"), nb::arg("threads"));
  module.def("read_rows", read_rows_of, nb::arg("file"), in_place("starts"), in_place("lengths").none(),
             in_place("to"), nb::arg("threads"));
}
