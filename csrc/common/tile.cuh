// tile.cuh: products of 32 x 32 tiles, one warp each, sums in fp32.
//
// What the operands are made of decides how they are multiplied: bf16 and fp16 on tensor cores; a
// sum of two bf16 matrices (kParts = 2) too, in three products; float on the CUDA cores.
#pragma once
#include "common/mma.h"

namespace gradops {

// Two numbers side by side.
__device__ inline float2 widen(float2 v) { return v; }
__device__ inline float2 widen(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ inline float2 widen(__half2 v) { return __half22float2(v); }
template <class T>
__device__ inline auto narrow(float2 v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __float22half2_rn(v);
  else
    return __float22bfloat162_rn(v);
}
template <class T>
using Pair = decltype(narrow<T>(float2()));

// Row-major, in shared or global memory: the sum of kParts matrices of T, `part` elements apart.
// Each part holds what the parts before it rounded away. Index: int64_t where i * ld may not be an int.
template <class T, int kParts, class Index = int>
struct Matrix {
  T* p;
  int ld;
  Index part;

  __device__ Matrix block(int i, int j) const { return {p + Index(i) * ld + j, ld, part}; }
  __device__ T* at(int q, int i, int j) const { return p + q * part + Index(i) * ld + j; }

  __device__ float get(int i, int j) const {
    float v = 0.f;
#pragma unroll
    for (int q = 0; q < kParts; ++q) v += float(*at(q, i, j));
    return v;
  }
  __device__ void put(int i, int j, float v) const {
#pragma unroll
    for (int q = 0; q < kParts; ++q) {
      const T t(v);
      *at(q, i, j) = t;
      v -= float(t);
    }
  }
  // Columns j and j + 1; j is even.
  __device__ float2 get_pair(int i, int j) const {
    float2 v = make_float2(0.f, 0.f);
#pragma unroll
    for (int q = 0; q < kParts; ++q) {
      const float2 w = widen(*reinterpret_cast<const Pair<T>*>(at(q, i, j)));
      v.x += w.x, v.y += w.y;
    }
    return v;
  }
  __device__ void put_pair(int i, int j, float2 v) const {
#pragma unroll
    for (int q = 0; q < kParts; ++q) {
      const Pair<T> t = narrow<T>(v);
      *reinterpret_cast<Pair<T>*>(at(q, i, j)) = t;
      v.x -= widen(t).x, v.y -= widen(t).y;
    }
  }
};

// The sums of one warp. Lane 4 g + t holds rows g, g + 8, g + 16, g + 24 and four pairs of columns.
template <class T>
struct Tile {
  FragC sum[2][4];

  __device__ static int row(int r) { return mma_lane() / 4 + 8 * r; }
  __device__ static int col(int c) {  // of the pair's first; float: two runs of four, for vector loads
    if constexpr (std::is_same_v<T, float>)
      return mma_lane() % 4 * 4 + c / 2 * 16 + c % 2 * 2;
    else
      return mma_lane() % 4 * 2 + c * 8;
  }
  __device__ float& at(int r, int c, int e) { return sum[r / 2][c].r[r % 2 * 2 + e]; }

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) at(r, c, 0) = at(r, c, 1) = 0.f;
  }
  // f(row, column, sums at column and column + 1) for every pair of this lane.
  template <class F>
  __device__ void each_pair(F f) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) f(row(r), col(c), make_float2(at(r, c, 0), at(r, c, 1)));
  }
};

// tile += P Q (P: 32 x k, Q: k x 32), or P Q^T (Q: 32 x k) if kTransposed; in shared memory; k % 16 == 0.
template <bool kTransposed, class T, int kParts>
__device__ inline void add_product(Tile<T>& tile, const Matrix<T, kParts>& P, const Matrix<T, kParts>& Q, int k) {
#pragma unroll 2
  for (int kk = 0; kk < k; kk += 16) {
    FragB<T> b[kParts][2][2];
#pragma unroll
    for (int q = 0; q < kParts; ++q)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if constexpr (kTransposed)
          load_b_transposed(b[q][c], Q.at(q, 16 * c, kk), Q.ld);
        else
          load_b(b[q][c], Q.at(q, kk, 16 * c), Q.ld);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      FragA<T> a[kParts];
#pragma unroll
      for (int q = 0; q < kParts; ++q) load_a(a[q], P.at(q, 16 * r, kk), P.ld);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if constexpr (kParts == 2) {  // low times low is below what is kept
          mma(tile.sum[r][c], a[1], b[0][c / 2][c % 2]);
          mma(tile.sum[r][c], a[0], b[1][c / 2][c % 2]);
        }
        mma(tile.sum[r][c], a[0], b[0][c / 2][c % 2]);
      }
    }
  }
}
template <bool kTransposed>
__device__ inline void add_product(Tile<float>& tile, const Matrix<float, 1>& P, const Matrix<float, 1>& Q, int k) {
  const auto load = [](const Matrix<float, 1>& M, int i, int j, float (&v)[4]) {
    const float4 q = *reinterpret_cast<const float4*>(M.at(0, i, j));
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  };
  for (int kk = 0; kk < k; kk += 4) {
    float p[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) load(P, tile.row(r), kk, p[r]);
    if constexpr (kTransposed) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float q[4];
        load(Q, tile.col(c / 2) + c % 2, kk, q);
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int r = 0; r < 4; ++r) tile.at(r, c / 2, c % 2) = fmaf(p[r][e], q[e], tile.at(r, c / 2, c % 2));
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float q[4];
          load(Q, kk + e, tile.col(2 * h), q);
#pragma unroll
          for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c)
              tile.at(r, 2 * h + c / 2, c % 2) = fmaf(p[r][e], q[c], tile.at(r, 2 * h + c / 2, c % 2));
        }
    }
  }
}

}  // namespace gradops
