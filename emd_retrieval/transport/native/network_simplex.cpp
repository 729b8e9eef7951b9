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

template <class Real>
inline Outcome check_magnitude(double magnitude, const Totals& totals) {
  if (!(magnitude <= kMostCost<Real>)) return Outcome::cost_not_finite;  // true for NaN
  if (magnitude * totals.supply > kMostValue<Real>) return Outcome::value_overflow;
  return Outcome::solved;
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

template <int for_writing, class Real>
inline void prefetch_lines(const Real* first, ptrdiff_t count) {
  for (ptrdiff_t k = 0; k < count; k += 64 / ptrdiff_t(sizeof(Real)))
    __builtin_prefetch(first + k, for_writing, 2);
}

// ---- The simplex ------------------------------------------------------------------------------

// A set of the basis's slots: bit s of the words is slot s.
template <int count>
struct SlotSet {
  uint64_t words[count];

  static SlotSet only(int slot) {
    SlotSet set;
    for (int w = 0; w < count; w++) set.words[w] = uint64_t{slot / 64 == w} << (slot % 64);
    return set;
  }
  bool has(int slot) const { return (words[count > 1 ? slot / 64 : 0] >> (slot % 64)) & 1; }
  uint32_t half_word(int half) const { return uint32_t(words[half / 2] >> (half % 2 * 32)); }

  friend SlotSet operator~(SlotSet a) {
    for (uint64_t& word : a.words) word = ~word;
    return a;
  }
  friend SlotSet operator&(SlotSet a, const SlotSet& b) {
    for (int w = 0; w < count; w++) a.words[w] &= b.words[w];
    return a;
  }
  friend SlotSet operator|(SlotSet a, const SlotSet& b) {
    for (int w = 0; w < count; w++) a.words[w] |= b.words[w];
    return a;
  }
  friend SlotSet operator^(SlotSet a, const SlotSet& b) {
    for (int w = 0; w < count; w++) a.words[w] ^= b.words[w];
    return a;
  }
};

struct Cut {
  int slot;
  int64_t flow;
};

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
  static constexpr int kNodeVectors = kRowVectors + kColumnVectors;
  static constexpr int kSlots = kRows + kColumns - 1;
  static constexpr int kPathWords = (kSlots + 31) / 32, kSlotWords = (kSlots + 63) / 64;
  static constexpr int kCostBits = kRows > 32 && kColumns > 32 ? 24 : 25;
  // Pricing grows with the area and a pivot hardly does: in larger problems one pricing serves several.
  static constexpr int kPivotsPerPricing = kRows * kColumns <= 256 ? 1 : 4;

  using Slots = SlotSet<kSlotWords>;
  struct Ends {
    int32_t supplier, demander;
  };

  // Arcs of low reduced cost, each the lowest of its share of the columns. Bits 0-5 hold the demander,
  // bits 6-9 a quarter of the first of four suppliers, one of which is meant; the bits above are the
  // reduced cost's.
  using Candidates = Vector<int32_t, kPivotsPerPricing>;

  int suppliers_, demanders_;
  Ints cost_[kRows * kColumnVectors];
  double cost_unit_, cost_base_, lift_, unlift_;  // the first two of lifted costs
  float row_mean_[kRows];
  Ints column_mean_[kColumnVectors];
  Ints key_[kRows * kColumnVectors];
  // The basis is a spanning tree of m + n - 1 arcs, each in a slot, rooted at some node.
  alignas(64) int64_t flow_[kRows + kColumns];  // by slot; kSlots is none, and never the least
  Ends ends_[kSlots];
  Slots below_supplier_;  // the slots whose arc has its supplier below, its demander towards the root
  Ints path_[kPathWords][kNodeVectors];  // by node: the set of slots between it and the root, in words
  Ints potential_[kNodeVectors];         // by node
  int64_t supply_[kMaxNodes], demand_[kMaxNodes];
  double supply_share_[kRows], demand_share_[kColumns];  // of the total; zero on padding
  alignas(64) unsigned char staged_[kRows * kColumns * sizeof(double)];
  int64_t pivots_;

  int32_t cost(int i, int j) const {
    return reinterpret_cast<const int32_t*>(cost_)[i * kColumns + j];
  }
  // Nodes: suppliers from 0, demanders from kRows.
  int32_t& potential(int node) { return reinterpret_cast<int32_t*>(potential_)[node]; }
  int32_t potential(int node) const { return reinterpret_cast<const int32_t*>(potential_)[node]; }
  uint32_t& path_word(int word, int node) { return reinterpret_cast<uint32_t*>(path_[word])[node]; }
  Slots path(int node) const {
    Slots set{};
    for (int w = 0; w < kPathWords; w++)
      set.words[w / 2] |= uint64_t{reinterpret_cast<const uint32_t*>(path_[w])[node]} << (w % 2 * 32);
    return set;
  }

  template <class Real>
  CostRows<Real> readable_rows(const Problem<Real>& problem);
  template <class Real>
  Outcome load_costs(const Problem<Real>& problem, const Totals& totals);
  template <class Real>
  void quantise(const CostRows<Real>& costs, const CostScale<Real>& to);
  template <class Real>
  void load_weights(const Problem<Real>& problem, const Totals& totals);
  template <class Real>
  void load_shares(const Problem<Real>& problem, const Totals& totals);
  void build_first_tree();
  Candidates price(Ints* lowest_by_column) const;
  Arc arc_of(int32_t candidate) const;
  double dual_bound(const Ints* lowest_by_column) const;
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
Outcome NetworkSimplex<kRows, kColumns>::load_costs(const Problem<Real>& problem,
                                                    const Totals& totals) {
  const CostRows<Real> costs = readable_rows(problem);
  const auto range = range_of<Real, kColumns>(costs, suppliers_, demanders_);
  if (!range.finite) return Outcome::cost_not_finite;
  const double magnitude = larger(-double(range.low), double(range.high));
  const Outcome outcome = check_magnitude<Real>(magnitude, totals);
  if (outcome != Outcome::solved) return outcome;
  const double half_range = double(range.high) * 0.5 - double(range.low) * 0.5;
  constexpr double huge = sizeof(Real) == 4 ? 0x1p90 : 0x1p900;
  if (half_range == 0 || (half_range > 1 / huge && magnitude < huge)) {
    const auto to = scale_for(range.low, range.high, kCostBits);
    quantise(costs, to);
    cost_unit_ = to.unit;
    cost_base_ = to.base;
    lift_ = unlift_ = 1;
    return Outcome::solved;
  }
  // The scale would leave Real's exponents: first lift the costs to the middle of double's.
  lift_ = magnitude > 0x1p500 ? 0x1p-600 : half_range < 0x1p-500 ? 0x1p600 : 1;
  unlift_ = 1 / lift_;
  double* const lifted = reinterpret_cast<double*>(staged_);
  for (int i = 0; i < suppliers_; i++)
    for (int j = 0; j < demanders_; j++)
      lifted[i * kColumns + j] = double(problem.cost[i * demanders_ + j]) * lift_;
  const auto to = scale_for(double(range.low) * lift_, double(range.high) * lift_, kCostBits);
  quantise(CostRows<double>{lifted, kColumns}, to);
  cost_unit_ = to.unit;
  cost_base_ = to.base;
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

  int32_t leaf_of[kSlots], parent_of[kSlots];
  memset(flow_, 0, sizeof flow_);
  flow_[kSlots] = INT64_MAX;
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
      for (int k = 0; k < kColumnVectors; k++) ranks[k] = key < best[k] ? ranks[k] + 1 : ranks[k];
    }
    for (int k = 0; k < kColumnVectors; k++) store(rank + k * kLanes, ranks[k]);
    int count = 0;
    for (NodeSet rest = demanders; rest; rest &= rest - 1, count++) {
      const int j = lowest_node(rest);
      sorted[rank[j]] = keys[j];
    }

    for (int t = 0; t < count && leaf_count < m + n - 1; t++) {
      const int i = (sorted[t] >> 6) & 63, j = sorted[t] & 63;
      // Whether the supplier was used up in this round, and which of the two is used up now, are coin
      // flips that no branch predictor would get right: an arc without flow is written over by the next.
      const int64_t offered = supply_[i], wanted = demand_[j];
      const int64_t used_up = -int64_t{offered < wanted};  // all ones: the supplier
      const int64_t flow = wanted + ((offered - wanted) & used_up);
      supply_[i] = offered - flow;
      demand_[j] = wanted - flow;
      suppliers &= ~(only(i) & NodeSet(used_up));
      demanders &= ~(only(j) & ~NodeSet(used_up));
      const int either = i ^ (kRows + j);
      const int leaf = (kRows + j) ^ (either & int(used_up));
      leaf_of[leaf_count] = leaf;
      parent_of[leaf_count] = leaf ^ either;
      ends_[leaf_count] = {i, j};
      flow_[leaf_count] = flow;
      leaf_count += offered > 0;
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
  memset(path_, 0, sizeof path_);
  below_supplier_ = {};
  for (int k = leaf_count - 1; k >= 0; k--) {
    const int leaf = leaf_of[k], parent = parent_of[k];
    potential(leaf) = cost(ends_[k].supplier, ends_[k].demander) - potential(parent);
    for (int w = 0; w < kPathWords; w++) path_word(w, leaf) = path_word(w, parent);
    path_word(k / 32, leaf) |= 1u << (k % 32);
    below_supplier_.words[k / 64] |= uint64_t{leaf < kRows} << (k % 64);
  }
}

// Prices all arcs: reduced cost = cost - supplier's potential - demander's potential. Writes the lowest
// of each column; some candidate is negative if and only if one of them is.
template <int kRows, int kColumns>
auto NetworkSimplex<kRows, kColumns>::price(Ints* lowest_by_column) const -> Candidates {
  Ints best = splat(kIntMax);
  constexpr int kAtOnce = kColumnVectors < 4 ? kColumnVectors : 4;  // more would not stay in registers
  for (int from = 0; from < kColumnVectors; from += kAtOnce) {
    Ints lowest[kAtOnce], where[kAtOnce];
    for (int k = 0; k < kAtOnce; k++) {
      lowest[k] = splat(kIntMax);
      where[k] = Ints{};
    }
    for (int i = 0; i < suppliers_; i += 4) {
      const int32_t* const u = reinterpret_cast<const int32_t*>(potential_) + i;
      const Ints u0 = splat(u[0]), u1 = splat(u[1]), u2 = splat(u[2]), u3 = splat(u[3]);
      const Ints here = splat(i << 4);
      for (int k = 0; k < kAtOnce; k++) {
        const Ints* const c = cost_ + i * kColumnVectors + from + k;
        const Ints of_four = smaller(smaller(c[0] - u0, c[kColumnVectors] - u1),
                                     smaller(c[2 * kColumnVectors] - u2, c[3 * kColumnVectors] - u3));
        const Ints better = of_four < lowest[k];
        lowest[k] = smaller(of_four, lowest[k]);
        where[k] = better ? here : where[k];
      }
    }
    for (int k = 0; k < kAtOnce; k++) {
      const Ints v = potential_[kRowVectors + from + k];
      lowest_by_column[from + k] = lowest[k] - v;
      const Ints nodes = where[k] | count_from((from + k) * kLanes);
      best = smaller(best, (lowest_by_column[from + k] & ~1023) | nodes);
    }
  }
  return fold_smaller<int32_t, kLanes, kPivotsPerPricing>(best);
}

// The arc that a candidate means, with the reduced cost that it has by now.
template <int kRows, int kColumns>
Arc NetworkSimplex<kRows, kColumns>::arc_of(int32_t candidate) const {
  const int j = candidate & 63, from = (candidate >> 4) & 60;
  // Which of the four it is, no branch predictor would know: each one's number goes with its cost.
  int64_t lowest = INT64_MAX;
  for (int k = 0; k < 4; k++)
    lowest = smaller(int64_t{cost(from + k, j) - potential(from + k)} * 4 + k, lowest);
  return {from + int(lowest & 3), j, int32_t(lowest >> 2) - potential(kRows + j)};
}

// Fresh prices make the potentials feasible: lowering each demander's to its column's lowest cost
// gives a bound from below on the integer problem's optimum, per mass.
template <int kRows, int kColumns>
double NetworkSimplex<kRows, kColumns>::dual_bound(const Ints* lowest_by_column) const {
  alignas(64) int32_t feasible[kColumns];
  for (int k = 0; k < kColumnVectors; k++) {
    const Ints v = potential_[kRowVectors + k];
    store(feasible + k * kLanes, lowest_by_column[k] + v);
  }
  double sums[4] = {0, 0, 0, 0};
  for (int i = 0; i < kRows; i += 4)
    for (int k = 0; k < 4; k++) sums[k] += supply_share_[i + k] * potential(i + k);
  for (int j = 0; j < kColumns; j += 4)
    for (int k = 0; k < 4; k++) sums[k] += demand_share_[j + k] * feasible[j + k];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Brings an arc into the basis: pushes flow round its cycle until one arc on it is empty, and gives that
// arc's slot to it. No tree is walked: the paths are sets, and so is the cycle.
template <int kRows, int kColumns>
void NetworkSimplex<kRows, kColumns>::pivot(const Arc& entering) {
  // The arcs of the cycle are those on one of the two paths to the root, not on both. Suppliers and
  // demanders alternate on a path, and flow falls on the arcs below whose nodes are of the path's kind.
  const int supplier = entering.supplier, demander = kRows + entering.demander;
  const Slots from_supplier = path(supplier), from_demander = path(demander);
  const Slots cycle = from_supplier ^ from_demander;
  const Slots falls = cycle & (from_demander ^ below_supplier_);
  // The words are searched side by side: how many arcs there are is not known to a branch predictor
  // either, and one end of a loop is mistaken less often than two.
  Slots rest = falls;
  Cut least[kSlotWords];
  for (Cut& one : least) one = {kSlots, INT64_MAX};
  for (uint64_t any = 1; any;) {
    any = 0;
    for (int w = 0; w < kSlotWords; w++) {
      uint64_t& word = rest.words[w];
      const bool more = kSlotWords == 1 || word != 0;  // of a single word, some arc is left
      const int slot = more ? 64 * w + lowest_node(word) : kSlots;
      any |= word &= word - 1;
      least[w].slot = flow_[slot] < least[w].flow ? slot : least[w].slot;
      least[w].flow = smaller(flow_[slot], least[w].flow);
    }
  }
  int cut = least[0].slot;
  int64_t pushed = least[0].flow;
  for (int w = 1; w < kSlotWords; w++) {
    cut = least[w].flow < pushed ? least[w].slot : cut;
    pushed = smaller(least[w].flow, pushed);
  }

  // The nodes below the cut now reach the root through the entering arc: from there up to the arc that
  // left, its ends swap, and their paths change by the cycle.
  const Slots cut_alone = Slots::only(cut);
  const bool moves_supplier = from_supplier.has(cut);
  const bool supplier_below = below_supplier_.has(cut);
  const Slots above = path(supplier_below ? ends_[cut].supplier : kRows + ends_[cut].demander);
  const Slots turned = (moves_supplier ? from_supplier : from_demander) & ~above;
  const Slots entered = moves_supplier ? cut_alone : Slots{};
  below_supplier_ = ((below_supplier_ ^ turned) & ~cut_alone) | entered;
  ends_[cut] = {entering.supplier, entering.demander};
  const Slots others = cycle & ~cut_alone;  // the entering arc has the slot of the arc that left
  const auto change_of = [&](int w) { return int32_t(others.half_word(w)); };
  // Stores are what a pivot waits for. At 49 x 49 the last word holds one slot, which hardly ever changes.
  const bool last_changes = change_of(kPathWords - 1) != 0;
  const Ints cut_lane = splat(int32_t(1u << (cut % 32)));
  const auto move = [&](int first_vector, int nodes, int32_t shift) {
    for (int k = first_vector; k < first_vector + (nodes + kLanes - 1) / kLanes; k++) {
      const Ints moved = (path_[cut / 32][k] & cut_lane) != 0;
      potential_[k] += moved & shift;
      for (int w = 0; w < kPathWords - 1; w++) path_[w][k] ^= moved & change_of(w);
      if (last_changes) path_[kPathWords - 1][k] ^= moved & change_of(kPathWords - 1);
    }
  };
  const int32_t shift = moves_supplier ? entering.reduced_cost : -entering.reduced_cost;
  move(0, suppliers_, shift);
  move(kRowVectors, demanders_, -shift);
  for (int w = 0; w < kSlotWords; w++) {
    uint64_t changing = others.words[w], falling = falls.words[w];  // the cut keeps its flow: pushed
    const int last = smaller(suppliers_ + demanders_ - 1, 64 * (w + 1));
    for (int slot = 64 * w; slot < last; slot += kLongLanes) {
      const Longs minus = long_truth_of(falling);
      const Longs change = long_truth_of(changing) & ((minus ^ pushed) - minus);
      store(flow_ + slot, load<Longs>(flow_ + slot) + change);
      changing >>= kLongLanes;
      falling >>= kLongLanes;
    }
  }
}

// Pivots until no reduced cost is negative, or until the optimum is known to be above the limit (in
// integer costs per mass).
template <int kRows, int kColumns>
Outcome NetworkSimplex<kRows, kColumns>::improve(double limit, int64_t most_pivots) {
  Ints lowest_by_column[kColumnVectors];
  for (pivots_ = 0;;) {
    const Candidates candidates = price(lowest_by_column);
    if (minimum<int32_t, kPivotsPerPricing>(candidates) >= 0) return Outcome::solved;
    if (limit < kInfinity && dual_bound(lowest_by_column) > limit) return Outcome::pruned;
    // The other candidates may not be any by the time of their turn.
    int32_t sorted[kPivotsPerPricing];
    store(sorted, candidates);
    for (int k = 1; k < kPivotsPerPricing; k++)
      for (int l = k; l > 0; l--) {
        const int32_t one = sorted[l - 1], other = sorted[l];
        sorted[l - 1] = smaller(one, other);
        sorted[l] = larger(one, other);
      }
    for (int k = 0; k < kPivotsPerPricing && sorted[k] < 0; k++) {
      const Arc entering = arc_of(sorted[k]);
      if (entering.reduced_cost >= 0) continue;
      if (pivots_ == most_pivots) return Outcome::pivot_overrun;
      pivots_++;
      pivot(entering);
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
  double values[2] = {0, 0};
  for (int k = 0; k < m + n - 1; k++) {
    const int at = ends_[k].supplier * n + ends_[k].demander;
    const double share = double((flow_[k] + half) >> kFlowShift) * (1 / kFlowTotal);
    values[k & 1] += share * problem.cost[at];
    if (plan.flow) plan.flow[at] = Real(share * totals.supply);
  }
  plan.value = (values[0] + values[1]) * totals.supply;

  if (!plan.supply_potential) return;
  int64_t sum_of_supply_potentials = 0;
  for (int i = 0; i < m; i++) sum_of_supply_potentials += potential(i);
  double mean = double(sum_of_supply_potentials) / m;
  // A whole number of units leaves potentials that float32 holds without rounding, as far as it can.
  if (sizeof(Real) == sizeof(float)) mean = __builtin_floor(mean + 0.5);
  for (int i = 0; i < m; i++) {
    const double lifted = (potential(i) - mean) * cost_unit_;
    plan.supply_potential[i] = Real(lifted * unlift_);
  }
  for (int j = 0; j < n; j++) {
    const double lifted = cost_base_ + (potential(kRows + j) + mean) * cost_unit_;
    plan.demand_potential[j] = Real(lifted * unlift_);
  }
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
  outcome = load_costs(problem, totals);
  if (outcome != Outcome::solved) return outcome;
  load_weights(problem, totals);
  build_first_tree();
  double limit = kInfinity;
  if (limits.value_per_mass < kInfinity) {
    load_shares(problem, totals);
    // One unit for the rounding of the costs, half a unit each, the rest for that of the sums.
    const double base = cost_base_ / cost_unit_;
    limit = limits.value_per_mass * lift_ / cost_unit_ - base + 1 + 0x1p-44 * __builtin_fabs(base);
  }
  // The pivots hide the way from main memory of what comes after them.
  const ptrdiff_t area = ptrdiff_t{suppliers_} * demanders_;
  const Real* const next_cost = problem.cost + area;
  if (next_cost < problem.cost_end) prefetch_lines<0>(next_cost, area);
  if (plan.flow) prefetch_lines<1>(plan.flow, area);
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
  Outcome outcome = check_weights(problem, totals);
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
  V column_first[vectors], column_second[vectors];
  // Without their signs, numbers are ordered as their bits are, infinity and then NaN above the others.
  using Bits = TruthOf<Real>;
  using OneBits = IntOf<sizeof(Real)>;
  constexpr auto no_sign = OneBits(~uint64_t{0} >> (65 - 8 * sizeof(Real)));
  Bits magnitudes{};
  for (int k = 0; k < vectors; k++) column_first[k] = column_second[k] = V{} + Real(kInfinity);
  for (int i = 0; i < m; i++) {
    V row[vectors];
    for (int k = 0; k < vectors; k++) {
      row[k] = cost_at(i, k);
      column_first[k] = smaller(row[k], column_first[k]);
      const V inside = before<Real>(n, k * lanes) ? row[k] : V{};
      magnitudes = larger(magnitudes, reinterpret_cast<Bits>(inside) & no_sign);
    }
    row_first[i] = over_row(row);
  }
  OneBits largest = 0;
  for (int l = 0; l < lanes; l++) largest = larger(largest, OneBits(magnitudes[l]));
  Real largest_cost;
  memcpy(&largest_cost, &largest, sizeof largest_cost);
  outcome = check_magnitude<Real>(largest_cost, totals);
  if (outcome != Outcome::solved) return outcome;
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
  double rows_first = 0, columns_first = 0;
  for (int i = 0; i < m; i++) {
    const double share = problem.supply[i] / totals.supply;
    rows_first += share * row_first[i];
    columns_first += share * row_second[i] * kKeep;
  }
  for (int j = 0; j < n; j++) {
    const double share = problem.demand[j] / totals.demand;
    const double first = column_first[j / lanes][j % lanes];
    rows_first += share * column_second[j / lanes][j % lanes] * kKeep;
    columns_first += share * first;
  }
  // The value is that of weights rounded to 2^-48 of the mass each, which may be less than these give;
  // the sums here are nearer than that.
  const double rounding = double(largest_cost) * (m + n) * 0x1p-47;
  bound_per_mass = larger(rows_first, columns_first) - rounding;
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

template <class Real>
void add_flow_product(const FlowProduct<Real>& of) {
  struct Share {
    int32_t supplier, demander;
  };
  constexpr int64_t kAtOnce = 1024;
  Share shares[kAtOnce];
  int64_t count = 0;
  const auto add_shares = [&] {
    for (int64_t k = 0; k < count; k++) {
      const int64_t supplier = shares[k].supplier, demander = shares[k].demander;
      const Real share = of.flow[supplier * of.demanders + demander] * of.scale;
      Real* const to = of.own + (of.transposed ? demander : supplier) * of.stride;
      const Real* const node = of.others + (of.transposed ? supplier : demander) * of.stride;
#pragma GCC ivdep
      for (int64_t c = 0; c < of.channels; c++) to[c] += share * node[c];
    }
    count = 0;
  };
  for (int64_t i = 0; i < of.suppliers; i++)
    for (int64_t from = 0; from < of.demanders; from += kAtOnce) {
      const int64_t end = smaller(from + kAtOnce, of.demanders);
      if (count + end - from > kAtOnce) add_shares();
      // Where the flow is, is a coin flip to a branch predictor: a place without is written over by the
      // next. As bits, a flow compares in one instruction.
      for (int64_t j = from; j < end; j++) {
        IntOf<sizeof(Real)> bits;
        memcpy(&bits, of.flow + i * of.demanders + j, sizeof bits);
        shares[count] = {int32_t(i), int32_t(j)};
        count += bits != 0;
      }
    }
  add_shares();
}

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
  return Kernel{EMD_NAME, sizeof(Largest), alignof(Largest),
                solver_for<float>, solver_for<double>,
                add_flow_product<float>, add_flow_product<double>};
}();

}  // namespace emd
