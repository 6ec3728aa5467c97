#include "curvature/rope.h"

#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <class T, class C, bool kInterleaved>
[[gnu::always_inline]] inline void rotate(const T* x, const C* cos, const C* sin, T* y, int64_t cols, int64_t pairs,
                                          Arithmetic<T> sign) {
  using A = Arithmetic<T>;
  const int64_t step = kInterleaved ? 2 : 1, other = kInterleaved ? 1 : pairs;
#pragma omp simd
  for (int64_t j = 0; j < pairs; ++j) {
    const A c = A(widen(cos[j])), s = sign * A(widen(sin[j]));
    const A a = widen(x[j * step]), b = widen(x[j * step + other]);
    narrow(a * c - b * s, y[j * step]);
    narrow(a * s + b * c, y[j * step + other]);
  }
  for (int64_t j = 2 * pairs; j < cols; ++j) y[j] = x[j];
}

template <class T, class C, bool kInterleaved>
void rows(const RopeTask& t, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(t.x);
  const C *cos = static_cast<const C*>(t.cos), *sin = static_cast<const C*>(t.sin);
  T* y = static_cast<T*>(t.y) + begin * t.cols;
  int64_t at[kRopeDims];
  for (int64_t k = t.dims - 1, rest = begin; k >= 0; --k) {
    const RopeDim& d = t.dim[k];
    at[k] = rest % d.size;
    rest /= d.size;
    x += at[k] * d.x, cos += at[k] * d.cos, sin += at[k] * d.sin;
  }
  const Arithmetic<T> sign = t.inverse ? -1 : 1;
  for (int64_t r = begin; r < end; ++r, y += t.cols) {
    rotate<T, C, kInterleaved>(x, cos, sin, y, t.cols, t.pairs, sign);
    for (int k = t.dims - 1; k >= 0; --k) {
      const RopeDim& d = t.dim[k];
      x += d.x, cos += d.cos, sin += d.sin;
      if (++at[k] < d.size) break;
      at[k] = 0;
      x -= d.size * d.x, cos -= d.size * d.cos, sin -= d.size * d.sin;
    }
  }
}

template <class T, class C>
void run(const RopeTask& t, int64_t begin, int64_t end) {
  t.interleaved ? rows<T, C, true>(t, begin, end) : rows<T, C, false>(t, begin, end);
}

}  // namespace

void rope(const RopeTask& t, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    t.table == t.element ? run<T, T>(t, begin, end) : run<T, Arithmetic<T>>(t, begin, end);
  });
}

}  // namespace gradops::GRADOPS_ISA
