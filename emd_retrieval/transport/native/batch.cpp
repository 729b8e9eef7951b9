// Feeds batches to the kernel on several threads. Threads live for one call only, so nothing is left
// that a fork could break; no state outlives a call.
#include "batch.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

namespace emd {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Real>
Solver<Real> solver_of(const Kernel& kernel, const Batch<Real>& batch) {
  if constexpr (sizeof(Real) == sizeof(float))
    return kernel.float_solver(batch.suppliers, batch.demanders);
  else
    return kernel.double_solver(batch.suppliers, batch.demanders);
}

class Workspace {
 public:
  explicit Workspace(const Kernel& kernel)
      : alignment_{kernel.workspace_alignment},
        memory_{::operator new(kernel.workspace_bytes, alignment_)} {}
  ~Workspace() { ::operator delete(memory_, alignment_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  std::align_val_t alignment_;
  void* memory_;
};

// A rough time for one problem; it only decides on threads and on the length of a turn.
double nanoseconds_for(int suppliers, int demanders) {
  return 400 + 4.0 * suppliers * demanders;
}

constexpr double kTurn = 100e3;       // nanoseconds of work between two looks at the shared counter
constexpr int64_t kCandidatesALook = 256;
// Nanoseconds of work that pay for a thread. Right after work of torch's a second thread made batches of
// half a millisecond slower, it seems because torch's own threads still wait, busy, for more of it.
constexpr double kThreadWorth = 400e3;

constexpr std::chrono::milliseconds kLook{50};  // between two looks at whether to go on

// Whether a call was interrupted. Only the thread that made the call can find out.
class Interruption {
 public:
  explicit Interruption(const Execution& execution) : execution_{execution} {}

  bool came(bool is_caller) {
    const auto now = is_caller ? Clock::now() : Clock::time_point{};
    if (is_caller && now - looked_ > kLook) {
      if (execution_.interrupted()) came_.store(true, std::memory_order_relaxed);
      looked_ = now;
    }
    return came_.load(std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  const Execution& execution_;
  Clock::time_point looked_ = Clock::now();  // the caller's alone
  std::atomic<bool> came_{false};
};

// Calls work(workspace, item, report, gives_up) for every item, in turns that the threads take from one
// counter. Work returns the outcome of the item; the first item with a fault is reported, as all before
// it have been worked on. Work on a long item asks gives_up() now and then and returns if that is true.
template <class Work>
Report for_each(int64_t count, double nanoseconds_each, const Execution& execution, const Work& work) {
  const int64_t turn = std::max<int64_t>(1, int64_t(kTurn / nanoseconds_each));
  const double most_threads =
      std::min({double(execution.threads), count * nanoseconds_each / kThreadWorth, double(count)});
  const int helpers = std::max(1, int(most_threads)) - 1;

  Report report;
  std::mutex report_lock;
  std::exception_ptr failure;
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  Interruption interruption(execution);
  int running = 0;  // helpers
  std::condition_variable helper_ended;
  const auto take_turns = [&](bool is_caller) {
    const auto gives_up = [&] { return interruption.came(is_caller); };
    Report mine;
    std::exception_ptr mine_failure;
    try {
      const Workspace workspace(execution.kernel);
      while (!stop.load(std::memory_order_relaxed) && mine.index < 0 && !gives_up()) {
        const int64_t from = next.fetch_add(turn, std::memory_order_relaxed);
        if (from >= count) break;
        for (int64_t item = from; item < std::min(count, from + turn); item++) {
          const Outcome outcome = work(workspace.get(), item, mine, gives_up);
          if (outcome == Outcome::solved) continue;
          mine.outcome = outcome;
          break;
        }
      }
    } catch (...) {
      mine_failure = std::current_exception();
    }
    if (mine.index >= 0 || mine_failure) stop.store(true);
    const std::lock_guard<std::mutex> hold(report_lock);
    report.most_pivots = std::max(report.most_pivots, mine.most_pivots);
    if (mine_failure) failure = mine_failure;
    if (mine.index >= 0 && (report.index < 0 || mine.index < report.index)) {
      report.outcome = mine.outcome;
      report.index = mine.index;
    }
    if (!is_caller && --running == 0) helper_ended.notify_one();
  };

  std::vector<std::thread> threads;
  threads.reserve(helpers);
  try {
    for (int t = 0; t < helpers; t++) {
      const std::lock_guard<std::mutex> hold(report_lock);
      threads.emplace_back(take_turns, false);
      running++;
    }
  } catch (const std::system_error&) {
    // The system has no more threads to give: those that started and this one do the work.
  }
  take_turns(true);
  {
    std::unique_lock<std::mutex> hold(report_lock);
    while (!helper_ended.wait_for(hold, kLook, [&] { return running == 0; })) {
      hold.unlock();  // the helpers' way out must not hang on what the caller's question takes
      interruption.came(true);
      hold.lock();
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
  report.interrupted = interruption.came(false);
  return report;
}

}  // namespace

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

template <class Real>
Report solve_batch(const Batch<Real>& batch, const PlanArrays<Real>& plans, int64_t most_pivots,
                   const Execution& execution) {
  const Solver<Real> solver = solver_of(execution.kernel, batch);
  const Limits limits{kInfinity, most_pivots};
  const int64_t m = batch.suppliers, n = batch.demanders;
  const auto at = [](Real* array, int64_t offset) { return array ? array + offset : nullptr; };
  const auto solve = [&](void* workspace, int64_t k, Report& report, const auto&) {
    Plan<Real> plan{at(plans.flow, k * m * n), at(plans.supply_potential, k * m),
                    at(plans.demand_potential, k * n), 0, 0};
    const Outcome outcome = solver.solve(workspace, batch[k], limits, plan);
    plans.value[k] = Real(plan.value);
    report.most_pivots = std::max(report.most_pivots, plan.pivots);
    if (outcome != Outcome::solved) report.index = k;
    return outcome;
  };
  return for_each(batch.count, nanoseconds_for(batch.suppliers, batch.demanders), execution, solve);
}

template <class Real>
Report bound_batch(const Batch<Real>& batch, Real* bound, const Execution& execution) {
  const Solver<Real> solver = solver_of(execution.kernel, batch);
  const auto find_bound = [&](void* workspace, int64_t k, Report& report, const auto&) {
    double per_mass = 0, mass = 0;
    const Outcome outcome = solver.bound(workspace, batch[k], per_mass);
    if (outcome != Outcome::solved) report.index = k;
    for (int i = 0; i < batch.suppliers; i++) mass += batch.supply[k * batch.suppliers + i];
    bound[k] = Real(per_mass * mass);
    return outcome;
  };
  const double nanoseconds = nanoseconds_for(batch.suppliers, batch.demanders) / 8;
  return for_each(batch.count, nanoseconds, execution, find_bound);
}

template <class Real>
Report select_top_k(const Batch<Real>& batch, const TopK<Real>& top, int64_t most_pivots,
                    const Execution& execution) {
  const Solver<Real> solver = solver_of(execution.kernel, batch);
  constexpr double kDistanceError = sizeof(Real) == sizeof(float) ? 0x1p-21 : 0x1p-44;
  const auto select = [&](void* workspace, int64_t query, Report& report, const auto& gives_up) {
    const int64_t first = query * top.candidates;
    std::vector<std::pair<double, int64_t>> by_bound(top.candidates);
    for (int64_t c = 0; c < top.candidates; c++) {
      if (c % kCandidatesALook == 0 && gives_up()) return Outcome::solved;
      by_bound[c].second = c;
      const Outcome outcome = solver.bound(workspace, batch[first + c], by_bound[c].first);
      if (outcome == Outcome::solved) continue;
      report.index = first + c;
      return outcome;
    }
    std::sort(by_bound.begin(), by_bound.end());

    // The k best so far as a heap, the worst of them in front. Distances are compared as they are
    // returned, rounded to Real: a candidate is out for certain only above all that rounding. Values
    // near the smallest numbers are rounded to multiples of the smallest, which a small mass magnifies.
    const Real least_mass = *std::min_element(top.mass + first, top.mass + first + top.candidates);
    constexpr double kLeast = std::numeric_limits<Real>::denorm_min();
    const double least_step = kLeast * (batch.suppliers + batch.demanders) * (1 + 1 / double(least_mass));
    std::vector<std::pair<Real, int64_t>> best;
    best.reserve(top.k + 1);
    double limit = kInfinity;
    int64_t solved = 0;
    int64_t tried = 0;
    for (const auto& [bound, candidate] : by_bound) {
      if (bound > limit) break;
      if (tried++ % kCandidatesALook == 0 && gives_up()) return Outcome::solved;
      Plan<Real> plan{};
      const Outcome outcome =
          solver.solve(workspace, batch[first + candidate], {limit, most_pivots}, plan);
      report.most_pivots = std::max(report.most_pivots, plan.pivots);
      if (outcome == Outcome::pruned) continue;
      if (outcome != Outcome::solved) {
        report.index = first + candidate;
        return outcome;
      }
      solved++;
      best.emplace_back(Real(plan.value) / top.mass[first + candidate], candidate);
      std::push_heap(best.begin(), best.end());
      if (int64_t(best.size()) > top.k) {
        std::pop_heap(best.begin(), best.end());
        best.pop_back();
      }
      if (int64_t(best.size()) < top.k) continue;
      const double worst = best.front().first;
      limit = worst + kDistanceError * std::abs(worst) + least_step;
    }
    std::sort_heap(best.begin(), best.end());
    for (int64_t k = 0; k < top.k; k++) {
      top.distance[query * top.k + k] = best[k].first;
      top.index[query * top.k + k] = best[k].second;
    }
    top.solved[query] = solved;
    return Outcome::solved;
  };
  const double nanoseconds = nanoseconds_for(batch.suppliers, batch.demanders) * top.candidates / 2;
  const int64_t queries = top.candidates > 0 ? batch.count / top.candidates : 0;
  return for_each(queries, nanoseconds, execution, select);
}

template <class Real>
Report add_grid_products(const GridProducts<Real>& grid, const Execution& execution) {
  const auto add = [&] {
    if constexpr (sizeof(Real) == sizeof(float))
      return execution.kernel.add_float_product;
    else
      return execution.kernel.add_double_product;
  }();
  const int64_t area = grid.suppliers * grid.demanders;
  // An item is one set's own gradient, so that no two threads add to the same memory and the order of
  // the sums does not hang on them; where there are few sets, it is a slice of its channels.
  const auto add_side = [&](bool transposed) {
    const int64_t sets = transposed ? grid.columns : grid.rows;
    const int64_t pairs = transposed ? grid.rows : grid.columns;
    const int64_t most_slices = std::max<int64_t>(1, grid.channels / 64);
    const int64_t slices = sets >= 4 * execution.threads || execution.threads == 1
                               ? 1
                               : std::min<int64_t>(execution.threads, most_slices);
    const int64_t width = (grid.channels + slices - 1) / slices;
    const double nanoseconds =
        pairs * (0.4 * area + 0.04 * width * (grid.suppliers + grid.demanders)) / (grid.upper ? 2 : 1);
    return for_each(sets * slices, nanoseconds, execution, [&](void*, int64_t item, Report&, const auto&) {
      const int64_t set = item / slices, channel = item % slices * width;
      FlowProduct<Real> product{};
      product.suppliers = grid.suppliers;
      product.demanders = grid.demanders;
      product.transposed = transposed;
      product.stride = grid.channels;
      product.channels = std::min(width, grid.channels - channel);
      const int64_t from = grid.upper && !transposed ? set : 0;
      const int64_t to = grid.upper && transposed ? set + 1 : pairs;
      for (int64_t other = from; other < to; other++) {
        const int64_t row = transposed ? other : set, column = transposed ? set : other;
        const int64_t before = grid.upper ? row * (row + 1) / 2 : 0;  // pairs left out up to here
        const int64_t pair = row * grid.columns + column - before;
        product.flow = grid.flow + pair * area;
        product.scale = grid.scale[pair];
        if (product.scale == 0) continue;
        if (transposed) {
          product.own = grid.right_gradient + set * grid.demanders * grid.channels + channel;
          product.others = grid.left + other * grid.suppliers * grid.channels + channel;
        } else {
          product.own = grid.left_gradient + set * grid.suppliers * grid.channels + channel;
          product.others = grid.right + other * grid.demanders * grid.channels + channel;
        }
        add(product);
      }
      return Outcome::solved;
    });
  };
  Report report;
  if (grid.left_gradient) report = add_side(false);
  if (grid.right_gradient && !report.interrupted) report = add_side(true);
  return report;
}

template Report add_grid_products(const GridProducts<float>&, const Execution&);
template Report add_grid_products(const GridProducts<double>&, const Execution&);
template Report solve_batch(const Batch<float>&, const PlanArrays<float>&, int64_t, const Execution&);
template Report solve_batch(const Batch<double>&, const PlanArrays<double>&, int64_t,
                            const Execution&);
template Report bound_batch(const Batch<float>&, float*, const Execution&);
template Report bound_batch(const Batch<double>&, double*, const Execution&);
template Report select_top_k(const Batch<float>&, const TopK<float>&, int64_t, const Execution&);
template Report select_top_k(const Batch<double>&, const TopK<double>&, int64_t, const Execution&);

}  // namespace emd
