// Makes the core use torch's thread pool. Linked into each torch library.
#include "common/parallel.h"
#include "common/torch_op.h"

namespace {
void run(int64_t begin, int64_t end, int64_t grain, gradops::RangeFn fn, void* ctx) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { fn(b, e, ctx); });
}
int threads() { return int(torch::stable::get_num_threads()); }
const bool installed = (gradops::set_parallel_backend({run, threads}), true);
}  // namespace
