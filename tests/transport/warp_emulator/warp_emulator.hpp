// A warp of 32 lanes on the host, to run CUDA kernels that use warp intrinsics where there is no
// GPU. Each lane is a fiber that runs until its next warp intrinsic; the intrinsic happens when all
// 32 have come to it. Lanes take turns in an order that a seed sets, so a kernel that relies on one
// shows it.
//
// Reported as errors, by the kernel's line: lanes at different intrinsics, or gone while others
// wait; lane masks other than the full one; shuffles from no lane; races in shared memory (accesses
// of two lanes to one Cell, one of them a write, without __syncwarp between); reads of shared
// memory that this warp has not written; and overflow in __viaddmin_s32. Blocks and their warps run
// one after another.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>

#define WARP_EMULATOR
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace warp_emulator {

constexpr int LANES = 32;
constexpr std::size_t STACK_BYTES = 256 * 1024;

enum class Kind { SYNC, SHUFFLE, SHUFFLE_XOR, BALLOT, ALL, REDUCE_MIN };

// What a lane brings to an intrinsic.
struct Arrival {
  Kind kind;
  int line;
  unsigned mask;
  std::uint64_t value;
  int argument;
};

struct Index {
  unsigned x;
};

class Warp {
 public:
  int lane = 0;
  unsigned block = 0;
  unsigned warp_in_block = 0;
  std::uint64_t serial = 0;  // of this run of this warp
  std::uint64_t epoch = 0;   // counts __syncwarp
  std::map<int, long> arrivals;  // warp intrinsics executed, by line
  std::string error;

  Warp() : stacks_(new char[LANES * STACK_BYTES]) {}

  // Runs `body` on all lanes; false, with `error` set, if the kernel broke a rule.
  bool run(const std::function<void()>& body, std::uint64_t seed) {
    body_ = &body;
    ++serial;
    ++epoch;
    arrival_.fill({});
    std::array<int, LANES> order;
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(seed);
    if (seed > 0) std::shuffle(order.begin(), order.end(), random);
    for (int l = 0; l < LANES; ++l) state_[l] = State::NEW;
    for (;;) {
      for (int l : order) {
        if (state_[l] != State::DONE) resume(l);
        if (!error.empty()) return false;
      }
      const int done = static_cast<int>(std::count(state_.begin(), state_.end(), State::DONE));
      if (done == LANES) return true;
      if (done > 0) {
        for (int l = 0; l < LANES; ++l) {
          lane = l;
          if (state_[l] != State::DONE) fail("a lane waits for others that have returned");
        }
        return false;
      }
      if (!perform()) return false;
    }
  }

  std::uint64_t arrive(const Arrival& arrival) {
    arrival_[lane] = arrival;
    state_[lane] = State::WAITING;
    const int self = lane;
    if (_setjmp(fiber_[self]) == 0) _longjmp(scheduler_, 1);
    return result_[self];
  }

  unsigned thread_index() const { return warp_in_block * LANES + lane; }

  // Only the first fault counts: what follows it means nothing.
  void fail(const std::string& what) {
    if (!error.empty()) return;
    error = what + ", block " + std::to_string(block) + " warp " + std::to_string(warp_in_block) +
            " lane " + std::to_string(lane) + ", after the intrinsic of line " +
            std::to_string(arrival_[lane].line);
  }

 private:
  enum class State { NEW, WAITING, DONE };

  // setjmp and longjmp after the first entry: swapcontext would ask the kernel for the signal mask.
  void resume(int l) {
    lane = l;
    if (_setjmp(scheduler_) != 0) return;
    if (state_[l] == State::WAITING) _longjmp(fiber_[l], 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_.get() + l * STACK_BYTES;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    active_ = this;
    makecontext(&context, &Warp::enter, 0);
    setcontext(&context);
  }

  static void enter() {
    Warp* warp = active_;
    (*warp->body_)();
    warp->state_[warp->lane] = State::DONE;
    _longjmp(warp->scheduler_, 1);
  }

  // All lanes have arrived: check that they agree and give each its result.
  bool perform() {
    const Arrival& first = arrival_[0];
    for (lane = 0; lane < LANES; ++lane) {
      const Arrival& arrival = arrival_[lane];
      if (arrival.kind != first.kind || arrival.line != first.line) {
        fail("lanes diverge: lane 0 is at line " + std::to_string(first.line));
        return false;
      }
      if (arrival.mask != 0xffffffffu) {
        fail("the lane mask is not full");
        return false;
      }
    }
    ++arrivals[first.line];
    std::uint64_t common = 0;
    switch (first.kind) {
      case Kind::SYNC:
        ++epoch;
        break;
      case Kind::SHUFFLE:
      case Kind::SHUFFLE_XOR:
        for (int l = 0; l < LANES; ++l) {
          const int argument = arrival_[l].argument;
          const int source = first.kind == Kind::SHUFFLE ? argument : l ^ argument;
          if (source < 0 || source >= LANES) {
            lane = l;
            fail("shuffle from lane " + std::to_string(source));
            return false;
          }
          result_[l] = arrival_[source].value;
        }
        return true;
      case Kind::BALLOT:
        for (int l = 0; l < LANES; ++l) common |= std::uint64_t(arrival_[l].value != 0) << l;
        break;
      case Kind::ALL:
        common = 1;
        for (const Arrival& arrival : arrival_) common &= arrival.value != 0;
        break;
      case Kind::REDUCE_MIN:  // values come biased so that unsigned order is theirs
        common = ~std::uint64_t(0);
        for (const Arrival& arrival : arrival_) common = std::min(common, arrival.value);
        break;
    }
    result_.fill(common);
    return true;
  }

  static inline Warp* active_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::unique_ptr<char[]> stacks_;
  std::array<State, LANES> state_{};
  std::array<Arrival, LANES> arrival_{};
  std::array<std::uint64_t, LANES> result_{};
  jmp_buf scheduler_;
  jmp_buf fiber_[LANES];
};

inline Warp* warp = nullptr;

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(Kind kind, int line, unsigned mask, T value, int argument) {
  return from_bits<T>(warp->arrive({kind, line, mask, to_bits(value), argument}));
}

template <class T>
T reduce_min(int line, unsigned mask, T value) {
  static_assert(sizeof(T) == 4);
  const std::uint32_t bias = std::is_signed_v<T> ? 0x80000000u : 0;
  const std::uint32_t biased = static_cast<std::uint32_t>(value) ^ bias;
  return static_cast<T>(
      static_cast<std::uint32_t>(warp->arrive({Kind::REDUCE_MIN, line, mask, biased, 0})) ^ bias);
}

// A word of shared memory that knows who has touched it since the last __syncwarp.
template <class T>
class Cell {
 public:
  operator T() const {
    if (serial_ != warp->serial) warp->fail("shared memory read before this warp wrote it");
    refresh();
    if (writers_ & others()) warp->fail("race: shared memory read beside another lane's write");
    if (updaters_ & others()) warp->fail("race: shared memory read beside another lane's atomic");
    readers_ |= self();
    return value_;
  }
  Cell& operator=(T value) {
    refresh();
    if ((writers_ | updaters_ | readers_) & others()) {
      warp->fail("race: shared memory written beside another lane's access");
    }
    writers_ |= self();
    serial_ = warp->serial;
    value_ = value;
    return *this;
  }
  Cell& operator=(const Cell&) = delete;
  T update_min(T value) {
    if (serial_ != warp->serial) warp->fail("atomic on shared memory that this warp did not set");
    refresh();
    if ((writers_ | readers_) & others()) {
      warp->fail("race: atomic beside another lane's plain access");
    }
    updaters_ |= self();
    const T old = value_;
    value_ = std::min(old, value);
    return old;
  }

 private:
  std::uint32_t self() const { return 1u << warp->lane; }
  std::uint32_t others() const { return ~self(); }
  void refresh() const {
    if (epoch_ == warp->epoch) return;
    epoch_ = warp->epoch;
    readers_ = writers_ = updaters_ = 0;
  }
  T value_{};
  std::uint64_t serial_ = 0;
  mutable std::uint64_t epoch_ = 0;
  mutable std::uint32_t readers_ = 0, writers_ = 0, updaters_ = 0;
};

}  // namespace warp_emulator

// The CUDA names that kernels use. Macros, where a report should name the kernel's line.
#define threadIdx (warp_emulator::Index{warp_emulator::warp->thread_index()})
#define blockIdx (warp_emulator::Index{warp_emulator::warp->block})
#define __syncwarp() \
  (void)warp_emulator::warp->arrive({warp_emulator::Kind::SYNC, __LINE__, ~0u, 0, 0})
#define __shfl_sync(mask, value, source) \
  warp_emulator::shuffle(warp_emulator::Kind::SHUFFLE, __LINE__, mask, value, source)
#define __shfl_xor_sync(mask, value, lanes) \
  warp_emulator::shuffle(warp_emulator::Kind::SHUFFLE_XOR, __LINE__, mask, value, lanes)
#define __ballot_sync(mask, flag) \
  static_cast<unsigned>(warp_emulator::warp->arrive( \
      {warp_emulator::Kind::BALLOT, __LINE__, mask, std::uint64_t(flag), 0}))
#define __all_sync(mask, flag) \
  static_cast<int>(warp_emulator::warp->arrive( \
      {warp_emulator::Kind::ALL, __LINE__, mask, std::uint64_t(flag), 0}))
#define __reduce_min_sync(mask, value) warp_emulator::reduce_min(__LINE__, mask, value)

using std::isfinite;
using std::max;
using std::min;

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(unsigned long long x) { return __builtin_ffsll(static_cast<long long>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __double2int_rn(double x) { return static_cast<int>(std::nearbyint(x)); }
inline long long __double2ll_rn(double x) { return static_cast<long long>(std::nearbyint(x)); }
inline int __viaddmin_s32(int a, int b, int c) {
  int sum;
  if (__builtin_add_overflow(a, b, &sum)) warp_emulator::warp->fail("overflow in __viaddmin_s32");
  return std::min(sum, c);
}
inline void __threadfence_system() {}
template <class T>
T atomicMin(warp_emulator::Cell<T>* cell, T value) {
  return cell->update_min(value);
}
inline unsigned long long atomicMin(unsigned long long* word, unsigned long long value) {
  const unsigned long long old = *word;
  *word = std::min(old, value);
  return old;
}
template <class T>
using Cell = warp_emulator::Cell<T>;
