// An exact solver of one balanced transportation problem of at most 64 x 64 nodes: the primal network
// simplex on integers. This file is compiled once per instruction set (EMD_LANES 32-bit lanes a
// register; EMD_KERNEL is its name), and every copy gives the same bits. batch.cpp brings the threads.
//
// Costs become int32 multiples of one unit, a power of two such that the problem's cost range fits 25
// bits (24 where both sides have more than 32 nodes: the alternating sum of costs along any path of the
// tree must stay within 2^30). Float32 costs 1 - cosine are multiples of 2^-24 within a range of 2, so up
// to 32 nodes nothing is lost. Otherwise each cost is off by at most half a unit of range / 2^24 (2^23 in
// the wide case), and the plan found is within one unit a unit of mass of the optimum; multiples of 2^-24
// in the wide case are all rounded in one direction, which halves that to 2^-24. The value is summed in
// double from the original costs: it is exactly that plan's.
//
// Weights become int64 multiples of total / 2^48, shifted left by 14 bits. In the low bits every supply
// gets demanders + 1 more, every demand 1 and the largest demand the rest, so that no proper subset of
// the nodes is balanced, zero weights included. Hence no basic flow is ever zero, each pivot lowers the
// cost and the simplex cannot cycle. Rounding the low bits off leaves the exact flow.

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernel.hpp"

#ifndef EMD_KERNEL
#define EMD_KERNEL portable
#define EMD_LANES 4
#endif
#define EMD_JOIN_(a, b) a##b
#define EMD_JOIN(a, b) EMD_JOIN_(a, b)
#define EMD_QUOTE_(a) #a
#define EMD_QUOTE(a) EMD_QUOTE_(a)

