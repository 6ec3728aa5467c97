// gram_tiles.cuh: products of all pairs of rows for a table of matrices, in one launch. One block makes the sums of one
// 64 x 64 tile over one slice of the columns of one matrix, on the CUDA cores: numbers are widened on their way into
// shared memory. The caller's own kernel then adds the slices in order.
#pragma once
#include "common/device_number.cuh"
#include "linalg/gram_pairs.h"

namespace gradops {
namespace {

constexpr int kThreads = 128, kTile = 64, kDepth = 32;  // columns in shared memory at a time
constexpr int kRows = kTile / 8, kCols = kTile / 16;    // of a thread's sums; thread = 16 y + x
constexpr int kStride = kTile + 1;                      // stores go down a column: no two in one bank
constexpr int64_t kSlice = 512;                         // columns at least
constexpr int64_t kBlocks = 256;                        // of one matrix, where there are columns enough
constexpr int kMatrices = 32;                           // of a table, which is an argument of the kernel

struct TiledMatrix {  // batch of contiguous rows x cols matrices
  const void* data;
  Element element;
  int edge;  // of a tile as it is stored
  int64_t rows, cols, pairs, slices, slice;
  int64_t block, sums;  // the first of both
};

struct Table {
  int count = 0;
  int64_t blocks = 0, sums = 0;  // in all
  TiledMatrix at[kMatrices];

  void add(const void* data, Element element, int64_t batch, int64_t rows, int64_t cols) {
    TiledMatrix& m = at[count++];
    const int64_t tiles = up(rows, kTile), pairs = tiles * (tiles + 1) / 2,
                  most = pairs < kBlocks ? kBlocks / pairs : 1;
    int64_t slice = up(cols, most);
    slice = up(slice < kSlice ? kSlice : slice, kDepth) * kDepth;
    const int edge = rows < kTile ? int(rows) : kTile;
    m = {data, element, edge, rows, cols, pairs, cols > slice ? up(cols, slice) : 1, slice, blocks, sums};
    blocks += batch * pairs * m.slices;
    sums += batch * pairs * m.slices * edge * edge;
  }
};

// Of item `item`, the sums of slice 0 at (row, col) of its tile; those of the next slice are edge^2 numbers further on.
template <class T>
__device__ const T* sums_at(const TiledMatrix& m, const T* sums, int64_t item, int64_t pair, int64_t entry) {
  return sums + m.sums + (item * m.pairs + pair) * m.slices * m.edge * m.edge + entry;
}
template <class T>
__device__ T over_slices(const TiledMatrix& m, const T* first) {
  T total = 0;
  for (int64_t s = 0; s < m.slices; ++s) total += first[s * m.edge * m.edge];
  return total;
}

template <class T, class S>
__device__ void load(T (*to)[kStride], const S* __restrict__ j, int64_t rows, int64_t cols, int64_t row, int64_t begin,
                     int64_t end) {
  const int64_t column = begin + threadIdx.x % kDepth;
#pragma unroll 4
  for (int r = threadIdx.x / kDepth; r < kTile; r += kThreads / kDepth)
    to[threadIdx.x % kDepth][r] = row + r < rows && column < end ? T(to_double(j[(row + r) * cols + column])) : T(0);
}

template <class S, class T>
__device__ void sum_tile(const TiledMatrix& m, int64_t n, T (*left)[kStride], T (*right)[kStride],
                         T* __restrict__ sums) {
  const Pair at = pair_of(n / m.slices % m.pairs);
  const int64_t begin = n % m.slices * m.slice, end = begin + m.slice < m.cols ? begin + m.slice : m.cols;
  const bool diagonal = at.i == at.j;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const T(*const b)[kStride] = diagonal ? left : right;
  const S* j = static_cast<const S*>(m.data) + n / (m.pairs * m.slices) * m.rows * m.cols;
  T sum[kRows][kCols] = {};
  for (int64_t k = begin; k < end; k += kDepth) {
    load(left, j, m.rows, m.cols, at.i * kTile, k, end);
    if (!diagonal) load(right, j, m.rows, m.cols, at.j * kTile, k, end);
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < kDepth; ++d) {
      T p[kRows], q[kCols];
#pragma unroll
      for (int r = 0; r < kRows; ++r) p[r] = left[d][y + 8 * r];
#pragma unroll
      for (int c = 0; c < kCols; ++c) q[c] = b[d][x + 16 * c];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kCols; ++c) sum[r][c] += p[r] * q[c];
    }
    __syncthreads();
  }
  sums += m.sums + n * m.edge * m.edge;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kCols; ++c)
      if (y + 8 * r < m.edge && x + 16 * c < m.edge) sums[(y + 8 * r) * m.edge + x + 16 * c] = sum[r][c];
}

// sums[matrix][item][pair][slice][edge][edge]
template <class T>
__global__ void __launch_bounds__(kThreads) sum_tiles(const __grid_constant__ Table table, T* __restrict__ sums) {
  __shared__ T left[kDepth][kStride], right[kDepth][kStride];
  int i = table.count - 1;
  while (table.at[i].block > blockIdx.x) --i;
  const TiledMatrix& m = table.at[i];
  const int64_t n = blockIdx.x - m.block;
  switch (m.element) {  // one for the whole block
    case Element::bf16:
      return sum_tile<__nv_bfloat16>(m, n, left, right, sums);
    case Element::f16:
      return sum_tile<__half>(m, n, left, right, sums);
    case Element::f32:
      return sum_tile<float>(m, n, left, right, sums);
    default:
      return sum_tile<double>(m, n, left, right, sums);
  }
}

}  // namespace
}  // namespace gradops
