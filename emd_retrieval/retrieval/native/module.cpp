// The Python face: arrays and open files in, rows and problems out, on several threads. The callers
// check the arguments; what would read or write outside of an array is refused here as well.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "files.hpp"
#include "problems.hpp"

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

class Workspace {
 public:
  explicit Workspace(int64_t floats)
      : memory_{static_cast<float*>(::operator new(floats * sizeof(float), kAlignment))} {}
  ~Workspace() { ::operator delete(memory_, kAlignment); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* memory_;
};

constexpr double kThreadWorth = 50e3;  // nanoseconds of work that pay for starting a thread

// Calls work(from, to) for parts of 0..count - 1, each on a thread of its own where that pays.
template <class Work>
void in_parts(int64_t count, double nanoseconds, int threads, const Work& work) {
  const int64_t parts =
      std::max<int64_t>(1, int64_t(std::min({double(threads), nanoseconds / kThreadWorth, double(count)})));
  std::exception_ptr failure;
  std::mutex failure_lock;
  const auto take = [&](int64_t part) {
    try {
      work(count * part / parts, count * (part + 1) / parts);
    } catch (...) {
      const std::lock_guard<std::mutex> hold(failure_lock);
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(parts);
  int64_t started = 1;
  try {
    for (; started < parts; started++) helpers.emplace_back(take, started);
  } catch (const std::system_error&) {
    // The system has no more threads to give: this one does their parts.
    for (int64_t part = started; part < parts; part++) take(part);
  }
  take(0);
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
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
  Array<float, 4> cost;
  Array<float, 3> stored_weights, query_weights;
  int threads;
};

bool write(const Query& query, const Sets& sets, int64_t count, const std::optional<std::string>& instruction_set) {
  const size_t nodes = sets.format.nodes, channels = sets.format.channels;
  const size_t query_count = query.rows.shape(0), candidates = query.rows.shape(1);
  const size_t query_nodes = query.queries.shape(1);
  const auto& [queries, rows, shifts, settings, cost, stored_weights, query_weights, threads] = query;
  require(nodes > 0 && query_nodes > 0 && channels > 0, "codes, queries: expected nodes and channels");
  require(queries.shape(0) == query_count && queries.shape(2) == channels,
          "queries: expected one a row of rows, and the channels of codes");
  require(!shifts || (shifts->shape(0) == query_count && shifts->shape(1) == candidates),
          "shifts: expected the shape of rows");
  require(cost.shape(0) == query_count && cost.shape(1) == candidates && cost.shape(2) == nodes &&
              cost.shape(3) == query_nodes,
          "cost: wrong shape");
  require(stored_weights.shape(0) == query_count && stored_weights.shape(1) == candidates &&
              stored_weights.shape(2) == nodes,
          "stored_weights: wrong shape");
  require(query_weights.shape(0) == query_count && query_weights.shape(1) == candidates &&
              query_weights.shape(2) == query_nodes,
          "query_weights: wrong shape");
  const int64_t pairs = int64_t(query_count * candidates);
  for (int64_t pair = 0; pair < pairs; pair++)
    require(rows.data()[pair] >= -1 && rows.data()[pair] < count, "rows: expected rows of codes, or -1");
  const Task task{sets,
                  settings,
                  queries.data(),
                  rows.data(),
                  shifts ? shifts->data() : nullptr,
                  int64_t(query_nodes),
                  int64_t(candidates),
                  cost.data(),
                  stored_weights.data(),
                  query_weights.data()};
  const Kernel& kernel = kernel_named(instruction_set);
  if (pairs == 0) return true;
  const nb::gil_scoped_release release;
  const double area = double(nodes) * query_nodes * channels;
  std::atomic<bool> whole{true};
  in_parts(pairs, pairs * (300 + area / 40), threads, [&](int64_t from, int64_t to) {
    // The query lies in front; registers that crossed its cache lines would take twice the time.
    const Workspace workspace(workspace_floats(task));
    if (!kernel.write(task, from, to, workspace.get())) whole = false;
  });
  return whole;
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
  write({queries, rows, shifts, settings, cost, stored_weights, query_weights, threads}, sets, count, instruction_set);
}

bool write_problems_from_files(const Array<const float, 3>& queries, const Array<const int64_t, 1>& files,
                               const Array<const int64_t, 1>& offsets, const std::string& codec_name,
                               const Array<const int64_t, 2>& rows, const OptionalArray<const float, 2>& shifts,
                               bool uniform, float floor, bool relative_floor, float absent_cost,
                               const Array<float, 4>& cost, const Array<float, 3>& stored_weights,
                               const Array<float, 3>& query_weights, int threads,
                               const std::optional<std::string>& instruction_set) {
  const int64_t count = files.shape(0), nodes = cost.shape(2), channels = queries.shape(2);
  require(int64_t(offsets.shape(0)) == count, "offsets: expected one a file");
  const Codec codec = codec_named(codec_name);
  const int64_t codes_at = codec == Codec::int8 ? int64_t(sizeof(float)) : 0;
  const Sets sets{{codec, nodes, channels, codes_at + channels * code_bytes(codec), codes_at},
                  nullptr,
                  nullptr,
                  nullptr,
                  files.data(),
                  offsets.data(),
                  read_set};
  const Settings settings{uniform, floor, relative_floor, absent_cost};
  return write({queries, rows, shifts, settings, cost, stored_weights, query_weights, threads}, sets, count,
               instruction_set);
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
    in_parts(count, count * (500 + width / 8.0), threads, [&](int64_t from, int64_t end) {
      const ReadFailure failure = read_rows(read, from, end);
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
  module.def("read_rows", read_rows_of, nb::arg("file"), in_place("starts"), in_place("lengths").none(),
             in_place("to"), nb::arg("threads"));
}
