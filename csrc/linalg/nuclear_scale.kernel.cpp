#include "linalg/nuclear_scale.h"

#include "common/widen.h"

double gradops::GRADOPS_ISA::nuclear_scale_dot(const void* m, const void* u, Element element, int64_t begin,
                                               int64_t end) {
  double sum = 0;
  with_type(element, [&](auto zero) {
    using T = decltype(zero);
    const T *a = static_cast<const T*>(m), *b = static_cast<const T*>(u);
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = begin; i < end; ++i) s += double(widen(a[i])) * double(widen(b[i]));
    sum = s;
  });
  return sum;
}
