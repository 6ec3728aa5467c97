#include "quant/gptq_spread.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {

void cpu::gptq_spread(const SpreadTask& t) {
  if (t.batch == 0 || t.rows == 0 || t.cols == 0 || t.depth == 0) return;
  const auto run = GRADOPS_DISPATCH(gptq_spread_range);
  const int64_t bytes = GRADOPS_DISPATCH(gptq_spread_scratch)(t.depth);
  parallel_for(0, t.batch * GRADOPS_DISPATCH(gptq_spread_panels)(t.cols), 1,
               [&](int64_t b, int64_t e) { run(t, b, e, thread_scratch(bytes)); });
}

}  // namespace gradops
