// Exact transportation problems on an NVIDIA GPU: a primal network simplex, one warp a problem.
// NVRTC compiles this file at run time and the tests compile it for the host under a warp emulator,
// so it includes nothing. Memory, streams, the choice of a variant and the words of a fault are
// Python's; so are the macros WARPS_PER_BLOCK, PIVOT_LIMIT and BALANCE_TOLERANCE (kernel.py).
//
// A problem has rows (suppliers) and columns (demanders), up to 64 each. Lane l of the warp owns
// the tree nodes "row l" and "column l" (and l + 32: a second tile) and holds its columns' costs in
// registers. A basis is a spanning tree; every node knows its parent, the flow on the arc to it,
// and the sets of rows and columns below it as bits. The nodes on the tree path between two nodes
// are then those that have exactly one of the two below, and a pivot needs no walk along the tree.
//
// Costs become integers, cost = low + unit * integer with unit a power of two, so pricing needs no
// tolerance. Every potential and reduced cost is an alternating sum of at most min(rows, columns) +
// 1 costs a sign, hence LIMIT = (2^31 - 1) / (min(rows, columns) + 1) keeps all of them in 32 bits.
// The integers use at least half of LIMIT; a rounded cost is therefore off by at most range / LIMIT
// (2^-26 of the cost range at 25 nodes, 2^-24.9 at 64), and the value, summed in double from the
// original costs, is within twice that per unit of mass of the optimum. 1 - cosine in float32, a
// multiple of 2^-24 in [0, 2], is kept without loss up to 62 nodes.
//
// Flows are integers with a total of 2^48, shifted by 14 bits that hold a perturbation under which
// no basis is degenerate: no pivot moves nothing, nothing cycles, and dropping the low bits is
// exact.

#ifndef WARP_EMULATOR
// A word of shared memory. The emulator puts a type here that reports races between lanes.
template <class T>
using Cell = T;
#endif

namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int LANES = 32;
constexpr int PERTURBATION_BITS = 14;
constexpr double TOTAL_FLOW = 281474976710656.0;  // 2^48
constexpr int INT_LIMIT = 0x7fffffff;
constexpr int NEVER = 0x40000000;  // above every cost; NEVER + (NEVER - 1) still fits
constexpr int INDEX_MASK = 63;
constexpr int NO_NODE = -1;

// The launcher words these numbers.
enum Fault {
  NO_FAULT = 0,
  COST_NOT_FINITE = 1,
  SUPPLY_NOT_VALID = 2,
  DEMAND_NOT_VALID = 3,
  SUPPLY_IS_ZERO = 4,
  DEMAND_IS_ZERO = 5,
  TOTALS_DIFFER = 6,
  VALUE_OVERFLOWS = 7,
  TOO_MANY_PIVOTS = 8,
};

template <int TILES>
struct NodeSetOf {
  using Type = unsigned;
};
template <>
struct NodeSetOf<2> {
  using Type = unsigned long long;
};

__device__ __forceinline__ int lowest(unsigned set) { return __ffs(set) - 1; }
__device__ __forceinline__ int lowest(unsigned long long set) { return __ffsll(set) - 1; }
__device__ __forceinline__ int count(unsigned set) { return __popc(set); }
__device__ __forceinline__ int count(unsigned long long set) { return __popcll(set); }

template <class Set>
__device__ __forceinline__ bool contains(Set set, int index) {
  return (set >> index) & 1;
}

// The set of nodes of one side whose flag is up, out of one flag a tile and lane.
template <int TILES>
__device__ __forceinline__ typename NodeSetOf<TILES>::Type vote(const bool (&flag)[TILES]) {
  typename NodeSetOf<TILES>::Type set = __ballot_sync(ALL_LANES, flag[0]);
  if constexpr (TILES == 2) {
    set |= static_cast<unsigned long long>(__ballot_sync(ALL_LANES, flag[1])) << LANES;
  }
  return set;
}

