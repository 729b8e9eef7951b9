// The Python face: arrays in, problems out, on several threads. retrieval/problems.py checks the
// arguments; what would read or write outside of an array is refused here as well.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

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

void run(const Kernel& kernel, const Task& task, int64_t pairs, int threads) {
  const double area = double(task.sets.nodes) * task.query_nodes * task.sets.channels;
  const double nanoseconds = pairs * (300 + area / 40);
  const int64_t parts = std::max<int64_t>(1, std::min({double(threads), nanoseconds / kThreadWorth, double(pairs)}));
  std::exception_ptr failure;
  std::mutex failure_lock;
  const auto take = [&](int64_t part) {
    try {
      // The query lies in front; registers that crossed its cache lines would take twice the time.
      const Workspace workspace(workspace_floats(task));
      kernel.write(task, pairs * part / parts, pairs * (part + 1) / parts, workspace.get());
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

void write_problems(const Array<const float, 3>& queries, const nb::ndarray<nb::ndim<3>, nb::c_contig, nb::ro>& codes,
                    const OptionalArray<const float, 2>& scales, const OptionalArray<const int64_t, 1>& counts,
                    const Array<const int64_t, 2>& rows, const OptionalArray<const float, 2>& shifts, bool uniform,
                    float floor, bool relative_floor, float absent_cost, const Array<float, 4>& cost,
                    const Array<float, 3>& stored_weights, const Array<float, 3>& query_weights, int threads,
                    const std::optional<std::string>& instruction_set) {
  const size_t count = codes.shape(0), nodes = codes.shape(1), channels = codes.shape(2);
  const size_t query_count = rows.shape(0), candidates = rows.shape(1), query_nodes = queries.shape(1);
  Codec codec;
  if (codes.dtype() == nb::dtype<float>())
    codec = Codec::float32;
  else if (codes.dtype() == nb::dtype<int8_t>())
    codec = Codec::int8;
  else if (codes.dtype() == nb::dlpack::dtype{uint8_t(nb::dlpack::dtype_code::Float), 16, 1})
    codec = Codec::float16;
  else
    throw std::invalid_argument("codes: expected float32, float16 or int8");
  require(nodes > 0 && query_nodes > 0 && channels > 0, "codes, queries: expected nodes and channels");
  require(queries.shape(0) == query_count && queries.shape(2) == channels,
          "queries: expected one a row of rows, and the channels of codes");
  require((codec == Codec::int8) == scales.has_value(), "scales: expected with int8 codes, and only there");
  require(!scales || (scales->shape(0) == count && scales->shape(1) == nodes), "scales: expected one a node");
  require(!counts || counts->shape(0) == count, "counts: expected one a set");
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
    require(rows.data()[pair] >= -1 && rows.data()[pair] < int64_t(count), "rows: expected rows of codes, or -1");
  if (counts)
    for (size_t set = 0; set < count; set++)
      require(counts->data()[set] >= 1 && counts->data()[set] <= int64_t(nodes), "counts: expected 1 to nodes");
  const Task task{{codes.data(), codec, scales ? scales->data() : nullptr, counts ? counts->data() : nullptr,
                   int64_t(nodes), int64_t(channels)},
                  {uniform, floor, relative_floor, absent_cost},
                  queries.data(),
                  rows.data(),
                  shifts ? shifts->data() : nullptr,
                  int64_t(query_nodes),
                  int64_t(candidates),
                  cost.data(),
                  stored_weights.data(),
                  query_weights.data()};
  const Kernel& kernel = kernel_named(instruction_set);
  if (pairs == 0) return;
  const nb::gil_scoped_release release;
  run(kernel, task, pairs, threads);
}

// An argument that is used where it lies: nanobind would else copy what does not fit, results included.
inline auto in_place(const char* name) { return nb::arg(name).noconvert(); }

}  // namespace

NB_MODULE(_problems, module) {
  module.doc() = "Transportation problems of queries against stored, encoded sets.";
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
}
