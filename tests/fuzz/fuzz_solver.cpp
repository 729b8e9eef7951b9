// Fuzzes the native solver behind emd_retrieval.transport: problems of any shape, costs and weights of any
// bits. A plan must prove itself: feasible flow, feasible potentials, one value. A fault must be one and a
// sound problem must be solved; all instruction sets must agree to the bit; top-k must be what solving all
// and sorting gives.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <list>
#include <numeric>
#include <vector>

#include "batch.hpp"
#include "input.hpp"

namespace {

using Wide = long double;
using emd::Outcome;

constexpr int64_t kMostPivots = 100'000;  // as in simplex.py

template <class Real>
struct Case {
  int count, suppliers, demanders;
  std::vector<Real> cost, supply, demand;

  emd::Batch<Real> batch() const { return {cost.data(), supply.data(), demand.data(), count, suppliers, demanders}; }
};

// A few numbers that a side takes its numbers from: ties, and whatever bits a fuzzer thinks of.
template <class Real>
std::vector<Real> palette(Input& input) {
  std::vector<Real> numbers(input.between(1, 8));
  for (Real& number : numbers) {
    switch (input.below(5)) {
      case 0: number = input.any_real<Real>(); break;
      case 1: number = Real(input.share()); break;
      case 2: number = Real(input.between(0, 5)); break;
      case 3: number = Real(std::ldexp(input.share(), int(input.between(-60, 60)))); break;
      default: number = 0;
    }
  }
  return numbers;
}

template <class Real>
void fill_costs(Input& input, std::vector<Real>& costs) {
  const int kind = int(input.below(5));
  const auto numbers = palette<Real>(input);
  const Real low = kind == 3 ? numbers[0] : Real(0);
  for (Real& cost : costs) switch (kind) {
      case 0: cost = numbers[input.below(numbers.size())]; break;
      case 1: cost = Real(2 * input.share()); break;
      case 2: cost = Real(std::exp(40 * (input.share() - 0.5))); break;
      case 3: cost = Real(low + Real(input.between(-3, 3)) * numbers.back()); break;
      default: cost = input.any_real<Real>();
    }
}

template <class Real>
void fill_weights(Input& input, Real* weights, int count) {
  const int kind = int(input.below(5));
  const auto numbers = palette<Real>(input);
  for (int i = 0; i < count; i++) switch (kind) {
      case 0: weights[i] = numbers[input.below(numbers.size())]; break;
      case 1: weights[i] = Real(std::max(0.0, input.share() - 0.4) + 1e-3); break;
      case 2: weights[i] = 1; break;
      case 3: weights[i] = input.flip() ? Real(input.share()) : Real(0); break;
      default: weights[i] = Real(std::exp(60 * (input.share() - 0.5)));
    }
}

template <class Real>
Wide total_of(const Real* weights, int count) {
  return std::accumulate(weights, weights + count, Wide(0));
}

template <class Real>
Case<Real> make_case(Input& input) {
  Case<Real> made;
  const auto nodes = [&] { return int(input.flip() ? input.between(1, 6) : input.between(1, emd::kMaxNodes)); };
  made.count = int(input.between(1, 4));
  made.suppliers = nodes();
  made.demanders = nodes();
  made.cost.resize(made.count * made.suppliers * made.demanders);
  made.supply.resize(made.count * made.suppliers);
  made.demand.resize(made.count * made.demanders);
  fill_costs(input, made.cost);
  for (int k = 0; k < made.count; k++) {
    Real* const supply = &made.supply[k * made.suppliers];
    Real* const demand = &made.demand[k * made.demanders];
    fill_weights(input, supply, made.suppliers);
    fill_weights(input, demand, made.demanders);
    if (input.below(8) == 0) continue;  // else the totals are brought together
    const Wide factor = total_of(supply, made.suppliers) / total_of(demand, made.demanders);
    for (int j = 0; j < made.demanders; j++) demand[j] = Real(demand[j] * factor);
  }
  return made;
}

enum class Verdict { sound, faulty, either };

// Whether a problem must be solved, in arithmetic wide enough not to overflow. Near a limit either will do.
template <class Real>
Verdict judge(const emd::Problem<Real>& problem, Wide& low, Wide& high, Wide& mass) {
  const int m = problem.suppliers, n = problem.demanders;
  const auto bad = [](Real weight) { return !(weight >= 0) || !std::isfinite(weight); };
  const auto not_finite = [](Real cost) { return !std::isfinite(cost); };
  if (std::any_of(problem.supply, problem.supply + m, bad)) return Verdict::faulty;
  if (std::any_of(problem.demand, problem.demand + n, bad)) return Verdict::faulty;
  if (std::any_of(problem.cost, problem.cost + m * n, not_finite)) return Verdict::faulty;
  const auto [least, most] = std::minmax_element(problem.cost, problem.cost + m * n);
  low = *least;
  high = *most;
  mass = total_of(problem.supply, m);
  const Wide other = total_of(problem.demand, n);
  if (mass == 0 || other == 0) return Verdict::faulty;
  // Of each: how large it is beside what it may be at most.
  const Wide largest = std::max(mass, other);
  const Wide parts[] = {
      std::fabs(mass - other) / (emd::kBalanceTolerance * largest),
      largest / Wide(std::numeric_limits<double>::max()),
      std::max(-low, high) / Wide(emd::kMostCost<Real>),
      std::max(-low, high) / Wide(emd::kMostValue<Real>) * mass,
  };
  const Wide worst = *std::max_element(std::begin(parts), std::end(parts));
  if (std::fabs(worst - 1) < 1e-6L) return Verdict::either;
  return worst < 1 ? Verdict::sound : Verdict::faulty;
}

template <class Real>
struct Solution {
  std::vector<Real> flow, supply_potential, demand_potential;
  emd::Plan<Real> plan{};
  Outcome outcome;

