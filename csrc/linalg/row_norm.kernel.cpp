#include "linalg/row_norm.h"

#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <class T>
const T* row(const RowNormRows& t, int64_t r) {
  return static_cast<const T*>(t.x) + r * t.cols;
}

// The norm of x[c] - mean[c]; in double, where squares of float never leave the range. For double
// input they can: then once more with everything divided by the largest entry.
template <class T, class F>
double norm(int64_t cols, const F& at) {
  double s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t c = 0; c < cols; ++c) s += at(c) * at(c);
  if (sizeof(T) < 8 || (s > 1e-280 && s < 1e300) || s != s) return __builtin_sqrt(s);
  double big = 0;
  for (int64_t c = 0; c < cols; ++c) big = __builtin_fabs(at(c)) > big ? __builtin_fabs(at(c)) : big;
  if (big == 0 || big > 1.7976931348623157e308) return big;
  s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t c = 0; c < cols; ++c) s += (at(c) / big) * (at(c) / big);
  return big * __builtin_sqrt(s);
}

// The norm of x: for the narrower types squares are summed in float, a run at a time, which is twice as
// fast and loses nothing, and only once more in double if they left the range of float.
template <class T>
double norm(const T* x, int64_t cols) {
  const auto exact = [=](int64_t c) { return double(widen(x[c])); };
  if constexpr (sizeof(T) == 8) return norm<T>(cols, exact);
  constexpr int64_t kRun = 1024;
  double total = 0;
  for (int64_t begin = 0; begin < cols; begin += kRun) {
    const int64_t end = begin + kRun < cols ? begin + kRun : cols;
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t c = begin; c < end; ++c) s += float(widen(x[c])) * float(widen(x[c]));
    total += double(s);
  }
  return total > 1e-24 && total < 1e37 ? __builtin_sqrt(total) : norm<T>(cols, exact);
}

double inverse_of(double n, double eps) { return n == 0 ? 0. : 1. / (n + eps); }

}  // namespace

void row_norm_sum(const RowNormRows& t, int64_t begin, int64_t end, double* sum) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t c = 0; c < t.cols; ++c) sum[c] = 0;
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row<T>(t, r);
#pragma omp simd
      for (int64_t c = 0; c < t.cols; ++c) sum[c] += widen(x[c]);
    }
  });
}

void row_norm_measure(const RowNormRows& t, int64_t begin, int64_t end, const double* mean, double* inverse,
                      double* sum) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t c = 0; c < t.cols; ++c) sum[c] = 0;
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row<T>(t, r);
      const double inv = inverse_of(norm<T>(t.cols, [=](int64_t c) { return widen(x[c]) - mean[c]; }), t.eps);
      inverse[r] = inv;
#pragma omp simd
      for (int64_t c = 0; c < t.cols; ++c) sum[c] += (widen(x[c]) - mean[c]) * inv;
    }
  });
}

void row_norm_write(const RowNormRows& t, int64_t begin, int64_t end, const double* mean, const double* inverse,
                    const double* mean_after) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row<T>(t, r);
      T* y = static_cast<T*>(t.y) + r * t.cols;
      const double inv = inverse[r];
#pragma omp simd
      for (int64_t c = 0; c < t.cols; ++c) narrow((widen(x[c]) - mean[c]) * inv - mean_after[c], y[c]);
    }
  });
}

void row_norm_plain(const RowNormRows& t, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = row<T>(t, r);
      T* y = static_cast<T*>(t.y) + r * t.cols;
      const double inv = inverse_of(norm<T>(x, t.cols), t.eps);
      // In float where 1 / ||x|| is a normal float: the product is rounded once either way.
      if (sizeof(T) < 8 && inv < 1e37 && inv > 1e-37) {
        const float f = float(inv);
#pragma omp simd
        for (int64_t c = 0; c < t.cols; ++c) narrow(float(widen(x[c])) * f, y[c]);
      } else {
#pragma omp simd
        for (int64_t c = 0; c < t.cols; ++c) narrow(widen(x[c]) * inv, y[c]);
      }
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
