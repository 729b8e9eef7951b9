// Work shared out among threads: pairs where there are few queries, whole queries otherwise.
#include "nearest.hpp"

#include <atomic>
#include <memory>
#include <new>

#include "threads.hpp"

namespace shortlist {

namespace {

class Workspace {
 public:
  explicit Workspace(int64_t floats)
      : memory_{static_cast<float*>(::operator new(floats * sizeof(float), kAlignment))} {}
  ~Workspace() { ::operator delete(memory_, kAlignment); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* get() const { return memory_; }

 private:
  // The query lies in front; registers that crossed its cache lines would take twice the time.
  static constexpr std::align_val_t kAlignment{64};
  float* memory_;
};

// A rough time for writing one problem; it only decides on threads.
double nanoseconds_for(const Task& task) {
  return 300 + double(task.sets.format.nodes) * task.query_nodes * task.sets.format.channels / 40;
}

// The problems of one query after another, in the same memory.
class QueryProblems {
 public:
  explicit QueryProblems(const Task& task)
      : all_{task},
        one_{task},
        area_{task.sets.format.nodes * task.query_nodes},
        memory_{new float[task.candidates * (area_ + task.sets.format.nodes + task.query_nodes + 1)]} {
    one_.cost = memory_.get();
    one_.stored_weights = one_.cost + task.candidates * area_;
    one_.query_weights = one_.stored_weights + task.candidates * task.sets.format.nodes;
    mass_ = one_.query_weights + task.candidates * task.query_nodes;
  }

  const Task& of(int64_t query) {
    one_.queries = all_.queries + query * all_.query_nodes * all_.sets.format.channels;
    one_.rows = all_.rows + query * all_.candidates;
    one_.shifts = all_.shifts ? all_.shifts + query * all_.candidates : nullptr;
    return one_;
  }

  // The best of the problems that were written; false if one has a fault.
  bool select(int64_t query, const Nearest& nearest, const Means& means) const {
    const int64_t nodes = all_.sets.format.nodes;
    for (int64_t c = 0; c < all_.candidates; c++) {
      double mass = 0;
      for (int64_t j = 0; j < nodes; j++) mass += one_.stored_weights[c * nodes + j];
      mass_[c] = float(mass);
    }
    const emd::Batch<float> batch{one_.cost,       one_.stored_weights, one_.query_weights,
                                  all_.candidates, int(nodes),          int(all_.query_nodes)};
    const emd::TopK<float> top{mass_,
                               all_.candidates,
                               nearest.k,
                               nearest.distance + query * nearest.k,
                               nearest.index + query * nearest.k,
                               nearest.solved + query};
    const emd::Execution alone{means.solver, 1, [] { return false; }};
    return emd::select_top_k(batch, top, means.most_pivots, alone).index < 0;
  }

 private:
  const Task& all_;
  Task one_;
  int64_t area_;
  std::unique_ptr<float[]> memory_;
  float* mass_;
};

}  // namespace

bool write_all(const Task& task, int64_t queries, const Kernel& writer, int threads) {
  const int64_t pairs = queries * task.candidates;
  int64_t next = 0;
  std::atomic<bool> whole{true};
  on_threads(threads_for(pairs * nanoseconds_for(task), threads), [&](int) {
    const Workspace workspace(workspace_floats(task));
    if (!writer.write(task, &next, pairs, workspace.get())) whole = false;
  });
  return whole;
}

bool find_nearest(const Task& task, int64_t queries, const Nearest& nearest, const Means& means) {
  if (queries < means.threads) {
    QueryProblems problems(task);
    for (int64_t query = 0; query < queries; query++)
      if (!write_all(problems.of(query), 1, means.writer, means.threads) || !problems.select(query, nearest, means))
        return false;
    return true;
  }
  const double nanoseconds = queries * task.candidates * nanoseconds_for(task);
  std::atomic<int64_t> next_query{0};
  std::atomic<bool> whole{true};
  on_threads(threads_for(nanoseconds, means.threads), [&](int) {
    const Workspace workspace(workspace_floats(task));
    QueryProblems problems(task);
    for (int64_t query; whole && (query = next_query++) < queries;) {
      int64_t next = 0;
      if (!means.writer.write(problems.of(query), &next, task.candidates, workspace.get()) ||
          !problems.select(query, nearest, means))
        whole = false;
    }
  });
  return whole;
}

}  // namespace shortlist
