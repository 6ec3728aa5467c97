// parallel.h: one parallel_for for the torch-free core.
//
// The core never owns threads. Whoever loads it installs a backend: the torch library installs
// torch's own pool, the NumPy module a small std::thread pool. So a process has exactly one pool
// per host framework and no second OpenMP runtime.
#pragma once
#include <cstdint>

namespace gradops {

using RangeFn = void (*)(int64_t begin, int64_t end, void* ctx);
struct ParallelBackend {
  void (*run)(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx);
  int (*threads)();
};

void set_parallel_backend(ParallelBackend backend);
int num_threads();  // that a parallel_for may use now
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx);

// Calls f(begin, end) on sub-ranges; a sub-range has at least `grain` items unless the whole range
// is smaller. An exception thrown by f in any thread reaches the caller.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  run_parallel(
      begin, end, grain, [](int64_t b, int64_t e, void* ctx) { (*static_cast<const F*>(ctx))(b, e); },
      const_cast<F*>(&f));
}

}  // namespace gradops
