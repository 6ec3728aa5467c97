#include "linalg/jt_apply.h"

#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <class T>
void columns(const JtApplyTask& t, int64_t item, int64_t begin, int64_t count) {
  constexpr int kRows = 8;  // together: a sum is loaded and stored once for all of them
  alignas(64) double sum[kJtApplyColumns];
  for (int64_t c = 0; c < count; ++c) sum[c] = 0;
  const T* j = static_cast<const T*>(t.j) + item * t.rows * t.cols + begin;
  const double* w = t.w + item * t.rows;
  int64_t b = 0;
  for (; b + kRows <= t.rows; b += kRows) {
    const T* x = j + b * t.cols;
    const int64_t n = t.cols;
    const double w0 = w[b], w1 = w[b + 1], w2 = w[b + 2], w3 = w[b + 3], w4 = w[b + 4], w5 = w[b + 5], w6 = w[b + 6],
                 w7 = w[b + 7];
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      const double even =
          w0 * widen(x[c]) + w2 * widen(x[2 * n + c]) + (w4 * widen(x[4 * n + c]) + w6 * widen(x[6 * n + c]));
      const double odd =
          w1 * widen(x[n + c]) + w3 * widen(x[3 * n + c]) + (w5 * widen(x[5 * n + c]) + w7 * widen(x[7 * n + c]));
      sum[c] += even + odd;
    }
  }
  for (; b < t.rows; ++b) {
    const T* x = j + b * t.cols;
    const double factor = w[b];
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) sum[c] += factor * widen(x[c]);
  }
  T* y = static_cast<T*>(t.y) + item * t.cols + begin;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) narrow(sum[c], y[c]);
}

}  // namespace

void jt_apply_columns(const JtApplyTask& t, int64_t item, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) { columns<decltype(zero)>(t, item, begin, end - begin); });
}

}  // namespace gradops::GRADOPS_ISA
