#include "quant/gptq_pack.h"

#include "common/parallel.h"

namespace gradops {
namespace {

void each_tile(const PackTask& t, void (*run)(const PackTask&, int64_t, int64_t)) {
  if (t.batch == 0 || t.rows == 0 || t.cols == 0) return;
  const int64_t grain = 32768 / (kPackRows * t.cols) + 1;
  parallel_for(0, t.batch * ((t.rows + kPackRows - 1) / kPackRows), grain, [&](int64_t b, int64_t e) { run(t, b, e); });
}

}  // namespace

void cpu::gptq_pack(const PackTask& t, void*) { each_tile(t, GRADOPS_DISPATCH(gptq_pack_tiles)); }
void cpu::gptq_unpack(const PackTask& t, void*) { each_tile(t, GRADOPS_DISPATCH(gptq_unpack_tiles)); }

}  // namespace gradops