// The value that belongs to node `index`, the same index on every lane.
template <class T, int TILES>
__device__ __forceinline__ T value_of(const T (&value)[TILES], int index) {
  T mine = value[0];
  if constexpr (TILES == 2) {
    if (index >= LANES) mine = value[1];
  }
  return __shfl_sync(ALL_LANES, mine, index & (LANES - 1));
}

template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(ALL_LANES, value, offset));
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

// The smallest of 64-bit values below 2^63, by two 32-bit reductions.
__device__ __forceinline__ unsigned long long warp_min(unsigned long long value) {
  const unsigned high = static_cast<unsigned>(value >> 32);
  const unsigned least_high = __reduce_min_sync(ALL_LANES, high);
  const unsigned low = high == least_high ? static_cast<unsigned>(value) : ~0u;
  const unsigned least_low = __reduce_min_sync(ALL_LANES, low);
  return static_cast<unsigned long long>(least_high) << 32 | least_low;
}

// A node of the basis tree. Rows have column parents and columns row parents.
template <class RowSet, class ColumnSet>
struct Node {
  int parent;         // number of the parent, NO_NODE at the root
  int potential;      // dual, in units of cost
  long long flow;     // on the arc to the parent; before there is one, the mass still to be placed
  RowSet rows;        // below this node, itself included
  ColumnSet columns;  // likewise
};

// The shared memory of one warp. Node numbers: rows from 0, columns from ROW_SLOTS.
template <int ROW_CAPACITY, int COLUMN_TILES>
struct Workspace {
  static constexpr int ROW_TILES = (ROW_CAPACITY + LANES - 1) / LANES;
  static constexpr int ROW_SLOTS = ROW_TILES * LANES;
  static constexpr int NODES = ROW_SLOTS + COLUMN_TILES * LANES;
  static constexpr int STRIDE = COLUMN_TILES * LANES + 1;  // odd: a column touches every bank once
  using RowSet = typename NodeSetOf<ROW_TILES>::Type;
  using ColumnSet = typename NodeSetOf<COLUMN_TILES>::Type;

  alignas(16) Cell<int> bias[ROW_CAPACITY];  // what pricing adds to each row's costs
  Cell<int> cost[ROW_CAPACITY * STRIDE];
  Cell<int> proposal[ROW_SLOTS];  // best key that a column offered each row
  Cell<int> potential[NODES];
  Cell<int> child[NODES];  // mail: a node on the path hands these four to its parent
  Cell<long long> flow[NODES];
  Cell<RowSet> rows[NODES];
  Cell<ColumnSet> columns[NODES];
};

template <class Real, int ROW_CAPACITY, int COLUMN_TILES>
struct WarpSimplex {
  using Shared = Workspace<ROW_CAPACITY, COLUMN_TILES>;
  using RowSet = typename Shared::RowSet;
  using ColumnSet = typename Shared::ColumnSet;
  static constexpr int ROW_TILES = Shared::ROW_TILES;
  static constexpr int ROW_SLOTS = Shared::ROW_SLOTS;
  static constexpr int STRIDE = Shared::STRIDE;

  Shared& shared;
  const int rows, columns, lane;
  Node<RowSet, ColumnSet> row[ROW_TILES], column[COLUMN_TILES];
  int cost[COLUMN_TILES][ROW_CAPACITY];  // keys of the start basis first, then the integer costs
  double low, total;                     // the least cost; total mass of the supply
  double magnitude;                      // the largest cost without its sign
  int unit_exponent;                     // cost = low + integer * 2^unit_exponent

  __device__ __forceinline__ WarpSimplex(Shared& workspace, int row_count, int column_count)
      : shared(workspace), rows(row_count), columns(column_count), lane(threadIdx.x % LANES) {}

  __device__ __forceinline__ int at(int tile) const { return lane + tile * LANES; }
  __device__ __forceinline__ bool is_row(int tile) const { return at(tile) < rows; }
  __device__ __forceinline__ bool is_column(int tile) const { return at(tile) < columns; }

