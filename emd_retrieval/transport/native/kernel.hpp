// What the solver of one problem and the code that feeds it batches agree on.
// Plain types and function pointers only: the solver is compiled once per instruction set, and code that
// the linker may merge between those copies (an inline std function, say) could then run on a CPU
// that lacks its instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emd {

constexpr int kMaxNodes = 64;  // a side: a set of nodes fits in one 64-bit word

// The largest size of a cost: potentials are sums of a few of them, and Real must hold those too.
template <class Real>
constexpr double kMostCost = sizeof(Real) == sizeof(float) ? 0x1p125 : 0x1p1021;
// The largest cost x mass: a value that Real holds, with room for its rounding.
template <class Real>
constexpr double kMostValue = sizeof(Real) == sizeof(float) ? 0x1.ffp127 : 0x1.ffp1023;

// Relative difference of the two totals that still counts as rounding.
constexpr double kBalanceTolerance = 1e-4;

enum class Outcome : int32_t {
  solved,
  pruned,  // the optimum is above the limit that the caller gave
  cost_not_finite,  // or above kMostCost
  value_overflow,   // cost x mass is above kMostValue
  supply_not_valid,  // a weight is negative, NaN or infinite
  demand_not_valid,
  supply_zero,  // in total
  demand_zero,
  unbalanced,
  pivot_overrun,
};

// min sum(flow * cost) with row sums supply, column sums demand and flow >= 0 (Equation 1).
template <class Real>
struct Problem {
  const Real* cost;      // [suppliers, demanders]
  const Real* supply;    // [suppliers]
  const Real* demand;    // [demanders]; scaled to supply's total
  const Real* cost_end;  // memory is readable from cost to here, which may be past this problem
  int suppliers;
  int demanders;
};

template <class Real>
struct Plan {
  Real* flow;              // [suppliers, demanders], or null where it is not wanted
  Real* supply_potential;  // [suppliers], or null together with the next
  Real* demand_potential;  // [demanders]
  double value;            // in units of cost x mass
  int64_t pivots;
};

struct Limits {
  double value_per_mass;  // give up once the optimum is known to be above this; infinity: never
  int64_t pivots;         // one more is an overrun
};

// The two entry points for problems of one size. A workspace serves one call at a time.
template <class Real>
struct Solver {
  Outcome (*solve)(void* workspace, const Problem<Real>&, const Limits&, Plan<Real>&);
  // The dual reduction bound on the value per mass, from below even after rounding.
  Outcome (*bound)(void* workspace, const Problem<Real>&, double& bound_per_mass);
};

// Of the gradient with respect to nodes: own += flow * scale @ others, or its transpose, for one pair of
// sets. A flow is mostly zeros (a basis has suppliers + demanders - 1 arcs), which are passed over.
template <class Real>
struct FlowProduct {
  const Real* flow;  // [suppliers, demanders]
  int64_t suppliers, demanders;
  Real scale;
  bool transposed;     // own is the demanders' side
  const Real* others;  // nodes of the other side, a row every stride
  Real* own;           // nodes of its own side
  int64_t channels, stride;
};

// What is compiled for one instruction set.
struct Kernel {
  const char* instruction_set;
  size_t workspace_bytes;
  size_t workspace_alignment;
  Solver<float> (*float_solver)(int suppliers, int demanders);
  Solver<double> (*double_solver)(int suppliers, int demanders);
  void (*add_float_product)(const FlowProduct<float>&);
  void (*add_double_product)(const FlowProduct<double>&);
};

#ifdef EMD_X86_KERNELS
extern const Kernel kernel_v2, kernel_v3, kernel_v4;
#else
extern const Kernel kernel_portable;
#endif

}  // namespace emd
