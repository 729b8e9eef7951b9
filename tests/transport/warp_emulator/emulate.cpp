// The network simplex kernel under the warp emulator, as a library for ctypes.
// Built with -DKERNEL="path of the .cu", -DVARIANTS="VARIANT(float, 28, 1) ..." and the kernel's
// macros.
#include "warp_emulator.hpp"

#include KERNEL

namespace {

struct Arguments {
  const void *cost, *supply, *demand;
  void *value, *flow, *supply_potential, *demand_potential;
  long long problems;
  int rows, columns;
  unsigned long long call;
  unsigned long long* first_fault;
  int* alarm;
};

template <class Real, int ROW_CAPACITY, int COLUMN_TILES>
void launch(const Arguments& a) {
  network_simplex<Real, ROW_CAPACITY, COLUMN_TILES>(
      static_cast<const Real*>(a.cost), static_cast<const Real*>(a.supply),
      static_cast<const Real*>(a.demand), static_cast<Real*>(a.value), static_cast<Real*>(a.flow),
      static_cast<Real*>(a.supply_potential), static_cast<Real*>(a.demand_potential), a.problems,
      a.rows, a.columns, a.call, a.first_fault, a.alarm);
}

std::string report;

}  // namespace

// What went wrong in the last call of `emulate`; empty if nothing did.
extern "C" const char* emulator_report() { return report.c_str(); }

// How often the last call came to the warp intrinsic of a line of the kernel.
extern "C" long emulator_arrivals(int line) {
  return warp_emulator::warp ? warp_emulator::warp->arrivals[line] : 0;
}

// 0 if the kernel ran by the rules, 1 if not, 2 if this library lacks the variant. Not thread-safe.
extern "C" int emulate(
    const char* real, int row_capacity, int column_tiles, unsigned blocks, std::uint64_t seed,
    const Arguments* arguments) {
  void (*kernel)(const Arguments&) = nullptr;
#define VARIANT(REAL, ROWS, TILES)                                                  \
  if (real == std::string(#REAL) && row_capacity == ROWS && column_tiles == TILES) \
    kernel = &launch<REAL, ROWS, TILES>;
  VARIANTS
#undef VARIANT
  report.clear();
  if (kernel == nullptr) return 2;
  static warp_emulator::Warp warp;
  warp_emulator::warp = &warp;
  warp.arrivals.clear();
  warp.error.clear();
  const std::function<void()> body = [&] { kernel(*arguments); };
  for (unsigned block = 0; block < blocks; ++block) {
    for (unsigned w = 0; w < WARPS_PER_BLOCK; ++w) {
      warp.block = block;
      warp.warp_in_block = w;
      if (!warp.run(body, seed)) {
        report = warp.error;
        return 1;
      }
    }
  }
  return 0;
}
