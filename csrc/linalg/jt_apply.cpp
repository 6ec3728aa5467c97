#include "linalg/jt_apply.h"

#include "common/parallel.h"

namespace gradops {

void cpu::jt_apply(const JtApplyTask& t, void*) {
  const auto kernel = GRADOPS_DISPATCH(jt_apply_columns);
  const int64_t pieces = (t.cols + kJtApplyColumns - 1) / kJtApplyColumns;
  const int64_t work = (t.rows + 1) * (t.cols < kJtApplyColumns ? t.cols : kJtApplyColumns);
  parallel_for(0, t.batch * pieces, work < 65536 ? 65536 / (work + 1) : 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t begin = n % pieces * kJtApplyColumns;
      kernel(t, n / pieces, begin, begin + kJtApplyColumns < t.cols ? begin + kJtApplyColumns : t.cols);
    }
  });
}

}  // namespace gradops