  // Original costs to integers in shared memory.
  __device__ __forceinline__ Fault load_costs(const Real* costs) {
    Real least = costs[0], most = least;
    bool finite = true;
    for (int t = 0; t < COLUMN_TILES; ++t) {
      if (!is_column(t)) continue;
#pragma unroll 8
      for (int i = 0; i < rows; ++i) {
        const Real x = costs[i * columns + at(t)];
        finite = finite && isfinite(x);
        least = fmin(least, x);
        most = fmax(most, x);
      }
    }
    if (!__all_sync(ALL_LANES, finite)) return COST_NOT_FINITE;
    low = warp_reduce(least, [](Real a, Real b) { return fmin(a, b); });
    // Half the range, because the whole of it may be near the largest double.
    const double half_low = 0.5 * low;
    const double high = warp_reduce(most, [](Real a, Real b) { return fmax(a, b); });
    const double half_range = 0.5 * high - half_low;
    magnitude = fmax(-low, high);
    // Potentials are sums of a few costs, and Real must hold those too.
    if (magnitude > (sizeof(Real) == sizeof(float) ? 0x1p125 : 0x1p1021)) return COST_NOT_FINITE;

    const int limit = min(INT_LIMIT / (min(rows, columns) + 1), NEVER / 2);
    int shift = 0;
    if (half_range > 0) {
      int exponent;
      frexp(half_range, &exponent);
      shift = LANES - __clz(limit) - exponent;
      if (ldexp(half_range, shift) > limit) --shift;
    }
    unit_exponent = 1 - shift;
    // Two factors, because 2^shift exceeds every double where the range is nearly the smallest.
    const double scale = ldexp(1.0, min(shift, 1000)), boost = ldexp(1.0, max(shift - 1000, 0));
    for (int t = 0; t < COLUMN_TILES; ++t) {
      if (!is_column(t)) continue;
#pragma unroll 8
      for (int i = 0; i < rows; ++i) {
        const double x = 0.5 * costs[i * columns + at(t)] - half_low;
        shared.cost[i * STRIDE + at(t)] = __double2int_rn(x * scale * boost);
      }
    }
    return NO_FAULT;
  }

  // Weights to perturbed integer masses in the nodes, both sides of one total.
  __device__ __forceinline__ Fault load_weights(const Real* supply, const Real* demand) {
    double row_weight[ROW_TILES], column_weight[COLUMN_TILES];
    bool row_valid = true, column_valid = true;
    double supply_sum = 0, demand_sum = 0;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      row_weight[t] = is_row(t) ? supply[at(t)] : 0;
      row_valid = row_valid && row_weight[t] >= 0;
      supply_sum += row_weight[t];
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      column_weight[t] = is_column(t) ? demand[at(t)] : 0;
      column_valid = column_valid && column_weight[t] >= 0;
      demand_sum += column_weight[t];
    }
    supply_sum = warp_sum(supply_sum);
    demand_sum = warp_sum(demand_sum);
    if (!__all_sync(ALL_LANES, row_valid) || !isfinite(supply_sum)) return SUPPLY_NOT_VALID;
    if (!__all_sync(ALL_LANES, column_valid) || !isfinite(demand_sum)) return DEMAND_NOT_VALID;
    if (supply_sum == 0) return SUPPLY_IS_ZERO;
    if (demand_sum == 0) return DEMAND_IS_ZERO;
    if (fabs(supply_sum - demand_sum) > BALANCE_TOLERANCE * fmax(supply_sum, demand_sum)) {
      return TOTALS_DIFFER;
    }
    total = supply_sum;
    // Below what Real holds by as much as the rounding of sums may take.
    const double most_value = sizeof(Real) == sizeof(float) ? 0x1.ffp127 : 0x1.ffp1023;
    if (!(magnitude * total <= most_value)) return VALUE_OVERFLOWS;

