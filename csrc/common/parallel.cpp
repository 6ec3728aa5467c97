#include "common/parallel.h"

namespace gradops {
namespace {
void run_serial(int64_t begin, int64_t end, int64_t, RangeFn fn, void* ctx) { fn(begin, end, ctx); }
int one() { return 1; }
ParallelBackend g_backend{run_serial, one};
}  // namespace

void set_parallel_backend(ParallelBackend backend) { g_backend = backend; }
int num_threads() { return g_backend.threads(); }

void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx) {
  if (begin >= end) return;
  if (end - begin <= grain) return fn(begin, end, ctx);
  g_backend.run(begin, end, grain, fn, ctx);
}

}  // namespace gradops
