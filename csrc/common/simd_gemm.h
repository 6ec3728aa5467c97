// simd_gemm.h: products of matrices stored in panels, with vectors (common/simd.h).
//
// A matrix of r rows is stored as panels of kPanel columns, each panel r x kPanel, contiguous:
// element (i, j) is at panel j / kPanel, then i * kPanel + j % kPanel. The last panel may be partly
// used; columns up to the next full vector are computed like the others, those beyond are never read.
// In this form a matrix is at once a packed right operand, and the left operand of either its own
// product (by rows) or its transpose's (by columns), so nothing is ever repacked.
// For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/simd.h"

namespace gradops {
namespace {

// The tile of sums in registers, with room for one row of the right operand beside it. Measured best.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : kVectorBytes == 32 ? 4 : 2;
constexpr int kTileVectors = kVectorBytes == 64 ? 2 : kVectorBytes == 32 ? 3 : 4;
template <class T>
constexpr int kPanel = kTileVectors * kLanes<T>;  // columns
template <class T>
constexpr int64_t kDepth = (256 + kPanel<T> - 1) / kPanel<T> * kPanel<T>;  // terms per pass: their panel stays in L1
template <class T>
constexpr int64_t kBlockPanels = 64 / kPanel<T>;
template <class T>
constexpr int64_t kBlock = kBlockPanels<T> * kPanel<T>;  // columns, and rows, of a symmetric matrix computed together

template <class T>
struct Panels {
  T* data;
  int64_t rows, cols;
  int64_t vectors() const { return (cols + kLanes<T> - 1) / kLanes<T>; }
  int64_t panels() const { return (cols + kPanel<T> - 1) / kPanel<T>; }
  int64_t blocks() const { return (cols + kBlock<T> - 1) / kBlock<T>; }
  int64_t size() const { return panels() * rows * kPanel<T>; }
  T* at(int64_t row, int64_t col) const { return data + (col / kPanel<T> * rows + row) * kPanel<T> + col % kPanel<T>; }
};

enum class Left { by_rows, by_columns };

// out = alpha * base + beta * sum_k left(., k) right(k, .): R rows, C vectors. No base: alpha is 0.
template <class T, Left kLeft, int R, int C>
[[gnu::noinline]] void tile(const T* left, int64_t left_panel, const T* right, int64_t depth, T alpha, const T* base,
                            T beta, T* out) {
  constexpr int W = kLanes<T>, P = kPanel<T>;
  Vec<T> sum[R][C] = {};
  const auto add = [&](auto element, const T* row) __attribute__((always_inline)) {
    Vec<T> x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[c] = vec_at(row + c * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += element(r) * x[c];
  };
  if constexpr (kLeft == Left::by_columns) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k, left += P, right += P) add([=](int r) { return left[r]; }, right);
  } else {
    for (; depth > 0; depth -= P, left += left_panel) {
      const int64_t count = depth < P ? depth : P;
#pragma GCC unroll 4
      for (int64_t k = 0; k < count; ++k, right += P) add([=](int r) { return left[r * P + k]; }, right);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Vec<T> term = beta * sum[r][c];
      vec_at(out + r * P + c * W) = base ? alpha * vec_at(base + r * P + c * W) + term : term;
    }
}

template <class T, Left kLeft, int R, int C = kTileVectors>
[[gnu::always_inline]] inline void tile_of(int64_t vectors, const T* left, int64_t left_panel, const T* right,
                                           int64_t depth, T alpha, const T* base, T beta, T* out) {
  if constexpr (C > 0) {
    if (vectors >= C)
      tile<T, kLeft, R, C>(left, left_panel, right, depth, alpha, base, beta, out);
    else
      tile_of<T, kLeft, R, C - 1>(vectors, left, left_panel, right, depth, alpha, base, beta, out);
  }
}

// f(row, rows) with rows = kTileRows, or in the remainder smaller powers of two, as a constant.
template <class F>
[[gnu::always_inline]] inline void each_tile(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) f(row, std::integral_constant<int, kTileRows>());
  const int64_t rest = rows - row;
  if (kTileRows > 4 && rest & 4) f(row, std::integral_constant<int, 4>()), row += 4;
  if (kTileRows > 2 && rest & 2) f(row, std::integral_constant<int, 2>()), row += 2;
  if (rest & 1) f(row, std::integral_constant<int, 1>());
}

// Copies the block at rows i, columns j to rows j, columns i, transposed. i and j are multiples of the lanes.
template <class T>
inline void mirror(const Panels<T>& m, int64_t i, int64_t j) {
  constexpr int W = kLanes<T>;
  Vec<T> block[W];
  const T* from = m.at(i, j);
  T* to = m.at(j, i);
  const int64_t rows = m.rows - i;
  if (rows >= W) {
    for (int r = 0; r < W; ++r) block[r] = vec_at(from + r * kPanel<T>);
  } else {
    for (int r = 0; r < W; ++r) block[r] = r < rows ? vec_at(from + r * kPanel<T>) : Vec<T>{};
  }
  transpose<T>(block);
  for (int r = 0; r < W; ++r) vec_at(to + r * kPanel<T>) = block[r];
}

// Rows of block `bi` and columns of block `bj` <= `bi`, and their mirror image, of the symmetric
//   out = alpha * base + beta * m^T n      (no base: alpha is 0)
// where n is m, or both are symmetric and commute.
template <class T>
inline void symmetric_block(const Panels<T>& m, const Panels<T>& n, int64_t bi, int64_t bj, T alpha,
                            const Panels<T>* base, T beta, const Panels<T>& out) {
  constexpr int W = kLanes<T>, P = kPanel<T>;
  const int64_t first = bi * kBlock<T>, last = first + kBlock<T> < out.rows ? first + kBlock<T> : out.rows;
  const int64_t vectors = out.vectors();
  for (int64_t k = 0; k < m.rows; k += kDepth<T>) {
    const int64_t depth = k + kDepth<T> < m.rows ? kDepth<T> : m.rows - k;
    for (int64_t p = bj * kBlockPanels<T>; p < (bj + 1) * kBlockPanels<T> && p < out.panels(); ++p)
      for (int64_t i = first; i < last; i += P)
        each_tile(last - i < P ? last - i : P, [&](int64_t r, auto rows) __attribute__((always_inline)) {
          const int64_t row = i + r, upto = bi == bj ? (row + rows - 1) / W + 1 : vectors;
          T* to = out.at(row, p * P);
          tile_of<T, Left::by_columns, rows>((upto < vectors ? upto : vectors) - p * kTileVectors, m.at(k, row), 0,
                                             n.at(k, p * P), depth, k ? T(1) : alpha,
                                             k      ? to
                                             : base ? base->at(row, p * P)
                                                    : nullptr,
                                             beta, to);
        });
  }
  const int64_t end = bj * kBlock<T> + kBlock<T>;
  for (int64_t i = first; i < last; i += W)
    for (int64_t j = bj * kBlock<T>; j < end && j < i; j += W) mirror(out, i, j);
}

// Rows first to last of m <- alpha m + beta m b. scratch: (last - first) rows, in panels. A tile of a matrix of one
// panel reads no rows but its own, and those before it writes them.
template <class T>
inline void times_block(const Panels<T>& m, int64_t first, int64_t last, T alpha, const Panels<T>& b, T beta,
                        T* scratch) {
  constexpr int W = kLanes<T>, P = kPanel<T>;
  const bool copies = m.panels() > 1;
  const Panels<T> old{copies ? scratch : m.at(first, 0), last - first, m.cols};
  for (int64_t p = 0; copies && p < m.panels(); ++p) {
    const T* from = m.at(first, p * P);
    T* to = old.at(0, p * P);
    for (int64_t e = 0; e < old.rows * P; e += W) vec_at(to + e) = vec_at(from + e);
  }
  for (int64_t p = 0; p < m.panels(); ++p)
    for (int64_t k = 0; k < b.rows; k += kDepth<T>) {
      const int64_t depth = k + kDepth<T> < b.rows ? kDepth<T> : b.rows - k;
      each_tile(old.rows, [&](int64_t r, auto rows) __attribute__((always_inline)) {
        T* to = m.at(first + r, p * P);
        tile_of<T, Left::by_rows, rows>(m.vectors() - p * kTileVectors, old.at(r, k), old.rows * P, b.at(k, p * P),
                                        depth, k ? T(1) : alpha, to, beta, to);
      });
    }
}

}  // namespace
}  // namespace gradops