    // No set of rows balances a set of columns without the largest demand: the perturbations of a
    // rows and b columns, a * (columns + 1) and b, differ by less than 2^14 and never by nothing.
    long long surplus = 0, largest = 0;
    bool is_largest[COLUMN_TILES];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      const long long mass = __double2ll_rn(row_weight[t] / supply_sum * TOTAL_FLOW);
      surplus += mass;
      row[t].flow = (mass << PERTURBATION_BITS) + columns + 1;
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      const long long mass = __double2ll_rn(column_weight[t] / demand_sum * TOTAL_FLOW);
      surplus -= mass;
      largest = max(largest, mass);
      column[t].flow = (mass << PERTURBATION_BITS) + 1;
    }
    surplus = warp_sum(surplus);
    largest = warp_reduce(largest, [](long long a, long long b) { return max(a, b); });
    largest = (largest << PERTURBATION_BITS) + 1;
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) is_largest[t] = column[t].flow == largest;
    const int taker = lowest(vote(is_largest));
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      if (at(t) == taker) {
        column[t].flow += surplus * (1 << PERTURBATION_BITS) + rows * (columns + 1) - columns;
      }
    }
    return NO_FAULT;
  }

  // The least of cost + bias in each of this lane's columns.
  __device__ __forceinline__ void price(int (&least)[COLUMN_TILES]) const {
    int chain[COLUMN_TILES][4];  // four chains, to hide the latency of one
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
#pragma unroll
      for (int k = 0; k < 4; ++k) chain[t][k] = INT_LIMIT;
    }
