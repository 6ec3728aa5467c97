#include "curvature/rope.h"

#include "common/huge_pages.h"
#include "common/parallel.h"

namespace gradops {

void cpu::rope(const RopeTask& t, void*) {
  prefer_huge_pages(t.y, t.rows * t.cols * element_size(t.element));
  parallel_for(0, t.rows, 16384 / t.cols + 1,
               [&, kernel = GRADOPS_DISPATCH(rope)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
