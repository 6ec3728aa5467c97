// tile_product.h: sums of small matrix products in place, with vectors, and 2^x.
//
// The left factor is read number by number and may have any strides, so a transposed one costs nothing; the right one
// is read in vectors along its rows. For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/simd.h"

namespace gradops {
namespace {

template <class T>
[[gnu::always_inline]] inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// 2^x for x <= 127. Below the normal range it is 0: hidden scores, -inf, weigh nothing. A NaN stays.
[[gnu::always_inline]] inline Vec<float> exp2(Vec<float> x) {
  x = x < -127.f ? splat(-127.f) : x;
  const Vec<float> shifted = x + (0x1.8p23f + 127), r = x - (shifted - (0x1.8p23f + 127));
  Vec<float> p = r * 0x1.41fbbcp-13f + 0x1.5f3e52p-10f;  // of least relative error on [-1/2, 1/2]: 2e-9
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.f;
  return p * (Vec<float>)((Vec<int32_t>)shifted << 23);
}
[[gnu::always_inline]] inline Vec<double> exp2(Vec<double> x) {
  x = x < -1023. ? splat(-1023.) : x;
  const Vec<double> shifted = x + (0x1.8p52 + 1023);
  const Vec<double> r = (x - (shifted - (0x1.8p52 + 1023))) * 0.69314718055994530942;
  constexpr double kTaylor[] = {
      1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040, 1. / 720,
      1. / 120,       1. / 24,       1. / 6,       .5,          1.,         1.};
  Vec<double> p = splat(1. / 6227020800);
#pragma GCC unroll 13
  for (const double c : kTaylor) p = p * r + c;
  return p * (Vec<double>)((Vec<int64_t>)shifted << 52);
}

// (i, k) of the left factor is a[i * row + k * col], (k, j) of the right one b[k * next + j]. A factor that is null: no
// product.
template <class T>
struct Product {
  const T* a;
  int64_t row, col;
  const T* b;
  int64_t next;
  bool given() const { return a && b; }
};

// Sums in registers: R rows of C vectors, with room for a row of the right factor and a number of the left one.
constexpr int kSumRows = kVectorRegisters == 32 || kVectorBytes == 32 ? 6 : 4;
constexpr int kSumVectors = kVectorRegisters == 32 ? 4 : 2;

template <class T, int R, int C>
[[gnu::noinline]] void sum_block(int64_t depth, const Product<T>* p, int products, int64_t i, int64_t j, T* out,
                                 int64_t ld, bool add) {
  Vec<T> sum[R][C] = {};
  for (int n = 0; n < products; ++n) {
    const int64_t row = p[n].row, col = p[n].col, next = p[n].next;
    const T *a = p[n].a + i * row, *b = p[n].b + j;
    for (int64_t k = 0; k < depth; ++k, a += col, b += next) {
      Vec<T> x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) x[c] = load_anywhere(b + c * kLanes<T>);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[r][c] += a[r * row] * x[c];
    }
  }
  out += i * ld + j;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* to = out + r * ld + c * kLanes<T>;
      store_anywhere<T>(to, add ? load_anywhere(to) + sum[r][c] : sum[r][c]);
    }
}

template <class T, int C>
inline void sum_columns(int64_t m, int64_t depth, const Product<T>* p, int products, int64_t j, T* out, int64_t ld,
                        bool add) {
  int64_t i = 0;
  for (; i + kSumRows <= m; i += kSumRows) sum_block<T, kSumRows, C>(depth, p, products, i, j, out, ld, add);
  if (kSumRows > 4 && m - i >= 4) sum_block<T, 4, C>(depth, p, products, i, j, out, ld, add), i += 4;
  if (m - i >= 2) sum_block<T, 2, C>(depth, p, products, i, j, out, ld, add), i += 2;
  if (m - i >= 1) sum_block<T, 1, C>(depth, p, products, i, j, out, ld, add);
}

// out, m x n with rows ld apart, (+)= x + y. n is a multiple of the lanes.
template <class T>
inline void multiply(int64_t m, int64_t n, int64_t depth, const Product<T>& x, const Product<T>& y, T* out, int64_t ld,
                     bool add) {
  constexpr int64_t kDepth = 128;  // numbers of one sum: longer ones in parts, for the sake of their rounding
  if (depth > kDepth) {
    const auto behind = [](const Product<T>& p) -> Product<T> {
      return p.given() ? Product<T>{p.a + kDepth * p.col, p.row, p.col, p.b + kDepth * p.next, p.next} : p;
    };
    multiply(m, n, kDepth, x, y, out, ld, add);
    return multiply(m, n, depth - kDepth, behind(x), behind(y), out, ld, true);
  }
  const Product<T> both[2] = {x.given() ? x : y, y};
  const int products = x.given() + y.given();
  if (products == 0 && add) return;
  for (int64_t j = 0; j < n;) {
    const int64_t left = (n - j) / kLanes<T>;
    if (left >= kSumVectors && left != 5) {  // five are three and two: one alone would wait for its sums
      sum_columns<T, kSumVectors>(m, depth, both, products, j, out, ld, add), j += kSumVectors * kLanes<T>;
    } else if (kSumVectors > 2 && left >= 3) {
      sum_columns<T, 3>(m, depth, both, products, j, out, ld, add), j += 3 * kLanes<T>;
    } else if (left >= 2) {
      sum_columns<T, 2>(m, depth, both, products, j, out, ld, add), j += 2 * kLanes<T>;
    } else {
      sum_columns<T, 1>(m, depth, both, products, j, out, ld, add), j += kLanes<T>;
    }
  }
}
template <class T>
inline void multiply(int64_t m, int64_t n, int64_t depth, const Product<T>& x, T* out, int64_t ld, bool add) {
  multiply(m, n, depth, x, Product<T>{}, out, ld, add);
}

}  // namespace
}  // namespace gradops
