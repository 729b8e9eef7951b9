// Small kernels that break one rule each, to see the emulator report it. The first breaks none.
#include "warp_emulator.hpp"

namespace {

struct Scratch {
  Cell<int> word[32];
};

int sink[32];

__global__ void keeps_the_rules() {
  __shared__ Scratch s;
  const int lane = threadIdx.x % 32;
  s.word[lane] = lane;
  __syncwarp();
  const int next = s.word[(lane + 1) % 32];
  __syncwarp();
  atomicMin(&s.word[0], -lane);
  __syncwarp();
  bool right = s.word[0] == -31;
  right = __shfl_sync(~0u, next, 31) == 0 && right;
  right = __shfl_xor_sync(~0u, lane, 1) == (lane ^ 1) && right;
  right = __reduce_min_sync(~0u, lane - 5) == -5 && right;
  right = __reduce_min_sync(~0u, ~0u - lane) == ~31u && right;
  right = __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau && right;
  right = !__all_sync(~0u, lane < 31) && __all_sync(~0u, lane < 32) && right;
  if (!right) warp_emulator::warp->fail("an intrinsic returned a wrong value");
}

__global__ void diverges() {
  if (threadIdx.x % 32 < 3) {
    __syncwarp();
  } else {
    (void)__ballot_sync(~0u, true);
  }
}

__global__ void leaves_others_waiting() {
  if (threadIdx.x % 32 == 7) return;
  __syncwarp();
}

__global__ void names_half_the_lanes() { (void)__ballot_sync(0xffffu, true); }

__global__ void shuffles_from_no_lane() { (void)__shfl_sync(~0u, 1, 32); }

__global__ void reads_beside_a_write() {
  __shared__ Scratch s;
  const int lane = threadIdx.x % 32;
  s.word[lane] = 0;
  __syncwarp();
  s.word[lane] = lane;
  sink[lane] = s.word[(lane + 1) % 32];
}

__global__ void writes_beside_a_read() {
  __shared__ Scratch s;
  const int lane = threadIdx.x % 32;
  s.word[lane] = lane;
  __syncwarp();
  sink[lane] = s.word[(lane + 1) % 32];
  (void)__ballot_sync(~0u, true);  // brings lanes together, but orders no memory
  s.word[lane] = 0;
}

__global__ void writes_twice() {
  __shared__ Scratch s;
  s.word[0] = 1;
}

__global__ void reads_beside_an_atomic() {
  __shared__ Scratch s;
  const int lane = threadIdx.x % 32;
  s.word[lane] = lane;
  __syncwarp();
  atomicMin(&s.word[0], -lane);
  sink[lane] = s.word[0];
}

__global__ void reads_what_nobody_wrote() {
  __shared__ Scratch s;
  sink[0] = s.word[5];
}

__global__ void overflows() { sink[0] = __viaddmin_s32(0x7fffffff, 1, 0); }

struct Case {
  const char* name;
  void (*kernel)();
};
const Case CASES[] = {
    {"keeps_the_rules", keeps_the_rules},
    {"diverges", diverges},
    {"leaves_others_waiting", leaves_others_waiting},
    {"names_half_the_lanes", names_half_the_lanes},
    {"shuffles_from_no_lane", shuffles_from_no_lane},
    {"reads_beside_a_write", reads_beside_a_write},
    {"writes_beside_a_read", writes_beside_a_read},
    {"writes_twice", writes_twice},
    {"reads_beside_an_atomic", reads_beside_an_atomic},
    {"reads_what_nobody_wrote", reads_what_nobody_wrote},
    {"overflows", overflows},
};

}  // namespace

// What the emulator says of a kernel, with lanes in the order of a seed; null for an unknown name.
extern "C" const char* report_on(const char* name, std::uint64_t seed) {
  static warp_emulator::Warp warp;
  warp_emulator::warp = &warp;
  for (const Case& c : CASES) {
    if (c.name != std::string(name)) continue;
    warp.error.clear();
    warp.run(c.kernel, seed);
    return warp.error.c_str();
  }
  return nullptr;
}