#pragma unroll
    for (int i = 0; i < ROW_CAPACITY; ++i) {
      const int bias = shared.bias[i];
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; ++t) {
        chain[t][i % 4] = __viaddmin_s32(cost[t][i], bias, chain[t][i % 4]);
      }
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      least[t] = min(min(chain[t][0], chain[t][1]), min(chain[t][2], chain[t][3]));
    }
  }

  // Rows past the last must never win: their costs are NEVER and so is, less one, their bias.
  __device__ __forceinline__ void set_bias(int tile, int bias) {
    if (at(tile) < ROW_CAPACITY) shared.bias[at(tile)] = is_row(tile) ? bias : NEVER - 1;
  }

  __device__ __forceinline__ int arc_cost_of_row(int tile) const {
    return shared.cost[at(tile) * STRIDE + row[tile].parent - ROW_SLOTS];
  }
  __device__ __forceinline__ int arc_cost_of_column(int tile) const {
    return shared.cost[column[tile].parent * STRIDE + at(tile)];
  }

  // Registers hold, for the start basis, cost less the row's mean with the row's index in the low
  // bits. Returns the mean of each of this lane's columns.
  __device__ __forceinline__ void load_keys(int (&column_mean)[COLUMN_TILES]) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      int sum = 0;
      if (is_row(t)) {
#pragma unroll 4
        for (int j = 0; j < columns; ++j) sum += shared.cost[at(t) * STRIDE + j] >> 6;
      }
      set_bias(t, __float2int_rn(sum * (64.0f / columns)));
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      int sum = 0;
#pragma unroll
      for (int i = 0; i < ROW_CAPACITY; ++i) {
        cost[t][i] = i < rows ? 0 : NEVER;
        if (i < rows && is_column(t)) {
          const int x = shared.cost[i * STRIDE + at(t)];
          sum += x >> 6;
          cost[t][i] = ((x - shared.bias[i]) & ~INDEX_MASK) | i;
        }
      }
      column_mean[t] = __float2int_rn(sum * (64.0f / rows));
    }
    __syncwarp();
  }

  // A spanning tree by the greedy rule on doubly centred costs, many arcs at a time. In a round
  // every column left proposes to its best row left and every row takes its best proposal. Of each
  // such pair the lighter node ships all it has to the other, which becomes its parent, and is out.
  __device__ __forceinline__ void choose_start_basis() {
    int column_mean[COLUMN_TILES];
    load_keys(column_mean);
    RowSet rows_left = ~RowSet(0) >> (ROW_SLOTS - rows);
    ColumnSet columns_left = ~ColumnSet(0) >> (COLUMN_TILES * LANES - columns);
    int row_round[ROW_TILES], column_round[COLUMN_TILES];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      row[t].rows = is_row(t) ? RowSet(1) << at(t) : 0;
      row[t].columns = 0;
      row[t].parent = row_round[t] = NO_NODE;
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      column[t].rows = 0;
      column[t].columns = is_column(t) ? ColumnSet(1) << at(t) : 0;
      column[t].parent = column_round[t] = NO_NODE;
    }

    int round = 0;
    for (; count(rows_left) > 1 && count(columns_left) > 1; ++round) {
      bool row_stays[ROW_TILES], column_stays[COLUMN_TILES];
      int key[COLUMN_TILES], choice[COLUMN_TILES];
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) {
        row_stays[t] = contains(rows_left, at(t));
        set_bias(t, row_stays[t] ? 0 : NEVER);
        shared.proposal[at(t)] = INT_LIMIT;
        post(at(t), row[t]);
      }
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; ++t) {
        column_stays[t] = contains(columns_left, at(t));
        post(ROW_SLOTS + at(t), column[t]);
      }
      __syncwarp();
      price(choice);
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; ++t) {
        key[t] = ((choice[t] - column_mean[t]) & ~INDEX_MASK) | at(t);
        choice[t] &= INDEX_MASK;
        if (column_stays[t]) atomicMin(&shared.proposal[choice[t]], key[t]);
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; ++t) {
        if (!column_stays[t] || shared.proposal[choice[t]] != key[t]) continue;
        column_stays[t] = outweighs(column[t], choice[t]);
        if (!column_stays[t]) column_round[t] = round;
      }
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) {
        const int proposal = shared.proposal[at(t)];
        if (!row_stays[t] || proposal == INT_LIMIT) continue;
        row_stays[t] = outweighs(row[t], ROW_SLOTS + (proposal & INDEX_MASK));
        if (!row_stays[t]) row_round[t] = round;
      }
      rows_left = vote(row_stays);
      columns_left = vote(column_stays);
      __syncwarp();
    }

    // One node of a side is left: it is the root, and what the other side has left hangs below it.
    const bool root_is_row = count(rows_left) == 1;
    const int root = root_is_row ? lowest(rows_left) : ROW_SLOTS + lowest(columns_left);
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      if (!contains(rows_left, at(t)) || at(t) == root) continue;
      row[t].parent = root;
      row_round[t] = round;
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      if (!contains(columns_left, at(t)) || ROW_SLOTS + at(t) == root) continue;
      column[t].parent = root;
      column_round[t] = round;
    }
    set_potentials(root, round, row_round, column_round);
  }

  // What the partner of a node needs to know of it.
  __device__ __forceinline__ void post(int number, const Node<RowSet, ColumnSet>& node) {
    shared.flow[number] = node.flow;
    shared.rows[number] = node.rows;
    shared.columns[number] = node.columns;
  }

  // One side of a pair of the start basis: false if this node hangs below its partner from now on.
  // Both lanes of a pair decide by the same numbers, and the masses of a pair are never equal.
  __device__ __forceinline__ bool outweighs(Node<RowSet, ColumnSet>& node, int partner) {
    const long long mass = shared.flow[partner];
    if (node.flow < mass) {
      node.parent = partner;
      return false;
    }
    node.flow -= mass;
    node.rows |= shared.rows[partner];
    node.columns |= shared.columns[partner];
    return true;
  }

  // Potentials from the root down: whatever left in an earlier round hangs below what left later.
  __device__ __forceinline__ void set_potentials(
      int root, int last_round, const int (&row_round)[ROW_TILES],
      const int (&column_round)[COLUMN_TILES]) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      row[t].potential = 0;
      if (at(t) != root) continue;
      row[t].rows = ~RowSet(0);
      row[t].columns = ~ColumnSet(0);
      shared.potential[root] = 0;
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      column[t].potential = 0;
      if (ROW_SLOTS + at(t) != root) continue;
      column[t].rows = ~RowSet(0);
      column[t].columns = ~ColumnSet(0);
      shared.potential[root] = 0;
    }
    __syncwarp();
    for (int round = last_round; round >= 0; --round) {
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) {
        if (row_round[t] != round) continue;
        row[t].potential = arc_cost_of_row(t) - shared.potential[row[t].parent];
        shared.potential[at(t)] = row[t].potential;
      }
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; ++t) {
        if (column_round[t] != round) continue;
        column[t].potential = arc_cost_of_column(t) - shared.potential[column[t].parent];
        shared.potential[ROW_SLOTS + at(t)] = column[t].potential;
      }
      __syncwarp();
    }
  }

  // Dantzig's rule: the arc of the most negative reduced cost enters, until there is none.
  __device__ __forceinline__ Fault pivot_to_optimum() {
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
#pragma unroll
      for (int i = 0; i < ROW_CAPACITY; ++i) {
        cost[t][i] = i < rows ? 0 : NEVER;
        if (i < rows && is_column(t)) cost[t][i] = shared.cost[i * STRIDE + at(t)];
      }
    }
    for (int pivots = 0; pivots < PIVOT_LIMIT; ++pivots) {
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) set_bias(t, -row[t].potential);
      __syncwarp();
      int reduced[COLUMN_TILES], potential[COLUMN_TILES];
      price(reduced);
      int least = INT_LIMIT;
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; ++t) {
        potential[t] = column[t].potential;
        reduced[t] = is_column(t) ? reduced[t] - potential[t] : INT_LIMIT;
        least = min(least, reduced[t]);
      }
      least = __reduce_min_sync(ALL_LANES, least);
      if (least >= 0) return NO_FAULT;

      bool holds[COLUMN_TILES];
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; ++t) holds[t] = reduced[t] == least;
      const int j = lowest(vote(holds));
      const int price_of_row = least + value_of(potential, j);
      bool meets[ROW_TILES];
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) {
        meets[t] = is_row(t) &&
                   shared.cost[at(t) * STRIDE + j] - row[t].potential == price_of_row;
      }
      enter(lowest(vote(meets)), j, least);
    }
    return TOO_MANY_PIVOTS;
  }

  // One pivot: the arc from row i to column j enters the basis.
  __device__ __forceinline__ void enter(int i, int j, int reduced_cost) {
    // On the path, a node has one of i and j below it: flow falls on the arcs of rows above i and
    // of columns above j, and rises on the other arcs of the path.
    bool row_falls[ROW_TILES], row_rises[ROW_TILES];
    bool column_falls[COLUMN_TILES], column_rises[COLUMN_TILES];
    unsigned long long candidate = ~0ull;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      const bool above_i = contains(row[t].rows, i), above_j = contains(row[t].columns, j);
      row_falls[t] = above_i && !above_j;
      row_rises[t] = above_j && !above_i;
      if (row_falls[t]) candidate = min(candidate, static_cast<unsigned long long>(row[t].flow));
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      const bool above_i = contains(column[t].rows, i), above_j = contains(column[t].columns, j);
      column_falls[t] = above_j && !above_i;
      column_rises[t] = above_i && !above_j;
      if (column_falls[t]) {
        candidate = min(candidate, static_cast<unsigned long long>(column[t].flow));
      }
    }
    const long long step = warp_min(candidate);

    // The arc that runs empty leaves; what hangs on it is cut off and hung up again by the new arc.
    bool row_leaves[ROW_TILES], column_leaves[COLUMN_TILES];
    RowSet row_rows[ROW_TILES], column_rows[COLUMN_TILES];
    ColumnSet row_columns[ROW_TILES], column_columns[COLUMN_TILES];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      row_leaves[t] = row_falls[t] && row[t].flow == step;
      row_rows[t] = row[t].rows;
      row_columns[t] = row[t].columns;
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      column_leaves[t] = column_falls[t] && column[t].flow == step;
      column_rows[t] = column[t].rows;
      column_columns[t] = column[t].columns;
    }
    const RowSet leaving_rows = vote(row_leaves);
    const ColumnSet leaving_columns = vote(column_leaves);
    const bool cut_at_row = leaving_rows != 0;  // then i is in the cut part, else j
    const int leaver = cut_at_row ? lowest(leaving_rows) : lowest(leaving_columns);
    const RowSet cut_rows =
        cut_at_row ? value_of(row_rows, leaver) : value_of(column_rows, leaver);
    const ColumnSet cut_columns =
        cut_at_row ? value_of(row_columns, leaver) : value_of(column_columns, leaver);

    // Within the cut part the path turns round: every node on it hands its arc to its parent.
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      row[t].flow += row_rises[t] ? step : row_falls[t] ? -step : 0;
      if ((row_falls[t] || row_rises[t]) && contains(cut_rows, at(t)) && !row_leaves[t]) {
        shared.child[row[t].parent] = at(t);
        post(row[t].parent, row[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      column[t].flow += column_rises[t] ? step : column_falls[t] ? -step : 0;
      if ((column_falls[t] || column_rises[t]) && contains(cut_columns, at(t)) &&
          !column_leaves[t]) {
        shared.child[column[t].parent] = ROW_SLOTS + at(t);
        post(column[t].parent, column[t]);
      }
    }
    __syncwarp();
    const int shift = cut_at_row ? reduced_cost : -reduced_cost;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      const bool inside = contains(cut_rows, at(t));
      const bool on_path = row_falls[t] || row_rises[t];
      if (inside) row[t].potential += shift;
      if (!on_path) continue;
      const bool is_new_top = inside && cut_at_row && at(t) == i;
      rehang(row[t], at(t), inside, is_new_top, ROW_SLOTS + j, step, cut_rows, cut_columns);
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      const bool inside = contains(cut_columns, at(t));
      const bool on_path = column_falls[t] || column_rises[t];
      if (inside) column[t].potential -= shift;
      if (!on_path) continue;
      const bool is_new_top = inside && !cut_at_row && at(t) == j;
      rehang(column[t], ROW_SLOTS + at(t), inside, is_new_top, i, step, cut_rows, cut_columns);
    }
  }

  // The tree around one node of the path after the pivot.
  __device__ __forceinline__ void rehang(
      Node<RowSet, ColumnSet>& node, int number, bool inside, bool is_new_top, int new_parent,
      long long new_flow, RowSet cut_rows, ColumnSet cut_columns) {
    if (!inside) {  // the cut part has moved from one side of the path to the other
      node.rows ^= cut_rows;
      node.columns ^= cut_columns;
    } else if (is_new_top) {
      node.parent = new_parent;
      node.flow = new_flow;
      node.rows = cut_rows;
      node.columns = cut_columns;
    } else {  // the child on the path is now the parent
      node.parent = shared.child[number];
      node.flow = shared.flow[number];
      node.rows = cut_rows & ~shared.rows[number];
      node.columns = cut_columns & ~shared.columns[number];
    }
  }

  __device__ __forceinline__ double mass_of(long long flow) const {
    constexpr long long HALF = 1ll << (PERTURBATION_BITS - 1);
    return static_cast<double>((flow + HALF) >> PERTURBATION_BITS) * (total / TOTAL_FLOW);
  }

  __device__ __forceinline__ void store(
      const Real* costs, Real* value, Real* flow, Real* supply_potential, Real* demand_potential) {
    if (flow != nullptr) {
      for (int k = lane; k < rows * columns; k += LANES) flow[k] = 0;
      __syncwarp();
    }
    double sum = 0;
    long long row_potentials = 0;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      row_potentials += row[t].potential;  // zero past the last row
      if (!is_row(t) || row[t].parent == NO_NODE) continue;
      const int arc = at(t) * columns + row[t].parent - ROW_SLOTS;
      const double mass = mass_of(row[t].flow);
      sum += mass * costs[arc];
      if (flow != nullptr) flow[arc] = mass;
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      if (!is_column(t) || column[t].parent == NO_NODE) continue;
      const int arc = column[t].parent * columns + at(t);
      const double mass = mass_of(column[t].flow);
      sum += mass * costs[arc];
      if (flow != nullptr) flow[arc] = mass;
    }
    sum = warp_sum(sum);
    if (lane == 0) *value = sum;
    if (supply_potential == nullptr) return;
    const double mean = static_cast<double>(warp_sum(row_potentials)) / rows;
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      if (is_row(t)) supply_potential[at(t)] = ldexp(row[t].potential - mean, unit_exponent);
    }
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; ++t) {
      if (!is_column(t)) continue;
      demand_potential[at(t)] = ldexp(column[t].potential + mean, unit_exponent) + low;
    }
  }

  // A problem without a solution must not look like one.
  __device__ __forceinline__ void store_nothing(
      Real* value, Real* flow, Real* supply_potential, Real* demand_potential) {
    const Real nothing = nan("");
    if (lane == 0) *value = nothing;
    if (flow != nullptr) {
      for (int k = lane; k < rows * columns; k += LANES) flow[k] = nothing;
    }
    if (supply_potential == nullptr) return;
    for (int i = lane; i < rows; i += LANES) supply_potential[i] = nothing;
    for (int j = lane; j < columns; j += LANES) demand_potential[j] = nothing;
  }
};

}  // namespace

