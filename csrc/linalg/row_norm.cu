// Sums are made in double and in a fixed order. With `center`, column sums are made per chunk of
// kChunk rows and the chunks are added in order.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "linalg/row_norm.h"

namespace gradops {
namespace {

constexpr int kThreads = 128, kChunk = 256;
struct LargerOrNan {
  __device__ double operator()(double a, double b) const { return a > b || a != a ? a : b; }
};

// The norm of a row, seen by all threads that share it: a block, or a warp (scratch is null).
template <class F>
__device__ double shared_norm(int64_t cols, int first, int threads, double* scratch, bool is_double, F at) {
  const auto all = [=](double v, auto op) { return scratch ? block_all(v, 0., scratch, op) : warp_all(v, op); };
  double s = 0;
  for (int64_t c = first; c < cols; c += threads) s += at(c) * at(c);
  s = all(s, Add());
  if (!is_double || (s > 1e-280 && s < 1e300) || s != s) return sqrt(s);
  double big = 0;  // squares have left the range of double: divide by the largest entry
  for (int64_t c = first; c < cols; c += threads) big = LargerOrNan()(fabs(at(c)), big);
  big = all(big, LargerOrNan());
  if (big == 0 || big > 1.7976931348623157e308) return big;
  s = 0;
  for (int64_t c = first; c < cols; c += threads) s += (at(c) / big) * (at(c) / big);
  return big * sqrt(all(s, Add()));
}

// One row per warp, or per block if kBlock. Writes y (mean == null), or else only inverse.
template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads)
    norm_rows(const T* __restrict__ x, T* __restrict__ y, double* __restrict__ inverse, const double* __restrict__ mean,
              int64_t all_rows, int64_t rows, int64_t cols, double eps) {
  __shared__ double scratch[32];
  const int threads = kBlock ? kThreads : 32, first = threadIdx.x % threads;
  const int64_t r = int64_t(blockIdx.x) * (kThreads / threads) + threadIdx.x / threads;
  if (r >= all_rows) return;  // whole warps leave, and only where a warp has a row of its own
  const T* xr = x + r * cols;
  const double* m = mean ? mean + r / rows * cols : nullptr;
  const double norm = shared_norm(cols, first, threads, kBlock ? scratch : nullptr, sizeof(T) == 8,
                                  [=](int64_t c) { return to_double(xr[c]) - (m ? m[c] : 0.); });
  const double inv = norm == 0 ? 0. : 1. / (norm + eps);
  if (inverse) {
    if (first == 0) inverse[r] = inv;
  } else {
    for (int64_t c = first; c < cols; c += threads) y[r * cols + c] = from_double<T>(to_double(xr[c]) * inv);
  }
}

// partial[item][chunk][c] = sum over the chunk's rows of x, or of (x - mean) * inverse.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_columns(const T* __restrict__ x, const double* __restrict__ mean, const double* __restrict__ inverse,
                double* __restrict__ partial, int64_t rows, int64_t cols, int64_t chunks) {
  const int64_t c = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t item = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  if (c >= cols) return;
  double s = 0;
  for (int64_t i = chunk * kChunk; i < rows && i < (chunk + 1) * kChunk; ++i) {
    const double v = to_double(x[(item * rows + i) * cols + c]);
    s += mean ? (v - mean[item * cols + c]) * inverse[item * rows + i] : v;
  }
  partial[(item * chunks + chunk) * cols + c] = s;
}

__global__ void __launch_bounds__(kThreads)
    average(const double* __restrict__ partial, double* __restrict__ mean, int64_t rows, int64_t cols, int64_t chunks) {
  const int64_t c = int64_t(blockIdx.y) * kThreads + threadIdx.x, item = blockIdx.x;
  if (c >= cols) return;
  double s = 0;
  for (int64_t k = 0; k < chunks; ++k) s += partial[(item * chunks + k) * cols + c];
  mean[item * cols + c] = s / double(rows);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    write_centered(const T* __restrict__ x, T* __restrict__ y, const double* __restrict__ mean,
                   const double* __restrict__ inverse, const double* __restrict__ mean_after, int64_t rows,
                   int64_t cols) {
  const int64_t r = blockIdx.x, item = r / rows;
  for (int64_t c = threadIdx.x; c < cols; c += blockDim.x) {
    const double v = (to_double(x[r * cols + c]) - mean[item * cols + c]) * inverse[r];
    y[r * cols + c] = from_double<T>(v - mean_after[item * cols + c]);
  }
}

int64_t chunks_of(const RowNormTask& t) { return (t.rows + kChunk - 1) / kChunk; }

template <class T>
void run(const RowNormTask& t, double* memory, void* stream) {
  const T* x = static_cast<const T*>(t.x);
  T* y = static_cast<T*>(t.y);
  const int64_t all = t.batch * t.rows, chunks = chunks_of(t);
  const bool wide = t.cols > 1024;
  const unsigned row_blocks = blocks(wide ? all : (all + kThreads / 32 - 1) / (kThreads / 32));
  const auto norm = wide ? norm_rows<T, true> : norm_rows<T, false>;
  if (!t.center) {
    launch(norm, row_blocks, kThreads, 0, stream, x, y, nullptr, nullptr, all, t.rows, t.cols, t.eps);
    return;
  }
  double *partial = memory, *mean = partial + t.batch * chunks * t.cols, *after = mean + t.batch * t.cols,
         *inverse = after + t.batch * t.cols;
  const int64_t col_blocks = (t.cols + kThreads - 1) / kThreads;
  if (col_blocks > 65535) throw std::runtime_error("row_norm: x has too many columns for center=True");
  const dim3 grid(blocks(t.batch * chunks), unsigned(col_blocks)), columns(blocks(t.batch), unsigned(col_blocks));
  launch(sum_columns<T>, grid, kThreads, 0, stream, x, nullptr, nullptr, partial, t.rows, t.cols, chunks);
  launch(average, columns, kThreads, 0, stream, partial, mean, t.rows, t.cols, chunks);
  launch(norm, row_blocks, kThreads, 0, stream, x, nullptr, inverse, mean, all, t.rows, t.cols, t.eps);
  launch(sum_columns<T>, grid, kThreads, 0, stream, x, mean, inverse, partial, t.rows, t.cols, chunks);
  launch(average, columns, kThreads, 0, stream, partial, after, t.rows, t.cols, chunks);
  launch(write_centered<T>, blocks(all), kThreads, 0, stream, x, y, mean, inverse, after, t.rows, t.cols);
}

}  // namespace

int64_t cuda::row_norm_workspace(const RowNormTask& t) {
  return t.center ? 8 * t.batch * ((chunks_of(t) + 2) * t.cols + t.rows) : 0;
}

void cuda::row_norm(const RowNormTask& t, void* workspace, void* stream) {
  if (t.batch == 0 || t.rows == 0 || t.cols == 0) return;
  with_device_type(t.element, [&](auto type) { run<decltype(type)>(t, static_cast<double*>(workspace), stream); });
}

}  // namespace gradops
