// The bytes of a fuzzer as numbers. Once they run out, the numbers go on from a generator that they seed,
// so that short inputs make whole problems and one input always means the same.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_{data}, left_{size} {
    for (size_t i = 0; i < size; i++) state_ = (state_ ^ data[i]) * 0x100000001b3u;  // FNV-1a
  }

  uint64_t bits(int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value = value << 8 | byte();
    return value;
  }
  // One of 0..count - 1.
  int64_t below(int64_t count) { return int64_t(bits(count <= 256 ? 1 : 4) % uint64_t(count)); }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  bool flip() { return byte() & 1; }
  // In [0, 1].
  double share() { return double(bits(2)) / 65535; }

  // Any bits of a float or double, NaN and subnormal ones included.
  template <class Real>
  Real any_real() {
    const uint64_t bits_of_it = bits(sizeof(Real));
    Real value;
    memcpy(&value, &bits_of_it, sizeof value);  // little endian, as all machines that fuzz are
    return value;
  }

 private:
  uint8_t byte() {
    if (left_ > 0) return left_--, *at_++;
    state_ ^= state_ << 13;  // xorshift
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return uint8_t(state_ >> 32);
  }

  const uint8_t* at_;
  size_t left_;
  uint64_t state_ = 0xcbf29ce484222325u;
};

// Ends the run: the fuzzer keeps the input that led here.
#define REQUIRE(holds, ...)                                         \
  do {                                                              \
    if (!(holds)) {                                                 \
      fprintf(stderr, "%s:%d: %s\n  ", __FILE__, __LINE__, #holds); \
      fprintf(stderr, __VA_ARGS__);                                 \
      fputc('\n', stderr);                                          \
      abort();                                                      \
    }                                                               \
  } while (false)
