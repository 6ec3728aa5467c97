#include "rl/top_p_keep.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {

void cpu::top_p_keep(const TopPTask& t, void*) {
  if (t.rows == 0 || t.cols == 0) return;
  parallel_for(0, t.rows, t.cols < 4096 ? 4096 / t.cols : 1,
               [&, kernel = GRADOPS_DISPATCH(top_p_rows)](int64_t b, int64_t e) {
                 kernel(t, b, e, thread_scratch(top_p_scratch(t.cols)));
               });
}

}  // namespace gradops
