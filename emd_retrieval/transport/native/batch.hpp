// Batches of transportation problems: the choice of the kernel, threads, and top-k selection.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "kernel.hpp"

namespace emd {

// The kernels that this CPU can run, the fastest first; never empty.
std::vector<const Kernel*> runnable_kernels();

struct Execution {
  const Kernel& kernel;
  int threads;
  // Asked on the calling thread from time to time; true stops the work.
  std::function<bool()> interrupted;
};

struct Report {
  Outcome outcome = Outcome::solved;  // of the problem at index
  int64_t index = -1;                 // the first problem that has a fault
  int64_t most_pivots = 0;            // that one problem took
  bool interrupted = false;
};

// Contiguous problems of one size.
template <class Real>
struct Batch {
  const Real* cost;
  const Real* supply;
  const Real* demand;
  int64_t count;
  int suppliers, demanders;

  Problem<Real> operator[](int64_t k) const {
    const int64_t area = int64_t{suppliers} * demanders;
    return {cost + k * area,    supply + k * suppliers, demand + k * demanders,
            cost + count * area, suppliers,              demanders};
  }
};

// Where the results of a batch go. Only value must be there; potentials come in pairs.
template <class Real>
struct PlanArrays {
  Real* value;
  Real* flow;
  Real* supply_potential;
  Real* demand_potential;
};

template <class Real>
Report solve_batch(const Batch<Real>& batch, const PlanArrays<Real>& plans, int64_t most_pivots,
                   const Execution& execution);

// The dual reduction bound on each value.
template <class Real>
Report bound_batch(const Batch<Real>& batch, Real* bound, const Execution& execution);

// Of each query's candidates the k of the lowest value by mass, ties by index. A candidate is solved
// only while its bound leaves it a chance; the result is that of solving all of them. The batch holds
// the queries' candidates one after another.
template <class Real>
struct TopK {
  const Real* mass;    // [queries, candidates], supply's total rounded to Real
  int64_t candidates;  // of each query
  int64_t k;           // at most candidates
  Real* distance;      // [queries, k], value by mass, ascending
  int64_t* index;      // [queries, k]
  int64_t* solved;     // [queries], how many were solved to the end
};

template <class Real>
Report select_top_k(const Batch<Real>& batch, const TopK<Real>& top, int64_t most_pivots,
                    const Execution& execution);

// Gradients with respect to the nodes of a grid of pairs of sets, or of the upper half of a square one,
// its diagonal included: left gets the sum over right sets of flow * scale @ their nodes, right the
// transpose. Either gradient may be null; both may be the same memory.
template <class Real>
struct GridProducts {
  const Real* flow;   // [pairs, suppliers, demanders], pairs row after row
  const Real* scale;  // [pairs]
  const Real* left;   // [rows, suppliers, channels]
  const Real* right;  // [columns, demanders, channels]
  Real* left_gradient;
  Real* right_gradient;
  int64_t rows, columns, suppliers, demanders, channels;
  bool upper;
};

template <class Real>
Report add_grid_products(const GridProducts<Real>& grid, const Execution& execution);

}  // namespace emd
