// thread_pool.h: parallel backend for hosts other than torch (NumPy, JAX).
// Threads are made per call: cheap next to the >= 100 us tasks that grains allow.
#pragma once
#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace gradops {

inline int& host_threads() {
  static int n = int(std::max(1u, std::thread::hardware_concurrency()));
  return n;
}

inline int thread_count() { return host_threads(); }

inline void thread_pool(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx) {
  const int64_t most = (end - begin + grain - 1) / grain;
  const int64_t n = std::min<int64_t>(host_threads(), most), chunk = (end - begin + n - 1) / n;
  std::exception_ptr failure;
  std::mutex one_at_a_time;
  auto part = [&](int64_t first) {
    try {
      fn(first, std::min(end, first + chunk), ctx);
    } catch (...) {
      const std::lock_guard lock(one_at_a_time);
      failure = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> team;
    for (int64_t first = begin + chunk; first < end; first += chunk) team.emplace_back(part, first);
    part(begin);
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace gradops
