// The Python face of the native core: arrays in, arrays out, faults as a name and an index.
// emd_retrieval/transport/simplex.py checks the arguments and words the errors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "batch.hpp"

namespace nb = nanobind;

namespace {

template <class T, int dimensions>
using Array = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
template <class T, int dimensions>
using OptionalArray = std::optional<Array<T, dimensions>>;

template <class Real>
emd::Batch<Real> batch_of(const Array<const Real, 3>& cost, const Array<const Real, 2>& supply,
                          const Array<const Real, 2>& demand) {
  const auto count = cost.shape(0), suppliers = cost.shape(1), demanders = cost.shape(2);
  const auto in_range = [](size_t nodes) { return nodes >= 1 && nodes <= emd::kMaxNodes; };
  if (!in_range(suppliers) || !in_range(demanders))
    throw std::invalid_argument("cost: expected 1 to 64 nodes a side");
  if (supply.shape(0) != count || supply.shape(1) != suppliers || demand.shape(0) != count ||
      demand.shape(1) != demanders)
    throw std::invalid_argument("supply, demand: expected cost's sizes");
  return {cost.data(),    supply.data(),  demand.data(),
          int64_t(count), int(suppliers), int(demanders)};
}

template <class T, int dimensions>
T* data_of(const OptionalArray<T, dimensions>& array, size_t size, const char* name) {
  if (!array) return nullptr;
  if (array->size() != size) throw std::invalid_argument(std::string(name) + ": wrong size");
  return array->data();
}

const emd::Kernel& kernel_named(const std::optional<std::string>& instruction_set) {
  const auto kernels = emd::runnable_kernels();
  if (kernels.empty()) throw std::runtime_error("this CPU lacks SSE4.2, which the solver needs");
  if (!instruction_set) return *kernels.front();
  for (const emd::Kernel* kernel : kernels)
    if (*instruction_set == kernel->instruction_set) return *kernel;
  throw std::invalid_argument("instruction_set: this machine does not run " + *instruction_set);
}

const char* name_of(emd::Outcome outcome) {
  switch (outcome) {
    case emd::Outcome::solved:
    case emd::Outcome::pruned: break;
    case emd::Outcome::cost_not_finite: return "cost_not_finite";
    case emd::Outcome::value_overflow: return "value_overflow";
    case emd::Outcome::supply_not_valid: return "supply_not_valid";
    case emd::Outcome::demand_not_valid: return "demand_not_valid";
    case emd::Outcome::supply_zero: return "supply_zero";
    case emd::Outcome::demand_zero: return "demand_zero";
    case emd::Outcome::unbalanced: return "unbalanced";
    case emd::Outcome::pivot_overrun: return "pivot_overrun";
  }
  return nullptr;
}

// The name of a fault or None, its problem, and the most pivots that one problem took.
using PythonReport = std::tuple<std::optional<std::string>, int64_t, int64_t>;

// Runs without the GIL, which is taken twenty times a second to see whether Ctrl-C was pressed.
template <class Run>
PythonReport run(const std::optional<std::string>& instruction_set, int threads, const Run& task) {
  const auto interrupted = [] {
    const nb::gil_scoped_acquire hold;
    return PyErr_CheckSignals() != 0;
  };
  const emd::Execution execution{kernel_named(instruction_set), threads, interrupted};
  emd::Report report;
  {
    const nb::gil_scoped_release release;
    report = task(execution);
  }
  if (report.interrupted) throw nb::python_error();
  const char* const fault = name_of(report.outcome);
  return {fault ? std::optional<std::string>(fault) : std::nullopt, report.index, report.most_pivots};
}

template <class Real>
PythonReport solve(const Array<const Real, 3>& cost, const Array<const Real, 2>& supply,
                   const Array<const Real, 2>& demand, const Array<Real, 1>& value,
                   const OptionalArray<Real, 3>& flow, const OptionalArray<Real, 2>& supply_potential,
                   const OptionalArray<Real, 2>& demand_potential, int64_t most_pivots, int threads,
                   const std::optional<std::string>& instruction_set) {
  const auto batch = batch_of<Real>(cost, supply, demand);
  if (supply_potential.has_value() != demand_potential.has_value())
    throw std::invalid_argument("supply_potential, demand_potential: expected both or none");
  const emd::PlanArrays<Real> plans{
      data_of<Real, 1>(value, cost.shape(0), "value"),
      data_of<Real, 3>(flow, cost.size(), "flow"),
      data_of<Real, 2>(supply_potential, supply.size(), "supply_potential"),
      data_of<Real, 2>(demand_potential, demand.size(), "demand_potential")};
  return run(instruction_set, threads, [&](const emd::Execution& execution) {
    return emd::solve_batch(batch, plans, most_pivots, execution);
  });
}

template <class Real>
PythonReport lower_bound(const Array<const Real, 3>& cost, const Array<const Real, 2>& supply,
                         const Array<const Real, 2>& demand, const Array<Real, 1>& bound, int threads,
                         const std::optional<std::string>& instruction_set) {
  const auto batch = batch_of<Real>(cost, supply, demand);
  Real* const to = data_of<Real, 1>(bound, cost.shape(0), "bound");
  return run(instruction_set, threads, [&](const emd::Execution& execution) {
    return emd::bound_batch(batch, to, execution);
  });
}

template <class Real>
PythonReport top_k(const Array<const Real, 3>& cost, const Array<const Real, 2>& supply,
                   const Array<const Real, 2>& demand, const Array<const Real, 1>& mass,
                   const Array<Real, 2>& distance, const Array<int64_t, 2>& index,
                   const Array<int64_t, 1>& solved, int64_t most_pivots, int threads,
                   const std::optional<std::string>& instruction_set) {
  const auto batch = batch_of<Real>(cost, supply, demand);
  const auto queries = solved.shape(0), k = index.shape(1);
  if (queries == 0 || batch.count % queries != 0)
    throw std::invalid_argument("solved: expected one entry a query");
  const int64_t candidates = batch.count / queries;
  if (k < 1 || int64_t(k) > candidates)
    throw std::invalid_argument("k: expected 1 to the number of candidates");
  const emd::TopK<Real> top{data_of<const Real, 1>(mass, cost.shape(0), "mass"),
                            candidates,
                            int64_t(k),
                            data_of<Real, 2>(distance, queries * k, "distance"),
                            data_of<int64_t, 2>(index, queries * k, "index"),
                            solved.data()};
  return run(instruction_set, threads, [&](const emd::Execution& execution) {
    return emd::select_top_k(batch, top, most_pivots, execution);
  });
}

template <class Real>
void add_flow_products(const Array<const Real, 3>& flow, const Array<const Real, 1>& scale,
                       const Array<const Real, 3>& left, const Array<const Real, 3>& right,
                       const OptionalArray<Real, 3>& left_gradient,
                       const OptionalArray<Real, 3>& right_gradient, bool upper, int threads) {
  const int64_t rows = left.shape(0), columns = right.shape(0);
  const int64_t pairs = upper ? rows * (rows + 1) / 2 : rows * columns;
  if (int64_t(flow.shape(0)) != pairs || int64_t(scale.shape(0)) != pairs ||
      flow.shape(1) != left.shape(1) || flow.shape(2) != right.shape(1) ||
      left.shape(2) != right.shape(2) || (upper && rows != columns))
    throw std::invalid_argument("flow, scale, left, right: sizes do not fit");
  const emd::GridProducts<Real> grid{flow.data(),
                                     scale.data(),
                                     left.data(),
                                     right.data(),
                                     data_of<Real, 3>(left_gradient, left.size(), "left_gradient"),
                                     data_of<Real, 3>(right_gradient, right.size(), "right_gradient"),
                                     rows,
                                     columns,
                                     int64_t(left.shape(1)),
                                     int64_t(right.shape(1)),
                                     int64_t(left.shape(2)),
                                     upper};
  run(std::nullopt, threads, [&](const emd::Execution& execution) {
    return emd::add_grid_products(grid, execution);
  });
}

// An argument that is used where it lies: nanobind would else copy what does not fit, results included.
inline auto in_place(const char* name) { return nb::arg(name).noconvert(); }

template <class Real>
void define_for(nb::module_& module) {
  module.def("solve", solve<Real>, in_place("cost"), in_place("supply"), in_place("demand"),
             in_place("value"), in_place("flow").none(), in_place("supply_potential").none(),
             in_place("demand_potential").none(), nb::arg("most_pivots"), nb::arg("threads"),
             nb::arg("instruction_set").none());
  module.def("lower_bound", lower_bound<Real>, in_place("cost"), in_place("supply"), in_place("demand"),
             in_place("bound"), nb::arg("threads"), nb::arg("instruction_set").none());
  module.def("add_flow_products", add_flow_products<Real>, in_place("flow"), in_place("scale"),
             in_place("left"), in_place("right"), in_place("left_gradient").none(),
             in_place("right_gradient").none(), nb::arg("upper"), nb::arg("threads"));
  module.def("top_k", top_k<Real>, in_place("cost"), in_place("supply"), in_place("demand"),
             in_place("mass"), in_place("distance"), in_place("index"), in_place("solved"), nb::arg("most_pivots"),
             nb::arg("threads"), nb::arg("instruction_set").none());
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The exact transport solver for problems of at most 64 x 64 nodes.";
  module.attr("MAX_NODES") = emd::kMaxNodes;
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const emd::Kernel* kernel : emd::runnable_kernels())
      names.emplace_back(kernel->instruction_set);
    return names;
  });
  define_for<float>(module);
  define_for<double>(module);
}