  Solution(const emd::Problem<Real>& problem)
      : flow(problem.suppliers * problem.demanders, Real(-1)),
        supply_potential(problem.suppliers),
        demand_potential(problem.demanders) {
    plan.flow = flow.data();
    plan.supply_potential = supply_potential.data();
    plan.demand_potential = demand_potential.data();
  }
};

template <class Real>
void check_certificate(const emd::Problem<Real>& problem, const Solution<Real>& got, Wide low, Wide high, Wide mass) {
  const int m = problem.suppliers, n = problem.demanders;
  const Wide least = std::numeric_limits<Real>::denorm_min(), epsilon = std::numeric_limits<Real>::epsilon();
  const Wide range = high - low, magnitude = std::max(-low, high);
  const Wide balance = mass / total_of(problem.demand, n);
  std::vector<Wide> left(problem.supply, problem.supply + m), wanted(problem.demand, problem.demand + n);
  for (Wide& demand : wanted) demand *= balance;

  // What float32 or float64 can hold of a potential, of a flow and of their products.
  const Wide dual_slack = 2e-7L * range + 4 * epsilon * magnitude + 4 * least;
  const Wide flow_slack = 1e-6L * mass + (m + n) * least;
  // Weights are rounded to 2^-48 of the mass, which shows where costs lie close together and far from zero.
  const Wide value_slack = 1e-6L * range * mass + (8 * epsilon + (m + n) * 0x1p-48L) * magnitude * mass +
                           (m + n) * least * (1 + magnitude + mass);
  Wide value = 0, dual = 0;
  int arcs = 0;
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      const Wide cost = problem.cost[i * n + j], flow = got.flow[i * n + j];
      REQUIRE(flow >= 0, "flow[%d, %d] = %Lg", i, j, flow);
      left[i] -= flow;
      wanted[j] -= flow;
      value += flow * cost;
      arcs += flow > 0;
      const Wide reduced = cost - got.supply_potential[i] - got.demand_potential[j];
      REQUIRE(reduced >= -dual_slack, "reduced cost [%d, %d] = %Lg of range %Lg", i, j, reduced, range);
      REQUIRE(flow == 0 || reduced <= dual_slack, "slack [%d, %d] = %Lg of range %Lg", i, j, reduced, range);
    }
  REQUIRE(arcs <= m + n - 1, "%d arcs", arcs);
  for (const Wide rest : left) REQUIRE(std::fabs(rest) <= flow_slack, "%Lg of %Lg stays", rest, mass);
  for (const Wide rest : wanted) REQUIRE(std::fabs(rest) <= flow_slack, "%Lg of %Lg is not met", rest, mass);
  for (int i = 0; i < m; i++) dual += Wide(problem.supply[i]) * got.supply_potential[i];
  for (int j = 0; j < n; j++) dual += problem.demand[j] * balance * got.demand_potential[j];
  const Wide told = got.plan.value;
  REQUIRE(std::isfinite(Real(told)), "value %Lg", told);
  REQUIRE(std::fabs(told - value) <= value_slack, "value %Lg, flow costs %Lg", told, value);
  REQUIRE(std::fabs(told - dual) <= value_slack, "value %Lg, potentials are worth %Lg", told, dual);
}

template <class Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0;
}

template <class Real>
emd::Solver<Real> solver_of(const emd::Kernel& kernel, int suppliers, int demanders) {
  if constexpr (sizeof(Real) == sizeof(float))
    return kernel.float_solver(suppliers, demanders);
  else
    return kernel.double_solver(suppliers, demanders);
}

