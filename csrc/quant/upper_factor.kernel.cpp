#include "quant/upper_factor.h"

namespace gradops::GRADOPS_ISA {
namespace {

// a[j][i], i <= j, is R[i][j]: a column of R is contiguous. From the last column to the first: each, once divided by
// the root of its pivot, takes its share from those before it.
template <class T>
bool factor(T* a, int64_t n) {
  bool failed = false;
  for (int64_t j = n - 1; j >= 0; --j) {
    T* const column = a + j * n;
    const T pivot = column[j];
    failed |= !(pivot > T(0)) || pivot - pivot != T(0);
    const T root = __builtin_sqrt(pivot), inverse = T(1) / root;
    column[j] = root;
#pragma omp simd
    for (int64_t i = 0; i < j; ++i) column[i] *= inverse;
    for (int64_t k = j - 1; k >= 0; --k) {
      const T factor = column[k];
      T* const to = a + k * n;
#pragma omp simd
      for (int64_t i = 0; i <= k; ++i) to[i] -= factor * column[i];
    }
  }
  return failed;
}

// v = r^-1, a row of which needs those below it.
template <class T>
void invert(const T* r, T* v, int64_t n) {
  for (int64_t i = n - 1; i >= 0; --i) {
    T* const row = v + i * n;
    for (int64_t j = 0; j < n; ++j) row[j] = 0;
    const T inverse = T(1) / r[i * n + i];
    for (int64_t k = i + 1; k < n; ++k) {
      const T factor = r[i * n + k];
      const T* const from = v + k * n;
#pragma omp simd
      for (int64_t j = k; j < n; ++j) row[j] -= factor * from[j];
    }
#pragma omp simd
    for (int64_t j = i + 1; j < n; ++j) row[j] *= inverse;
    row[i] = inverse;
  }
}

template <class T>
void items(const UpperTask& t, int64_t begin, int64_t end) {
  const int64_t n = t.n;
  alignas(64) T columns[kMostUpperColumns * kMostUpperColumns];
  for (int64_t item = begin; item < end; ++item) {
    const T* h = static_cast<const T*>(t.h) + item * t.h_batch;
    T* const r = static_cast<T*>(t.factor) + item * n * n;
    t.failed[item] = false;
    if (t.factored) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) r[i * n + j] = j < i ? T(0) : h[i * t.h_row + j];
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = i; j < n; ++j) columns[j * n + i] = h[i * t.h_row + j];
      t.failed[item] = factor(columns, n);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) r[i * n + j] = j < i ? T(0) : columns[j * n + i];
    }
    invert(r, static_cast<T*>(t.inverse) + item * n * n, n);
  }
}

}  // namespace

void upper_factor_items(const UpperTask& t, bool wide, int64_t begin, int64_t end) {
  wide ? items<double>(t, begin, end) : items<float>(t, begin, end);
}

}  // namespace gradops::GRADOPS_ISA
