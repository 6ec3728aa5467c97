// thread_pool.h: parallel backend for hosts other than torch (NumPy, JAX).
// Threads are made per call: cheap next to the >= 100 us tasks that grains allow.
#pragma once
#include <algorithm>
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
  std::vector<std::thread> team;
  for (int64_t i = 1; i < n; ++i) team.emplace_back(fn, begin + i * chunk, std::min(end, begin + (i + 1) * chunk), ctx);
  fn(begin, std::min(end, begin + chunk), ctx);
  for (std::thread& t : team) t.join();
}

}  // namespace gradops
