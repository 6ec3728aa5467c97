#include "quant/gptq_block.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {

void cpu::gptq_block(const GptqBlock& t, void*) {
  if (t.batch == 0 || t.rows == 0) return;
  if (t.group) check_ids("group", t.group, t.batch * t.cols, t.groups);
  const int64_t tile = GRADOPS_DISPATCH(gptq_tile_rows)(), bytes = GRADOPS_DISPATCH(gptq_tile_scratch)(t);
  const auto run = GRADOPS_DISPATCH(gptq_tiles);
  parallel_for(0, t.batch * ((t.rows + tile - 1) / tile), 1,
               [&](int64_t b, int64_t e) { run(t, b, e, thread_scratch(bytes)); });
}

}  // namespace gradops
