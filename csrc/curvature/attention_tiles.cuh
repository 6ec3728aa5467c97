// attention_tiles.cuh: what attention's kernels do with tiles. Each warp makes sums of 16 rows: of bf16 and f16 on
// tensor cores, of float and double on the CUDA cores, dealt to the lanes alike.
#pragma once
#include "common/async_copy.h"
#include "common/element.h"
#include "common/tile.cuh"

namespace gradops {
namespace {

template <class T>
constexpr bool kTensor = sizeof(T) == 2;
template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // numbers in 16 bytes

template <class S>
struct Quad {
  S r[4];
};
template <class T>  // sums of 16 x 8: lane 4 g + t has (g, 2 t) (g, 2 t + 1) (g + 8, 2 t) (g + 8, 2 t + 1)
using Sums = std::conditional_t<kTensor<T>, FragC, Quad<T>>;

__host__ __device__ constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to; }

// Columns of a tile in shared memory: filled up with zeros, and 16 bytes apart from row to row, against bank conflicts.
template <class T>
__host__ __device__ constexpr int padded(int cols) {
  return int(up(cols, kTensor<T> ? 16 : kVector<T>)) * (kTensor<T> ? 16 : kVector<T>);
}
template <class T>
__host__ __device__ constexpr int pitch(int cols) {
  return padded<T>(cols) + kVector<T>;
}

template <class T>
__device__ inline T* behind(T* p, int64_t n) {  // of an array that may be missing
  return p ? p + n : nullptr;
}

// Rows of one head's matrix in global memory.
template <class T>
struct Source {
  const T* data;  // null: nothing to load
  int64_t step, rows;
  int cols;
};
// Rows first, first + 1, ... to shared memory, by the whole block; zeros past the end. The caller waits: wait_async().
template <class T>
__device__ void load_tile(T* to, const Source<T>& from, int64_t first, int count) {
  if (from.data == nullptr) return;
  const T* const begin = from.data + first * from.step;
  const int64_t rows = from.rows - first;
  const int ld = pitch<T>(from.cols);
  const bool aligned = (reinterpret_cast<uintptr_t>(begin) | uintptr_t(from.step) * sizeof(T)) % 16 == 0;
  for (int col = threadIdx.x % 8 * kVector<T>; col < padded<T>(from.cols); col += 8 * kVector<T>) {
    const bool whole = aligned && col + kVector<T> <= from.cols;
    for (int row = threadIdx.x / 8; row < count; row += blockDim.x / 8) {
      T* const there = to + row * ld + col;
      const T* const here = begin + row * from.step + col;
      if (whole && row < rows) {
        copy_async(there, here);
      } else {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) there[e] = row < rows && col + e < from.cols ? here[e] : T(0.f);
      }
    }
  }
}

// The 16 rows that a warp owns, as left factor of its scores: of bf16 and f16 in shared memory; of wide numbers, which
// it has no room for, in global memory, where the same few lines are read again and again.
template <class T>
struct OwnRows {
  const T* row[2] = {};  // of this lane; bf16 and f16: row[0] is the tile
  int ld = 0;

  __device__ explicit operator bool() const { return row[0] != nullptr; }
  __device__ static OwnRows shared(const T* tile, int row, int cols) {
    OwnRows own;
    if (tile) own.row[0] = tile + row * pitch<T>(cols), own.ld = pitch<T>(cols);
    return own;
  }
  __device__ static OwnRows global(const Source<T>& from, int64_t first) {
    OwnRows own;
    for (int i = 0; i < 2 && from.data; ++i) {
      const int64_t row = first + c_row(2 * i);
      own.row[i] = from.data + (row < from.rows ? row : from.rows - 1) * from.step;  // past the end: not used
    }
    return own;
  }
};

