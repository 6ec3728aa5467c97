#include "curvature/swiglu.h"

#include "common/parallel.h"

namespace gradops {

void cpu::swiglu(const SwigluTask& t, void*) {
  parallel_for(0, t.rows * t.cols, 16384,
               [&, kernel = GRADOPS_DISPATCH(swiglu)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
