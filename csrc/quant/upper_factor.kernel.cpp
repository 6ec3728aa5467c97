#include "quant/upper_factor.h"

#include "common/simd.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kRow = kMostUpperColumns;  // rows begin on whole vectors, and only whole vectors are computed

// row -= factor * from, at least in [begin, end).
template <class T>
[[gnu::always_inline]] inline void subtract(T* row, T factor, const T* from, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  for (int64_t i = begin / W * W; i < end; i += W) vec_at(row + i) -= factor * vec_at(from + i);
}

// a[j][i], i <= j, is R[i][j]: a column of R is contiguous, and what follows it is not used. From the last column to
// the first: each, once divided by the root of its pivot, takes its share from those before it.
template <class T>
bool factor(T* a, int64_t n) {
  bool failed = false;
  for (int64_t j = n - 1; j >= 0; --j) {
    T* const column = a + j * kRow;
    const T pivot = column[j];
    failed |= !(pivot > T(0)) || pivot - pivot != T(0);
    const T root = __builtin_sqrt(pivot), inverse = T(1) / root;
    for (int64_t i = 0; i < j; ++i) column[i] *= inverse;
    column[j] = root;
    for (int64_t k = j - 1; k >= 0; --k) subtract(a + k * kRow, column[k], column, 0, k + 1);
  }
  return failed;
}

// v = r^-1, a row of which needs those below it. v is zero before.
template <class T>
void invert(const T* r, T* v, int64_t n) {
  for (int64_t i = n - 1; i >= 0; --i) {
    T* const row = v + i * kRow;
    const T inverse = T(1) / r[i * n + i];
    for (int64_t k = i + 1; k < n; ++k) subtract(row, r[i * n + k], v + k * kRow, k, n);
    for (int64_t j = i + 1; j < n; ++j) row[j] *= inverse;
    row[i] = inverse;
  }
}

template <class T>
void items(const UpperTask& t, int64_t begin, int64_t end) {
  const int64_t n = t.n;
  alignas(64) T square[kRow * kRow];
  for (int64_t item = begin; item < end; ++item) {
    const T* h = static_cast<const T*>(t.h) + item * t.h_batch;
    T* const r = static_cast<T*>(t.factor) + item * n * n;
    T* const v = static_cast<T*>(t.inverse) + item * n * n;
    for (T& x : square) x = 0;
    t.failed[item] = false;
    if (t.factored) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) r[i * n + j] = j < i ? T(0) : h[i * t.h_row + j];
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = i; j < n; ++j) square[j * kRow + i] = h[i * t.h_row + j];
      t.failed[item] = factor(square, n);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) r[i * n + j] = j < i ? T(0) : square[j * kRow + i];
      for (T& x : square) x = 0;
    }
    invert(r, square, n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) v[i * n + j] = square[i * kRow + j];
  }
}

}  // namespace

void upper_factor_items(const UpperTask& t, bool wide, int64_t begin, int64_t end) {
  wide ? items<double>(t, begin, end) : items<float>(t, begin, end);
}

}  // namespace gradops::GRADOPS_ISA