// The workspace is one for all: what a problem leaves behind must not matter to the next.
void* workspace_of(const emd::Kernel& kernel) {
  struct Workspace {
    const emd::Kernel& kernel;
    const std::align_val_t alignment{kernel.workspace_alignment};
    void* const memory = ::operator new(kernel.workspace_bytes, alignment);
    explicit Workspace(const emd::Kernel& of) : kernel{of} {}
    ~Workspace() { ::operator delete(memory, alignment); }
    Workspace(const Workspace&) = delete;
  };
  static std::list<Workspace> known;
  for (const Workspace& workspace : known)
    if (&workspace.kernel == &kernel) return workspace.memory;
  return known.emplace_back(kernel).memory;
}

template <class Real>
void check_problems(const Case<Real>& made) {
  const auto batch = made.batch();
  for (int k = 0; k < made.count; k++) {
    const auto problem = batch[k];
    Wide low = 0, high = 0, mass = 0;
    const Verdict verdict = judge(problem, low, high, mass);
    std::vector<Solution<Real>> solutions;
    std::vector<double> bounds;
    for (const emd::Kernel* kernel : emd::runnable_kernels()) {
      const auto solver = solver_of<Real>(*kernel, made.suppliers, made.demanders);
      void* const workspace = workspace_of(*kernel);
      const emd::Limits limits{std::numeric_limits<double>::infinity(), kMostPivots};
      solutions.emplace_back(problem);
      Solution<Real>& got = solutions.back();
      got.outcome = solver.solve(workspace, problem, limits, got.plan);
      double bound = 0;
      const Outcome bounded = solver.bound(workspace, problem, bound);
      bounds.push_back(bound);
      REQUIRE(got.outcome != Outcome::pivot_overrun, "%lld pivots", (long long)got.plan.pivots);
      REQUIRE(bounded == got.outcome, "bound %d, solve %d", int(bounded), int(got.outcome));
      if (got.outcome != Outcome::solved) {
        REQUIRE(verdict != Verdict::sound, "outcome %d of a sound problem", int(got.outcome));
        continue;
      }
      REQUIRE(verdict != Verdict::faulty, "solved, yet low %Lg, high %Lg, mass %Lg", low, high, mass);
      check_certificate(problem, got, low, high, mass);
      // Half of the value's own rounding; of subnormal numbers each product's counts.
      const Wide steps = (made.suppliers + made.demanders) * Wide(std::numeric_limits<Real>::denorm_min());
      const Wide slack = std::numeric_limits<Real>::epsilon() * std::fabs(Wide(got.plan.value)) + steps * (1 + mass);
      REQUIRE(bound * mass <= Wide(got.plan.value) + slack, "bound %Lg above %Lg", bound * mass, Wide(got.plan.value));
      const Solution<Real>& first = solutions.front();
      REQUIRE(same_bits(first.flow, got.flow) && same_bits(first.supply_potential, got.supply_potential) &&
                  same_bits(first.demand_potential, got.demand_potential) && first.plan.value == got.plan.value &&
                  bounds.front() == bound,
              "%s differs", kernel->instruction_set);
    }
  }
}

// All problems as the candidates of one query.
template <class Real>
void check_top_k(const Case<Real>& made, int64_t k) {
  const emd::Execution execution{*emd::runnable_kernels().front(), 2, [] { return false; }};
  const size_t count = made.count;
  std::vector<Real> value(count), mass(count), distance(k), wanted(count);
  std::vector<int64_t> index(k), order(count);
  int64_t solved = 0;
  const auto batch = made.batch();
  const auto full = emd::solve_batch<Real>(batch, {value.data(), nullptr, nullptr, nullptr}, kMostPivots, execution);
  for (int c = 0; c < made.count; c++) mass[c] = Real(total_of(batch[c].supply, made.suppliers));
  const emd::TopK<Real> top{mass.data(), made.count, k, distance.data(), index.data(), &solved};
  const auto report = emd::select_top_k(batch, top, kMostPivots, execution);
  REQUIRE((full.index >= 0) == (report.index >= 0), "solve %lld, top-k %lld", (long long)full.index, (long long)report.index);
  if (full.index >= 0) return;
  for (int c = 0; c < made.count; c++) wanted[c] = value[c] / mass[c];
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return wanted[a] < wanted[b]; });
  for (int64_t place = 0; place < k; place++) {
    const auto found = index[place], best = order[place];
    REQUIRE(found == best && distance[place] == wanted[best], "candidate %d, %Lg instead of %d, %Lg", int(found),
            Wide(distance[place]), int(best), Wide(wanted[best]));
  }
}

template <class Real>
void run(Input& input) {
  const auto made = make_case<Real>(input);
  check_problems(made);
  check_top_k(made, input.between(1, made.count));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  if (input.flip())
    run<float>(input);
  else
    run<double>(input);
  return 0;
}