namespace emd {
namespace EMD_JOIN(on_, EMD_KERNEL) {
namespace {

#include "lanes.hpp"

using NodeSet = uint64_t;  // bit i: node i of one side

inline NodeSet only(int node) { return NodeSet{1} << node; }
inline NodeSet first_nodes(int count) { return ~NodeSet{0} >> (64 - count); }
inline int lowest_node(NodeSet set) { return __builtin_ctzll(set); }

constexpr double kInfinity = __builtin_huge_val();
constexpr int kFlowShift = 14;
constexpr double kFlowTotal = 281474976710656.0;  // 2^48
constexpr int32_t kPadCost = 1 << 30;  // no potential is larger, so padding never enters the basis

// Nodes of the tree: suppliers from 0, demanders from kMaxNodes.
constexpr int kNoNode = -1;
inline bool is_supplier(int node) { return node < kMaxNodes; }
inline int node_of_demander(int j) { return kMaxNodes + j; }

// A node of the spanning tree, with the arc to its parent.
struct TreeNode {
  int64_t flow;  // on that arc
  NodeSet suppliers, demanders;  // of the node's subtree, itself included
  int32_t parent;
};

// ---- Weights ----------------------------------------------------------------------------------

struct Totals {
  double supply, demand;
};

template <class Real>
inline double total_of(const Real* weights, int count) {
  double sums[4] = {0, 0, 0, 0};  // four chains of additions instead of one, whatever the lanes
  int i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; k++) sums[k] += double(weights[i + k]);
  for (; i < count; i++) sums[0] += double(weights[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class Real>
inline bool none_negative(const Real* weights, int count) {
  bool fine = true;
  for (int i = 0; i < count; i++) fine &= weights[i] >= 0;  // false for NaN too
  return fine;
}

template <class Real>
inline Outcome check_weights(const Problem<Real>& problem, Totals& totals) {
  totals.supply = total_of(problem.supply, problem.suppliers);
  totals.demand = total_of(problem.demand, problem.demanders);
  if (!none_negative(problem.supply, problem.suppliers) || !(totals.supply < kInfinity))
    return Outcome::supply_not_valid;
  if (!none_negative(problem.demand, problem.demanders) || !(totals.demand < kInfinity))
    return Outcome::demand_not_valid;
  if (totals.supply == 0) return Outcome::supply_zero;
  if (totals.demand == 0) return Outcome::demand_zero;
  const double larger_total = larger(totals.supply, totals.demand);
  if (__builtin_fabs(totals.supply - totals.demand) > kBalanceTolerance * larger_total)
    return Outcome::unbalanced;
  return Outcome::solved;
}

// ---- Costs ------------------------------------------------------------------------------------

// Rows of costs in memory that may be read past each row's end, to the end of its last register.
template <class Real>
struct CostRows {
  const Real* first;
  ptrdiff_t stride;
  const Real* row(int i) const { return first + i * stride; }
};

template <class Real>
struct CostRange {
  Real low, high;
  bool finite;
};

template <class Real, int kColumns>
CostRange<Real> range_of(const CostRows<Real>& costs, int rows, int columns) {
  constexpr int lanes = kLanesOf<Real>;
  using V = Reals<Real>;
  const V inside = V{} + costs.first[0];
  V low[2] = {inside, inside}, high[2] = {inside, inside}, poison[2] = {V{}, V{}};
  for (int i = 0; i < rows; i++) {
    for (int k = 0; k < kColumns / lanes; k++) {
      V x = load<V>(costs.row(i) + k * lanes);
      x = before<Real>(columns, k * lanes) ? x : inside;
      low[k & 1] = smaller(x, low[k & 1]);
      high[k & 1] = larger(x, high[k & 1]);
      poison[k & 1] += x - x;  // NaN from the first NaN or infinity on
    }
  }
  const V lows = smaller(low[0], low[1]), highs = larger(high[0], high[1]);
  const V poisons = poison[0] + poison[1];
  CostRange<Real> range{lows[0], highs[0], true};
  for (int l = 0; l < lanes; l++) {
    range.low = smaller(range.low, lows[l]);
    range.high = larger(range.high, highs[l]);
    range.finite &= poisons[l] == 0;
  }
  return range;
}

// integer cost = round((cost - offset) * scale) - lowest, and cost = base + unit * integer cost.
template <class Real>
struct CostScale {
  Real low, offset, scale;
  int32_t lowest;  // what low becomes
  double unit, base;
};

inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// The smallest e with x <= 2^e, for a normal x > 0.
inline int exponent_above(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return int(bits >> 52) - 1023 + ((bits << 12) != 0);
}

// To the nearest integer, halves up: floor(x + 1/2) without the rounding of that sum.
template <class Real>
inline IntsLike<Real> round_half_up(Reals<Real> x) {
  using I = IntsLike<Real>;
  const I whole = __builtin_convertvector(x, I);
  const Reals<Real> rest = x - __builtin_convertvector(whole, Reals<Real>);
  return whole - __builtin_convertvector(rest >= Real(0.5), I) +
         __builtin_convertvector(rest < Real(-0.5), I);
}

template <class Real>
inline CostScale<Real> scale_for(Real low, Real high, int cost_bits) {
  const double range = double(high) - double(low);
  const double magnitude = larger(-double(low), double(high));
  const int exponent = range > 0 ? cost_bits - exponent_above(range) : 0;
  CostScale<Real> to;
  to.low = low;
  // Close together and far from zero, x - low is exact (Sterbenz). Elsewhere it need not be; there the
  // lowest integer is taken off after the rounding instead.
  to.offset = magnitude > 16 * range ? low : Real(0);
  to.scale = Real(power_of_two(exponent));
  to.lowest = round_half_up<Real>(Reals<Real>{} + (low - to.offset) * to.scale)[0];
  to.unit = power_of_two(-exponent);
  to.base = double(to.offset) + to.lowest * to.unit;
  return to;
}

// ---- The simplex ------------------------------------------------------------------------------

struct Arc {
  int supplier, demander;
  int32_t reduced_cost;
};

// Solves problems of up to kRows x kColumns nodes; the object is the workspace.
template <int kRows, int kColumns>
class NetworkSimplex {
 public:
  template <class Real>
  Outcome solve(const Problem<Real>& problem, const Limits& limits, Plan<Real>& plan);
  template <class Real>
  Outcome bound(const Problem<Real>& problem, double& bound_per_mass);

 private:
  static constexpr int kRowVectors = kRows / kLanes, kColumnVectors = kColumns / kLanes;
  static constexpr int kCostBits = kRows > 32 && kColumns > 32 ? 24 : 25;
  // Pricing grows with the area and a pivot hardly does: in large problems one pricing serves several.
  static constexpr int kPivotsPerPricing =
      kRows * kColumns <= 256 ? 1 : kRows * kColumns <= 2048 ? 2 : 4;

  // The lowest reduced cost in each column, and the first of the four suppliers that hold it.
  struct Candidates {
    Ints reduced_cost[kColumnVectors];
    alignas(64) int32_t suppliers_from[kColumns];
  };

  int suppliers_, demanders_;
  Ints cost_[kRows * kColumnVectors];
  double cost_unit_, cost_base_;
  float row_mean_[kRows];
  Ints column_mean_[kColumnVectors];
  Ints key_[kRows * kColumnVectors];
  alignas(64) int32_t potential_[2 * kMaxNodes];  // by node
  TreeNode tree_[2 * kMaxNodes];
  int64_t supply_[kMaxNodes], demand_[kMaxNodes];
  double supply_share_[kRows], demand_share_[kColumns];  // of the total; zero on padding
  alignas(64) unsigned char staged_[kRows * kColumns * sizeof(double)];
  int64_t pivots_;

  int32_t cost(int i, int j) const {
    return reinterpret_cast<const int32_t*>(cost_)[i * kColumns + j];
  }

  template <class Real>
  CostRows<Real> readable_rows(const Problem<Real>& problem);
  template <class Real>
  Outcome load_costs(const Problem<Real>& problem);
  template <class Real>
  void quantise(const CostRows<Real>& costs, const CostScale<Real>& to);
  template <class Real>
  void load_weights(const Problem<Real>& problem, const Totals& totals);
  template <class Real>
  void load_shares(const Problem<Real>& problem, const Totals& totals);
  void build_first_tree();
  void price(Candidates& candidates) const;
  Arc take(Candidates& candidates, int32_t reduced_cost) const;
  double dual_bound(const Candidates& candidates) const;
  void pivot(const Arc& entering);
  Outcome improve(double limit, int64_t most_pivots);
  template <class Real>
  void write(const Problem<Real>& problem, const Totals& totals, Plan<Real>& plan) const;
};

template <int kRows, int kColumns>
template <class Real>
CostRows<Real> NetworkSimplex<kRows, kColumns>::readable_rows(const Problem<Real>& problem) {
  const ptrdiff_t stride = problem.demanders;
  if ((problem.suppliers - 1) * stride + kColumns <= problem.cost_end - problem.cost)
    return {problem.cost, stride};
  Real* const staged = reinterpret_cast<Real*>(staged_);
  for (int i = 0; i < problem.suppliers; i++)
    memcpy(staged + i * kColumns, problem.cost + i * stride, sizeof(Real) * stride);
  return {staged, kColumns};
}

template <int kRows, int kColumns>
template <class Real>
Outcome NetworkSimplex<kRows, kColumns>::load_costs(const Problem<Real>& problem) {
  const CostRows<Real> costs = readable_rows(problem);
  const auto range = range_of<Real, kColumns>(costs, suppliers_, demanders_);
  if (!range.finite) return Outcome::cost_not_finite;
  const double magnitude = larger(-double(range.low), double(range.high));
  const double half_range = double(range.high) * 0.5 - double(range.low) * 0.5;
  constexpr double huge = sizeof(Real) == 4 ? 0x1p90 : 0x1p900;
  if (half_range == 0 || (half_range > 1 / huge && magnitude < huge)) {
    const auto to = scale_for(range.low, range.high, kCostBits);
    quantise(costs, to);
    cost_unit_ = to.unit;
    cost_base_ = to.base;
    return Outcome::solved;
  }
  // The scale would leave Real's exponents: first lift the costs to the middle of double's.
  const double lift = magnitude > 0x1p500 ? 0x1p-600 : half_range < 0x1p-500 ? 0x1p600 : 1;
  double* const lifted = reinterpret_cast<double*>(staged_);
  for (int i = 0; i < suppliers_; i++)
    for (int j = 0; j < demanders_; j++)
      lifted[i * kColumns + j] = double(problem.cost[i * demanders_ + j]) * lift;
  const auto to = scale_for(double(range.low) * lift, double(range.high) * lift, kCostBits);
  quantise(CostRows<double>{lifted, kColumns}, to);
  cost_unit_ = to.unit / lift;
  cost_base_ = to.base / lift;
  return Outcome::solved;
}

template <int kRows, int kColumns>
template <class Real>
void NetworkSimplex<kRows, kColumns>::quantise(const CostRows<Real>& costs,
                                               const CostScale<Real>& to) {
  constexpr int lanes = kLanesOf<Real>;
  Unsigned column_sum[kColumnVectors];  // of up to 64 costs, which takes all 32 bits
  Ints padding[kColumnVectors];
  for (int k = 0; k < kColumnVectors; k++) {
    column_sum[k] = Unsigned{};
    padding[k] = (count_from(k * kLanes) >= demanders_) & kPadCost;
  }
  for (int i = 0; i < suppliers_; i++) {
    Ints* const row = cost_ + i * kColumnVectors;
    for (int k = 0; k < kColumns / lanes; k++) {
      Reals<Real> x = load<Reals<Real>>(costs.row(i) + k * lanes);
      x = before<Real>(demanders_, k * lanes) ? x : Reals<Real>{} + to.low;
      const auto rounded = round_half_up<Real>((x - to.offset) * to.scale);
      store(reinterpret_cast<int32_t*>(row) + k * lanes, rounded - to.lowest);
    }
    Unsigned row_sum{};
    for (int k = 0; k < kColumnVectors; k++) {
      column_sum[k] += reinterpret_cast<Unsigned>(row[k]);
      row_sum += reinterpret_cast<Unsigned>(row[k]);
      row[k] += padding[k];
    }
    row_mean_[i] = float(int32_t(sum(row_sum) >> 1)) * (2.f / demanders_);
  }
  for (int k = 0; k < kColumnVectors; k++) {
    const Ints half = reinterpret_cast<Ints>(column_sum[k] >> 1);
    const auto mean = __builtin_convertvector(half, Reals<float>) * (2.f / suppliers_);
    column_mean_[k] = __builtin_convertvector(mean, Ints);
  }
  // Pricing takes four rows at a time.
  for (int i = suppliers_; i % 4 != 0; i++)
    for (int k = 0; k < kColumnVectors; k++) cost_[i * kColumnVectors + k] = splat(kPadCost);
}

template <int kRows, int kColumns>
template <class Real>
void NetworkSimplex<kRows, kColumns>::load_weights(const Problem<Real>& problem,
                                                   const Totals& totals) {
  // Over a total near double's smallest numbers the factors would overflow.
  const double lift = totals.supply < 0x1p-900 ? 0x1p600 : 1;
  const double supply_factor = kFlowTotal / (totals.supply * lift);
  const double demand_factor = kFlowTotal / (totals.demand * lift);
  int64_t excess = 0;
  for (int i = 0; i < suppliers_; i++) {
    const auto weight = int64_t(double(problem.supply[i]) * lift * supply_factor + 0.5);
    excess += weight;
    supply_[i] = (weight << kFlowShift) + demanders_ + 1;
  }
  int largest = 0;
  for (int j = 0; j < demanders_; j++) {
    const auto weight = int64_t(double(problem.demand[j]) * lift * demand_factor + 0.5);
    excess -= weight;
    demand_[j] = (weight << kFlowShift) + 1;
    if (problem.demand[j] > problem.demand[largest]) largest = j;
  }
  demand_[largest] += excess * (int64_t{1} << kFlowShift);
  demand_[largest] += int64_t{suppliers_} * (demanders_ + 1) - demanders_;
}

template <int kRows, int kColumns>
template <class Real>
void NetworkSimplex<kRows, kColumns>::load_shares(const Problem<Real>& problem,
                                                  const Totals& totals) {
  memset(supply_share_, 0, sizeof supply_share_);
  memset(demand_share_, 0, sizeof demand_share_);
  for (int i = 0; i < suppliers_; i++) supply_share_[i] = problem.supply[i] / totals.supply;
  for (int j = 0; j < demanders_; j++) demand_share_[j] = problem.demand[j] / totals.demand;
}

// A good first basis: the greedy matrix minimum on doubly centred costs (cost - row mean - column mean),
// taken in rounds. In each round every remaining demander names its best remaining supplier, and these
// arcs are served from the best on. An arc uses up its supplier or its demander, which becomes a leaf
// below the other; a demander whose supplier was used up before its turn waits for the next round.
template <int kRows, int kColumns>
void NetworkSimplex<kRows, kColumns>::build_first_tree() {
  const int m = suppliers_, n = demanders_;
  // A key is 20 bits of centred cost, then six of the supplier and six of the demander.
  constexpr int kKeyShift = kCostBits - 18;
  Ints best[kColumnVectors], served[kColumnVectors];
  for (int k = 0; k < kColumnVectors; k++) {
    best[k] = splat(kIntMax);
    served[k] = count_from(k * kLanes) < n ? splat(-kIntMax) : splat(kIntMax);
  }
  for (int i = 0; i < m; i++) {
    const auto row_mean = int32_t(row_mean_[i]);
    for (int k = 0; k < kColumnVectors; k++) {
      const Ints centred = cost_[i * kColumnVectors + k] - (column_mean_[k] + row_mean);
      const Ints nodes = count_from(k * kLanes) + (i << 6);
      const Ints key = shift_left(centred >> kKeyShift, 12) | nodes;
      key_[i * kColumnVectors + k] = key;
      best[k] = smaller(best[k], key);
    }
  }

  for (int i = 0; i < m; i++) tree_[i] = {0, only(i), 0, kNoNode};
  for (int j = 0; j < n; j++) tree_[node_of_demander(j)] = {0, 0, only(j), kNoNode};
  struct {
    int node, parent;
    int32_t cost;
  } leaves[2 * kMaxNodes];
  int leaf_count = 0;
  NodeSet suppliers = first_nodes(m), demanders = first_nodes(n);
  while (leaf_count < m + n - 1) {
    // Counting the smaller keys sorts without a branch on their order.
    alignas(64) int32_t keys[kColumns], rank[kColumns], sorted[kColumns];
    Ints ranks[kColumnVectors];
    for (int k = 0; k < kColumnVectors; k++) {
      best[k] = larger(best[k], served[k]);
      store(keys + k * kLanes, best[k]);
      ranks[k] = Ints{};
    }
    for (NodeSet rest = demanders; rest; rest &= rest - 1) {
      const Ints key = splat(keys[lowest_node(rest)]);
      for (int k = 0; k < kColumnVectors; k++) ranks[k] -= key < best[k];
    }
    for (int k = 0; k < kColumnVectors; k++) store(rank + k * kLanes, ranks[k]);
    int count = 0;
    for (NodeSet rest = demanders; rest; rest &= rest - 1, count++) {
      const int j = lowest_node(rest);
      sorted[rank[j]] = keys[j];
    }

    for (int t = 0; t < count && leaf_count < m + n - 1; t++) {
      const int i = (sorted[t] >> 6) & 63, j = sorted[t] & 63;
      if (!(suppliers & only(i))) continue;
      // Which of the two is used up is a coin flip that no branch predictor would get right.
      const int64_t offered = supply_[i], wanted = demand_[j];
      const int64_t used_up = -int64_t{offered < wanted};  // all ones: the supplier
      const int64_t flow = wanted + ((offered - wanted) & used_up);
      supply_[i] = offered - flow;
      demand_[j] = wanted - flow;
      suppliers &= ~(only(i) & NodeSet(used_up));
      demanders &= ~(only(j) & ~NodeSet(used_up));
      const int either = i ^ node_of_demander(j);
      const int leaf = node_of_demander(j) ^ (either & int(used_up));
      const int parent = leaf ^ either;
      tree_[leaf].parent = parent;
      tree_[leaf].flow = flow;
      tree_[parent].suppliers |= tree_[leaf].suppliers;
      tree_[parent].demanders |= tree_[leaf].demanders;
      leaves[leaf_count++] = {leaf, parent, cost(i, j)};
    }

    for (int k = 0; k < kColumnVectors; k++) {
      best[k] = splat(kIntMax);
      served[k] = truth_of(demanders >> (k * kLanes)) ? splat(-kIntMax) : splat(kIntMax);
    }
    for (NodeSet rest = suppliers; rest; rest &= rest - 1) {
      const Ints* const row = key_ + lowest_node(rest) * kColumnVectors;
      for (int k = 0; k < kColumnVectors; k++) best[k] = smaller(best[k], row[k]);
    }
  }

  // The last leaf hangs below the root: backwards, every parent comes before its children.
  memset(potential_, 0, sizeof potential_);
  for (int k = leaf_count - 1; k >= 0; k--)
    potential_[leaves[k].node] = leaves[k].cost - potential_[leaves[k].parent];
}

// Prices all arcs: reduced cost = cost - supplier's potential - demander's potential.
template <int kRows, int kColumns>
void NetworkSimplex<kRows, kColumns>::price(Candidates& candidates) const {
  constexpr int kAtOnce = kColumnVectors < 4 ? kColumnVectors : 4;  // more would not stay in registers
  for (int from = 0; from < kColumnVectors; from += kAtOnce) {
    Ints lowest[kAtOnce], where[kAtOnce];
    for (int k = 0; k < kAtOnce; k++) {
      lowest[k] = splat(kIntMax);
      where[k] = Ints{};
    }
    for (int i = 0; i < suppliers_; i += 4) {
      const int32_t* const u = potential_ + i;
      const Ints u0 = splat(u[0]), u1 = splat(u[1]), u2 = splat(u[2]), u3 = splat(u[3]);
      const Ints here = splat(i);
      for (int k = 0; k < kAtOnce; k++) {
        const Ints* const c = cost_ + i * kColumnVectors + from + k;
        const Ints of_four = smaller(smaller(c[0] - u0, c[kColumnVectors] - u1),
                                     smaller(c[2 * kColumnVectors] - u2, c[3 * kColumnVectors] - u3));
        const Ints better = of_four < lowest[k];
        lowest[k] = better ? of_four : lowest[k];
        where[k] = better ? here : where[k];
      }
    }
    for (int k = 0; k < kAtOnce; k++) {
      const Ints v = load<Ints>(potential_ + node_of_demander((from + k) * kLanes));
      candidates.reduced_cost[from + k] = lowest[k] - v;
      store(candidates.suppliers_from + (from + k) * kLanes, where[k]);
    }
  }
}

// Takes the first column with that reduced cost out of the candidates and returns its best arc, with
// the reduced cost that the arc has by now.
template <int kRows, int kColumns>
Arc NetworkSimplex<kRows, kColumns>::take(Candidates& candidates, int32_t reduced_cost) const {
  NodeSet equal = 0;
  for (int k = 0; k < kColumnVectors; k++)
    equal |= bits_of(candidates.reduced_cost[k] == reduced_cost) << (k * kLanes);
  const int j = lowest_node(equal);
  if (kPivotsPerPricing > 1)
    for (int k = 0; k < kColumnVectors; k++)
      candidates.reduced_cost[k] =
          count_from(k * kLanes) == j ? splat(kIntMax) : candidates.reduced_cost[k];
  Arc best{candidates.suppliers_from[j], j, kIntMax};
  const int from = best.supplier;
  for (int i = from; i < from + 4; i++) {
    const int32_t without_v = cost(i, j) - potential_[i];
    best.supplier = without_v < best.reduced_cost ? i : best.supplier;
    best.reduced_cost = smaller(best.reduced_cost, without_v);
  }
  best.reduced_cost -= potential_[node_of_demander(j)];
  return best;
}

// Fresh candidates make the potentials feasible: lowering each demander's to its column's lowest cost
// gives a bound from below on the integer problem's optimum, per mass.
template <int kRows, int kColumns>
double NetworkSimplex<kRows, kColumns>::dual_bound(const Candidates& candidates) const {
  alignas(64) int32_t feasible[kColumns];
  for (int k = 0; k < kColumnVectors; k++) {
    const Ints v = load<Ints>(potential_ + node_of_demander(k * kLanes));
    store(feasible + k * kLanes, candidates.reduced_cost[k] + v);
  }
  double sums[4] = {0, 0, 0, 0};
  for (int i = 0; i < kRows; i += 4)
    for (int k = 0; k < 4; k++) sums[k] += supply_share_[i + k] * potential_[i + k];
  for (int j = 0; j < kColumns; j += 4)
    for (int k = 0; k < 4; k++) sums[k] += demand_share_[j + k] * feasible[j + k];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Brings an arc into the basis: pushes flow round its cycle until one arc on it is empty, cuts the tree
// there and hangs what was cut off below the other end of the entering arc.
template <int kRows, int kColumns>
void NetworkSimplex<kRows, kColumns>::pivot(const Arc& entering) {
  // The cycle: from either end up to where the paths meet. Suppliers and demanders alternate on a path,
  // and flow falls on the arcs above nodes of the kind that the path starts with.
  const int supplier = entering.supplier, demander = node_of_demander(entering.demander);
  const NodeSet demander_set = only(entering.demander);
  int path[2 * kMaxNodes];
  path[0] = demander;
  int length = 0, cut = 0;
  int64_t pushed = INT64_MAX;
  int node = supplier;
  while (!(tree_[node].demanders & demander_set)) {
    if (is_supplier(node) && tree_[node].flow < pushed) {
      pushed = tree_[node].flow;
      cut = length;
    }
    path[length++] = node;
    node = tree_[node].parent;
  }
  const int apex = node, second_path = length;
  for (node = demander; node != apex; node = tree_[node].parent) {
    if (!is_supplier(node) && tree_[node].flow < pushed) {
      pushed = tree_[node].flow;
      cut = length;
    }
    path[length++] = node;
  }
  const bool cut_above_supplier = cut < second_path;

  const NodeSet moved_suppliers = tree_[path[cut]].suppliers;
  const NodeSet moved_demanders = tree_[path[cut]].demanders;
  const int32_t shift = cut_above_supplier ? entering.reduced_cost : -entering.reduced_cost;
  const auto add = [this](int first_node, NodeSet moved, int vectors, int32_t change) {
    for (int k = 0; k < vectors; k++) {
      int32_t* const at = potential_ + first_node + k * kLanes;
      store(at, load<Ints>(at) + (truth_of(moved >> (k * kLanes)) & change));
    }
  };
  add(0, moved_suppliers, kRowVectors, shift);
  add(kMaxNodes, moved_demanders, kColumnVectors, -shift);
  for (int k = 0; k < length; k++) {
    TreeNode& on_cycle = tree_[path[k]];
    const bool falls = is_supplier(path[k]) == (k < second_path);
    on_cycle.flow += falls ? -pushed : pushed;
    // Above the cut this takes the moved subtree out, on the other path it puts it in, and below the cut
    // it leaves what the node's parent keeps when that becomes the node's child.
    on_cycle.suppliers ^= moved_suppliers;
    on_cycle.demanders ^= moved_demanders;
  }
  // From the entering arc to the cut every parent becomes a child; its arc is the one to that child.
  const int first = cut_above_supplier ? 0 : second_path;
  for (int k = cut; k > first; k--) {
    const TreeNode& child = tree_[path[k - 1]];
    tree_[path[k]] = {child.flow, child.suppliers, child.demanders, path[k - 1]};
  }
  tree_[path[first]] = {pushed, moved_suppliers, moved_demanders,
                        cut_above_supplier ? demander : supplier};
}

// Pivots until no reduced cost is negative, or until the optimum is known to be above the limit (in
// integer costs per mass).
template <int kRows, int kColumns>
Outcome NetworkSimplex<kRows, kColumns>::improve(double limit, int64_t most_pivots) {
  Candidates candidates;
  const auto lowest = [&candidates] {
    Ints all = candidates.reduced_cost[0];
    for (int k = 1; k < kColumnVectors; k++) all = smaller(all, candidates.reduced_cost[k]);
    return minimum<int32_t, kLanes>(all);
  };
  for (pivots_ = 0;;) {
    price(candidates);
    int32_t reduced_cost = lowest();
    if (reduced_cost >= 0) return Outcome::solved;
    if (limit < kInfinity && dual_bound(candidates) > limit) return Outcome::pruned;
    for (int k = 0; k < kPivotsPerPricing && reduced_cost < 0; k++) {
      const Arc entering = take(candidates, reduced_cost);
      if (entering.reduced_cost < 0) {
        if (pivots_ == most_pivots) return Outcome::pivot_overrun;
        pivots_++;
        pivot(entering);
      }
      if (k + 1 < kPivotsPerPricing) reduced_cost = lowest();
    }
  }
}

template <int kRows, int kColumns>
template <class Real>
void NetworkSimplex<kRows, kColumns>::write(const Problem<Real>& problem, const Totals& totals,
                                            Plan<Real>& plan) const {
  const int m = suppliers_, n = demanders_;
  if (plan.flow) memset(plan.flow, 0, sizeof(Real) * m * n);
  constexpr int64_t half = int64_t{1} << (kFlowShift - 1);
  const auto add_arc = [&](const TreeNode& lower_end, int i, int j, double& value) {
    const double share = double((lower_end.flow + half) >> kFlowShift) * (1 / kFlowTotal);
    value += share * problem.cost[i * n + j];
    if (plan.flow) plan.flow[i * n + j] = Real(share * totals.supply);
  };
  double values[2] = {0, 0};
  for (int i = 0; i < m; i++) {
    const TreeNode& node = tree_[i];
    if (node.parent != kNoNode) add_arc(node, i, node.parent - kMaxNodes, values[0]);
  }
  for (int j = 0; j < n; j++) {
    const TreeNode& node = tree_[node_of_demander(j)];
    if (node.parent != kNoNode) add_arc(node, node.parent, j, values[1]);
  }
  plan.value = (values[0] + values[1]) * totals.supply;

  if (!plan.supply_potential) return;
  int64_t sum_of_supply_potentials = 0;
  for (int i = 0; i < m; i++) sum_of_supply_potentials += potential_[i];
  double mean = double(sum_of_supply_potentials) / m;
  // A whole number of units leaves potentials that float32 holds without rounding, as far as it can.
  if (sizeof(Real) == sizeof(float)) mean = __builtin_floor(mean + 0.5);
  for (int i = 0; i < m; i++) plan.supply_potential[i] = Real((potential_[i] - mean) * cost_unit_);
  for (int j = 0; j < n; j++)
    plan.demand_potential[j] =
        Real(cost_base_ + (potential_[node_of_demander(j)] + mean) * cost_unit_);
}

template <int kRows, int kColumns>
template <class Real>
Outcome NetworkSimplex<kRows, kColumns>::solve(const Problem<Real>& problem, const Limits& limits,
                                               Plan<Real>& plan) {
  Totals totals;
  Outcome outcome = check_weights(problem, totals);
  if (outcome != Outcome::solved) return outcome;
  suppliers_ = problem.suppliers;
  demanders_ = problem.demanders;
  outcome = load_costs(problem);
  if (outcome != Outcome::solved) return outcome;
  load_weights(problem, totals);
  build_first_tree();
  double limit = kInfinity;
  if (limits.value_per_mass < kInfinity) {
    load_shares(problem, totals);
    // One unit for the rounding of the costs, half a unit each, the rest for that of the sums.
    const double base = cost_base_ / cost_unit_;
    limit = limits.value_per_mass / cost_unit_ - base + 1 + 0x1p-44 * __builtin_fabs(base);
  }
  outcome = improve(limit, limits.pivots);
  plan.pivots = pivots_;
  if (outcome == Outcome::solved) write(problem, totals, plan);
  return outcome;
}

// The bound by row and column reduction: u_i = min_j c_ij, then v_j = min_i (c_ij - u_i); or columns
// first; whichever is better. v is rounded, hence the slack.
template <int kRows, int kColumns>
template <class Real>
Outcome NetworkSimplex<kRows, kColumns>::bound(const Problem<Real>& problem,
                                               double& bound_per_mass) {
  constexpr int lanes = kLanesOf<Real>, vectors = kColumns / lanes;
  using V = Reals<Real>;
  Totals totals;
  const Outcome outcome = check_weights(problem, totals);
  if (outcome != Outcome::solved) return outcome;
  const int m = problem.suppliers, n = problem.demanders;
  const CostRows<Real> costs = readable_rows(problem);
  const auto cost_at = [&](int i, int k) {
    const V x = load<V>(costs.row(i) + k * lanes);
    return before<Real>(n, k * lanes) ? x : V{} + Real(kInfinity);
  };
  const auto over_row = [](const V* row) {
    V all = row[0];
    for (int k = 1; k < vectors; k++) all = smaller(all, row[k]);
    return minimum<Real, lanes>(all);
  };
  Real row_first[kRows], row_second[kRows];
  V column_first[vectors], column_second[vectors], poison{};
  for (int k = 0; k < vectors; k++) column_first[k] = column_second[k] = V{} + Real(kInfinity);
  for (int i = 0; i < m; i++) {
    V row[vectors];
    for (int k = 0; k < vectors; k++) {
      row[k] = cost_at(i, k);
      column_first[k] = smaller(row[k], column_first[k]);
      poison += before<Real>(n, k * lanes) ? row[k] - row[k] : V{};
    }
    row_first[i] = over_row(row);
  }
  for (int l = 0; l < lanes; l++)
    if (!(poison[l] == 0)) return Outcome::cost_not_finite;
  for (int k = 0; k < vectors; k++)  // infinity less infinity would not stay out of a minimum
    column_first[k] = before<Real>(n, k * lanes) ? column_first[k] : V{};
  for (int i = 0; i < m; i++) {
    V row[vectors];
    for (int k = 0; k < vectors; k++) {
      row[k] = cost_at(i, k);
      column_second[k] = smaller(row[k] - row_first[i], column_second[k]);
      row[k] -= column_first[k];
    }
    row_second[i] = over_row(row);
  }

  // One side is exact, the other not negative and rounded once: take more off than that can be.
  constexpr double kKeep = 1 - (sizeof(Real) == sizeof(float) ? 0x1p-22 : 0x1p-50);
  double rows_first = 0, columns_first = 0, magnitude = 0;
  for (int i = 0; i < m; i++) {
    const double share = problem.supply[i] / totals.supply;
    rows_first += share * row_first[i];
    columns_first += share * row_second[i] * kKeep;
    magnitude += share * __builtin_fabs(double(row_first[i]));
  }
  for (int j = 0; j < n; j++) {
    const double share = problem.demand[j] / totals.demand;
    const double first = column_first[j / lanes][j % lanes];
    rows_first += share * column_second[j / lanes][j % lanes] * kKeep;
    columns_first += share * first;
    magnitude += share * __builtin_fabs(first);
  }
  bound_per_mass = larger(rows_first, columns_first) - magnitude * 0x1p-44;
  // Differences of the largest numbers may be infinite: no bound then.
  if (!(bound_per_mass < kInfinity)) bound_per_mass = -kInfinity;
  return Outcome::solved;
}

// ---- The kernel -------------------------------------------------------------------------------

template <class Real, int kRows, int kColumns>
constexpr Solver<Real> solver_of_size() {
  using Simplex = NetworkSimplex<kRows, kColumns>;
  return {[](void* workspace, const Problem<Real>& problem, const Limits& limits, Plan<Real>& plan) {
            return static_cast<Simplex*>(workspace)->solve(problem, limits, plan);
          },
          [](void* workspace, const Problem<Real>& problem, double& bound_per_mass) {
            return static_cast<Simplex*>(workspace)->bound(problem, bound_per_mass);
          }};
}

template <class Real, int kRows>
Solver<Real> solver_of_rows(int demanders) {
  return demanders <= 16   ? solver_of_size<Real, kRows, 16>()
         : demanders <= 32 ? solver_of_size<Real, kRows, 32>()
                           : solver_of_size<Real, kRows, 64>();
}

template <class Real>
Solver<Real> solver_for(int suppliers, int demanders) {
  return suppliers <= 16   ? solver_of_rows<Real, 16>(demanders)
         : suppliers <= 32 ? solver_of_rows<Real, 32>(demanders)
                           : solver_of_rows<Real, 64>(demanders);
}

using Largest = NetworkSimplex<kMaxNodes, kMaxNodes>;

}  // namespace
}  // namespace EMD_JOIN(on_, EMD_KERNEL)

#ifdef EMD_X86_KERNELS
#define EMD_NAME "x86-64-" EMD_QUOTE(EMD_KERNEL)
#else
#define EMD_NAME EMD_QUOTE(EMD_KERNEL)
#endif

extern const Kernel EMD_JOIN(kernel_, EMD_KERNEL);
const Kernel EMD_JOIN(kernel_, EMD_KERNEL) = [] {
  using namespace EMD_JOIN(on_, EMD_KERNEL);
  return Kernel{EMD_NAME, sizeof(Largest), alignof(Largest), solver_for<float>, solver_for<double>};
}();

}  // namespace emd
