// Vectors in GCC/Clang vector extensions and the few operations on them that the solver needs.
// Included by network_simplex.cpp inside its own namespace, as it is compiled per instruction set.

template <class T, int count>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * count)));
};
template <class T, int count>
using Vector = typename VectorOf<T, count>::type;

constexpr int kLanes = EMD_LANES;  // 32-bit numbers in one register
using Ints = Vector<int32_t, kLanes>;
constexpr int kLongLanes = kLanes / 2;  // 64-bit numbers in one register
using Longs = Vector<int64_t, kLongLanes>;
using Unsigned = Vector<uint32_t, kLanes>;
template <class Real>
constexpr int kLanesOf = kLanes * 4 / int(sizeof(Real));
template <class Real>
using Reals = Vector<Real, kLanesOf<Real>>;
template <class Real>
using IntsLike = Vector<int32_t, kLanesOf<Real>>;  // as many lanes as Reals<Real>

template <int bytes>
struct IntOfBytes;
template <>
struct IntOfBytes<4> {
  using type = int32_t;
};
template <>
struct IntOfBytes<8> {
  using type = int64_t;
};
template <int bytes>
using IntOf = typename IntOfBytes<bytes>::type;
template <class Real>
using TruthOf = Vector<IntOf<sizeof(Real)>, kLanesOf<Real>>;  // what comparing Reals<Real> gives

constexpr int32_t kIntMax = 0x7fffffff;

inline Ints splat(int32_t x) { return Ints{} + x; }

template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V, class T>
inline V load(const T* from) {
  V vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}
template <class V, class T>
inline void store(T* to, V vector) {
  memcpy(to, &vector, sizeof vector);
}

// Bits that do not fit are dropped, as shifts of signed numbers may not.
inline Ints shift_left(Ints a, int bits) {
  return reinterpret_cast<Ints>(reinterpret_cast<Unsigned>(a) << bits);
}

// 0, 1, 2, ... in memory: written as a loop over lanes, compilers set each lane at run time.
template <class T>
struct Counting {
  alignas(64) T from[kMaxNodes];
  constexpr Counting() : from() {
    for (int i = 0; i < kMaxNodes; i++) from[i] = i;
  }
};
template <class T>
constexpr Counting<T> kCounting{};

// {first, first + 1, first + 2, ...}
inline Ints count_from(int first) { return load<Ints>(kCounting<int32_t>.from + first); }

// Truth of the lanes {first, first + 1, ...} < end, to choose among Reals<Real>.
template <class Real>
inline TruthOf<Real> before(int end, int first) {
  return load<TruthOf<Real>>(kCounting<IntOf<sizeof(Real)>>.from + first) < end;
}

// Folds a vector in halves down to so many lanes: each keeps the smallest of its share.
template <class T, int count, int lanes>
inline Vector<T, lanes> fold_smaller(Vector<T, count> a) {
  if constexpr (count == lanes) {
    return a;
  } else {
    Vector<T, count / 2> halves[2];
    memcpy(halves, &a, sizeof a);
    return fold_smaller<T, count / 2, lanes>(smaller(halves[0], halves[1]));
  }
}
// The smallest lane.
template <class T, int count>
inline T minimum(Vector<T, count> a) {
  return fold_smaller<T, count, 1>(a)[0];
}

inline uint32_t sum(Unsigned a) {
  Vector<uint32_t, 4> quarters[kLanes / 4];
  memcpy(quarters, &a, sizeof a);
  Vector<uint32_t, 4> x = quarters[0];
  for (int k = 1; k < kLanes / 4; k++) x += quarters[k];
  x += Vector<uint32_t, 4>{x[2], x[3], x[0], x[1]};
  return x[0] + x[1];
}

// Lane l is true (all ones) where bit l is set.
inline Ints truth_of(uint64_t bits) {
  const Unsigned one_bit_each = (Unsigned{} + 1u) << load<Unsigned>(kCounting<uint32_t>.from);
  return ((Unsigned{} + uint32_t(bits)) & one_bit_each) != 0;
}
inline Longs long_truth_of(uint64_t bits) {
  using UnsignedLongs = Vector<uint64_t, kLongLanes>;
  const UnsignedLongs one_bit_each =
      (UnsignedLongs{} + uint64_t{1}) << load<UnsignedLongs>(kCounting<uint64_t>.from);
  return ((UnsignedLongs{} + bits) & one_bit_each) != 0;
}
