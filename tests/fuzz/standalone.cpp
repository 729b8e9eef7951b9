// Stands in for libFuzzer where the compiler has none (GCC): runs a target on files that are named, or
// on random bytes for a time.
//
//     target FILE...
//     target --seconds 10 [--seed 1]
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int count, char** arguments) {
  double seconds = 0;
  unsigned seed = 1;
  for (int i = 1; i < count; i++) {
    const std::string argument = arguments[i];
    if (argument == "--seconds" && i + 1 < count) {
      seconds = std::atof(arguments[++i]);
    } else if (argument == "--seed" && i + 1 < count) {
      seed = unsigned(std::atoi(arguments[++i]));
    } else {
      std::ifstream file(argument, std::ios::binary);
      if (!file) {
        std::fprintf(stderr, "%s: cannot be read\n", argument.c_str());
        return 2;
      }
      const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    }
  }
  std::mt19937 random(seed);
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  long runs = 0;
  for (; Clock::now() < end; runs++) {
    std::vector<uint8_t> bytes(random() % 4 == 0 ? random() % 4096 : random() % 64);
    for (uint8_t& byte : bytes) byte = uint8_t(random() >> (random() % 25));
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%s: %ld random inputs of seed %u, none failed\n", arguments[0], runs, seed);
  return 0;
}
