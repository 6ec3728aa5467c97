#include "curvature/swiglu.h"

#include <initializer_list>

#include "common/huge_pages.h"
#include "common/parallel.h"

namespace gradops {
namespace {
constexpr int64_t kGrain = 16384;  // numbers that are worth a thread
}

void cpu::swiglu(const SwigluTask& t, void*) {
  for (int k = 0; k < 2; ++k)
    for (void* y : {t.value[k], t.change[k]})
      if (y) prefer_huge_pages(y, t.rows * t.cols * element_size(t.element));
  parallel_for(0, t.rows * t.cols, kGrain,
               [&, kernel = GRADOPS_DISPATCH(swiglu)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