// Solves `problems` problems of one shape. ROW_CAPACITY >= rows is a multiple of four; COLUMN_TILES
// is 1 up to 32 columns, else 2. `flow` and the two potentials may be null.
//
// `first_fault` (all ones where there is none) takes the least of call << 40 | problem << 4 | Fault
// over all faults, that is the earliest call's first problem; `alarm` lies in memory that the host
// can read without waiting for the device.
template <class Real, int ROW_CAPACITY, int COLUMN_TILES>
__global__ void __launch_bounds__(LANES * WARPS_PER_BLOCK) network_simplex(
    const Real* __restrict__ costs, const Real* __restrict__ supply,
    const Real* __restrict__ demand, Real* __restrict__ value, Real* __restrict__ flow,
    Real* __restrict__ supply_potential, Real* __restrict__ demand_potential, long long problems,
    int rows, int columns, unsigned long long call, unsigned long long* first_fault,
    volatile int* alarm) {
  __shared__ Workspace<ROW_CAPACITY, COLUMN_TILES> workspace[WARPS_PER_BLOCK];
  const int warp = threadIdx.x / LANES;
  const long long problem = static_cast<long long>(blockIdx.x) * WARPS_PER_BLOCK + warp;
  if (problem >= problems) return;

  costs += problem * rows * columns;
  supply += problem * rows;
  demand += problem * columns;
  value += problem;
  if (flow != nullptr) flow += problem * rows * columns;
  if (supply_potential != nullptr) {
    supply_potential += problem * rows;
    demand_potential += problem * columns;
  }

  WarpSimplex<Real, ROW_CAPACITY, COLUMN_TILES> simplex(workspace[warp], rows, columns);
  Fault fault = simplex.load_costs(costs);
  if (fault == NO_FAULT) fault = simplex.load_weights(supply, demand);
  if (fault == NO_FAULT) {
    __syncwarp();
    simplex.choose_start_basis();
    fault = simplex.pivot_to_optimum();
  }
  if (fault == NO_FAULT) {
    simplex.store(costs, value, flow, supply_potential, demand_potential);
    return;
  }
  simplex.store_nothing(value, flow, supply_potential, demand_potential);
  if (simplex.lane == 0) {
    atomicMin(first_fault, call << 40 | static_cast<unsigned long long>(problem) << 4 | fault);
    *alarm = 1;
    __threadfence_system();
  }
}
