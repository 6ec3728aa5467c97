// One block makes the sums of one 64 x 64 tile of G over one slice of the columns, on the CUDA cores: numbers are
// widened on their way into shared memory. The slices are then added in order.
#include "common/device_number.cuh"
#include "linalg/gram.h"

namespace gradops {
namespace {

constexpr int kThreads = 128, kTile = 64, kDepth = 32;  // columns of J in shared memory at a time
constexpr int kRows = kTile / 8, kCols = kTile / 16;    // of a thread's sums; thread = 16 y + x
constexpr int kStride = kTile + 1;                      // stores go down a column: no two in one bank
constexpr int64_t kSlice = 512;                         // columns at least
constexpr int64_t kBlocks = 256;                        // of one matrix, where there are columns enough

__host__ __device__ constexpr int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Plan {
  int64_t tiles, pairs, slices, slice;
  int edge;  // of a tile as it is stored
  explicit Plan(const GramTask& t)
      : tiles(up(t.rows, kTile)),
        pairs(tiles * (tiles + 1) / 2),
        slices(pairs < kBlocks ? kBlocks / pairs : 1),
        slice(up(t.cols, slices)),
        edge(t.rows < kTile ? int(t.rows) : kTile) {
    slice = up(slice < kSlice ? kSlice : slice, kDepth) * kDepth;
    slices = t.cols > slice ? up(t.cols, slice) : 1;
  }
};

struct Pair {
  int64_t row, col;
};
__device__ Pair pair_of(int64_t n) {  // the n-th of (0, 0), (1, 0), (1, 1), (2, 0), ..., in rows and columns of G
  int64_t i = 0;
  while (n > i) n -= ++i;
  return {i * kTile, n * kTile};
}

template <class T, class S>
__device__ T widened(S x) {
  if constexpr (sizeof(T) == 4)
    return float(x);
  else
    return to_double(x);
}

template <class T, class S>
__device__ void load(T (*to)[kStride], const S* __restrict__ j, int64_t rows, int64_t cols, int64_t row, int64_t begin,
                     int64_t end) {
  const int64_t column = begin + threadIdx.x % kDepth;
#pragma unroll 4
  for (int r = threadIdx.x / kDepth; r < kTile; r += kThreads / kDepth)
    to[threadIdx.x % kDepth][r] = row + r < rows && column < end ? widened<T>(j[(row + r) * cols + column]) : T(0);
}

// partial[item][pair][slice][edge][edge]
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    sum_tiles(const S* __restrict__ j, T* __restrict__ partial, int64_t rows, int64_t cols, int64_t pairs,
              int64_t slices, int64_t slice, int edge) {
  __shared__ T left[kDepth][kStride], right[kDepth][kStride];
  const int64_t n = blockIdx.x, item = n / (pairs * slices);
  const Pair at = pair_of(n / slices % pairs);
  const int64_t begin = n % slices * slice, end = begin + slice < cols ? begin + slice : cols;
  const bool diagonal = at.row == at.col;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const T(*const b)[kStride] = diagonal ? left : right;
  j += item * rows * cols;
  T sum[kRows][kCols] = {};
  for (int64_t k = begin; k < end; k += kDepth) {
    load(left, j, rows, cols, at.row, k, end);
    if (!diagonal) load(right, j, rows, cols, at.col, k, end);
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
  partial += n * edge * edge;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kCols; ++c)
      if (y + 8 * r < edge && x + 16 * c < edge) partial[(y + 8 * r) * edge + x + 16 * c] = sum[r][c];
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_slices(const T* __restrict__ partial, T* __restrict__ g, int64_t rows,
                                                       int64_t pairs, int64_t slices, int edge) {
  const Pair at = pair_of(blockIdx.x % pairs);
  const int64_t size = int64_t(edge) * edge;
  partial += blockIdx.x * slices * size;
  g += blockIdx.x / pairs * rows * rows;
  for (int e = threadIdx.x; e < size; e += kThreads) {
    const int64_t row = at.row + e / edge, col = at.col + e % edge;
    if (row >= rows || col > row) continue;
    T total = 0;
    for (int64_t s = 0; s < slices; ++s) total += partial[s * size + e];
    g[row * rows + col] = g[col * rows + row] = total;
  }
}

template <class S, class T>
void run(const GramTask& t, void* workspace, void* stream) {
  const Plan p(t);
  T* partial = static_cast<T*>(workspace);
  launch(sum_tiles<S, T>, blocks(t.batch * p.pairs * p.slices), kThreads, 0, stream, static_cast<const S*>(t.j),
         partial, t.rows, t.cols, p.pairs, p.slices, p.slice, p.edge);
  launch(add_slices<T>, blocks(t.batch * p.pairs), kThreads, 0, stream, partial, static_cast<T*>(t.g), t.rows, p.pairs,
         p.slices, p.edge);
}

}  // namespace

int64_t cuda::gram_workspace(const GramTask& t) {
  const Plan p(t);
  return t.batch * p.pairs * p.slices * p.edge * p.edge * (t.wide ? 8 : 4);
}

void cuda::gram(const GramTask& t, void* workspace, void* stream) {
  if (t.batch == 0 || t.rows == 0) return;
  with_device_type(t.element, [&](auto type) {
    using S = decltype(type);
    if (t.wide) return run<S, double>(t, workspace, stream);
    if constexpr (sizeof(S) < 8) run<S, float>(t, workspace, stream);
  });
}

}  // namespace gradops
