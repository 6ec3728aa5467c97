#include "quant/upper_factor.h"

#include "common/parallel.h"

namespace gradops {

void cpu::upper_factor(const UpperTask& t, bool wide) {
  if (t.n == 0) return;
  const auto run = GRADOPS_DISPATCH(upper_factor_items);
  parallel_for(0, t.batch, 1, [&](int64_t begin, int64_t end) { run(t, wide, begin, end); });
}

}  // namespace gradops