// s += X Y^T and s_dot += X Y_dot^T + X_dot Y^T. Y: 8 kFrags rows in shared memory; a change that is null is zero.
template <bool kChange, class T, int kFrags>
__device__ void add_scores(Sums<T> (&s)[kFrags], Sums<T> (&s_dot)[kFrags], const OwnRows<T>& x, const OwnRows<T>& x_dot,
                           const T* y, const T* y_dot, int ld, int depth) {
  if constexpr (kTensor<T>) {
    for (int k = 0; k < depth; k += 16) {
      FragA<T> a, a_dot;
      load_a(a, x.row[0] + k, x.ld);
      if (kChange && x_dot) load_a(a_dot, x_dot.row[0] + k, x.ld);
#pragma unroll
      for (int f = 0; f < kFrags; f += 2) {
        FragB<T> b[2];
        load_b_transposed(b, y + 8 * f * ld + k, ld);
        mma(s[f], a, b[0]), mma(s[f + 1], a, b[1]);
        if (kChange && x_dot) mma(s_dot[f], a_dot, b[0]), mma(s_dot[f + 1], a_dot, b[1]);
        if (kChange && y_dot) {
          load_b_transposed(b, y_dot + 8 * f * ld + k, ld);
          mma(s_dot[f], a, b[0]), mma(s_dot[f + 1], a, b[1]);
        }
      }
    }
  } else {
    struct alignas(16) Vector {
      T at[kVector<T>];
    };
    for (int k = 0; k < depth; k += kVector<T>) {
      T a[2][kVector<T>], a_dot[2][kVector<T>] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) {
          a[i][e] = k + e < depth ? x.row[i][k + e] : T(0);
          if (kChange && x_dot) a_dot[i][e] = k + e < depth ? x_dot.row[i][k + e] : T(0);
        }
#pragma unroll
      for (int f = 0; f < kFrags; ++f)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = (8 * f + c_col(c)) * ld + k;
          const Vector b = *reinterpret_cast<const Vector*>(y + at);
          Vector b_dot = {};
          if (kChange && y_dot) b_dot = *reinterpret_cast<const Vector*>(y_dot + at);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < kVector<T>; ++e) {
              s[f].r[2 * i + c] += a[i][e] * b.at[e];
              if (kChange) s_dot[f].r[2 * i + c] += a[i][e] * b_dot.at[e] + a_dot[i][e] * b.at[e];
            }
        }
    }
  }
}

// Some columns of a left factor of 16 rows: 16 columns on tensor cores, else one.
template <class T>
struct Column {
  T at[2];
};
template <class T>
using Left = std::conditional_t<kTensor<T>, FragA<T>, Column<T>>;
template <class T>
constexpr int kStep = kTensor<T> ? 16 : 1;

template <class T>
__device__ Left<T> left_at(const T* tile, int ld) {
  Left<T> a;
  if constexpr (kTensor<T>)
    load_a(a, tile, ld);
  else
    a.at[0] = tile[c_row(0) * ld], a.at[1] = tile[c_row(2) * ld];
  return a;
}
template <class T>  // sums side by side are laid out as a left factor is
__device__ FragA<T> left_of(const FragC& left, const FragC& right) {
  FragA<T> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const FragC& c = i < 2 ? left : right;
    const auto two = narrow<T>(make_float2(c.r[i % 2 * 2], c.r[i % 2 * 2 + 1]));
    memcpy(&a.r[i], &two, 4);
  }
  return a;
}
template <class T>  // stores sums as rows of a left factor
__device__ void put_left(T* tile, int ld, const Sums<T>& sums) {
  struct alignas(2 * sizeof(T)) Two {
    T x, y;
  };
#pragma unroll
  for (int i = 0; i < 4; i += 2)
    *reinterpret_cast<Two*>(tile + c_row(i) * ld + c_col(0)) = {T(sums.r[i]), T(sums.r[i + 1])};
}

// out += a Y and out_dot += a_dot Y + a Y_dot. Y: kStep<T> rows in shared memory, `cols` columns.
template <bool kChange, class T, int kFrags>
__device__ void add_outputs(Sums<T> (&out)[kFrags], Sums<T> (&out_dot)[kFrags], bool wanted, const Left<T>& a,
                            const Left<T>& a_dot, const T* y, const T* y_dot, int ld, int cols) {
#pragma unroll
  for (int f = 0; f < kFrags; f += 2) {
    if (8 * f >= cols) continue;
    if constexpr (kTensor<T>) {
      FragB<T> b[2];
      load_b(b, y + 8 * f, ld);
      if (!kChange || wanted) mma(out[f], a, b[0]), mma(out[f + 1], a, b[1]);
      if (kChange) mma(out_dot[f], a_dot, b[0]), mma(out_dot[f + 1], a_dot, b[1]);
      if (kChange && y_dot) {
        load_b(b, y_dot + 8 * f, ld);
        mma(out_dot[f], a, b[0]), mma(out_dot[f + 1], a, b[1]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = 8 * (f + e / 2) + c_col(e % 2);
        const T b = at < padded<T>(cols) ? y[at] : T(0);
        const T b_dot = kChange && y_dot && at < padded<T>(cols) ? y_dot[at] : T(0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!kChange || wanted) out[f + e / 2].r[2 * i + e % 2] += a.at[i] * b;
          if (kChange) out_dot[f + e / 2].r[2 * i + e % 2] += a_dot.at[i] * b + a.at[i] * b_dot;
        }
      }
    }
  }
}

// f(sum, row, column) for each sum of this lane inside a matrix of `rows` x `cols`; the warp's first row is `first`.
template <class T, int kFrags, class F>
__device__ void each_sum(Sums<T> (&sums)[kFrags], int64_t first, int64_t rows, int cols, const F& f) {
#pragma unroll
  for (int n = 0; n < kFrags; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first + c_row(i);
      const int col = 8 * n + c_col(i);
      if (row < rows && col < cols) f(sums[n].r[i], row, col);
    }
}

}  // namespace
}  // namespace gradops
