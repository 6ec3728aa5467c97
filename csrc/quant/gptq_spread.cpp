#include "quant/gptq_spread.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {

void cpu::gptq_spread(const SpreadTask& t, bool wide) {
  if (t.batch == 0 || t.rows == 0 || t.cols == 0) return;
  const SpreadEngine& engine = GRADOPS_DISPATCH(gptq_spread_engine)(wide);
  const int64_t bytes = engine.scratch_bytes(t), tiles = (t.rows + engine.tile_rows - 1) / engine.tile_rows;
  constexpr int64_t kEnough = 1 << 21;  // multiplications that are worth a thread
  const int64_t grain = kEnough / (engine.tile_rows * t.cols * (t.depth + 1)) + 1;
  parallel_for(0, t.batch * tiles, grain, [&](int64_t b, int64_t e) { engine.run(t, b, e, thread_scratch(bytes)); });
}

}  // namespace gradops
