#include "linalg/wide_matmul.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {

void cpu::wide_matmul_(const WideMatmulTask& t) {
  using Pick = const WideMatmulEngine& (*)();
  const Pick bf16 = GRADOPS_DISPATCH_BF16(wide_matmul_bf16), full = GRADOPS_DISPATCH(wide_matmul_full);
  const WideMatmulEngine& engine = bf16 && t.right.element == Element::bf16 ? bf16() : full();
  parallel_for(0, engine.units(t), 1,
               [&](int64_t begin, int64_t end) { engine.run(t, thread_scratch(engine.scratch_bytes(t)), begin, end); });
}

}  // namespace gradops
