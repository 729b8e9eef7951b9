// Threads that live for one call only, so that nothing is left which a fork could break.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace shortlist {

constexpr double kThreadWorth = 50e3;  // nanoseconds of work that pay for starting a thread

// How many threads some work is worth, of those that may be used.
inline int threads_for(double nanoseconds, int threads) {
  return std::max(1, int(std::min(double(threads), nanoseconds / kThreadWorth)));
}

// Calls work(0) here and work(1), ..., work(threads - 1) each on a thread of its own.
template <class Work>
void on_threads(int threads, const Work& work) {
  std::exception_ptr failure;
  std::mutex failure_lock;
  const auto run = [&](int number) {
    try {
      work(number);
    } catch (...) {
      const std::lock_guard<std::mutex> hold(failure_lock);
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  int started = 1;
  try {
    for (; started < threads; started++) helpers.emplace_back(run, started);
  } catch (const std::system_error&) {
    // The system has no more threads to give: this one does their work.
    for (int number = started; number < threads; number++) run(number);
  }
  run(0);
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace shortlist
