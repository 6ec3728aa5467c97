// A thread owns a column: reads run along the rows, and every sum is made in the order of the rows.
#include "common/device_number.cuh"
#include "linalg/jt_apply.h"

namespace gradops {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) columns(const T* __restrict__ j, const double* __restrict__ w,
                                                    T* __restrict__ y, int64_t rows, int64_t cols, int64_t pieces) {
  const int64_t item = blockIdx.x / pieces, c = blockIdx.x % pieces * kThreads + threadIdx.x;
  if (c >= cols) return;
  j += item * rows * cols + c;
  w += item * rows;
  double sum = 0;
#pragma unroll 8
  for (int64_t b = 0; b < rows; ++b) sum += w[b] * to_double(j[b * cols]);
  y[item * cols + c] = from_double<T>(sum);
}

}  // namespace

void cuda::jt_apply(const JtApplyTask& t, void* stream) {
  if (t.batch == 0 || t.cols == 0) return;
  const int64_t pieces = (t.cols + kThreads - 1) / kThreads;
  with_device_type(t.element, [&](auto type) {
    using T = decltype(type);
    launch(columns<T>, blocks(t.batch * pieces), kThreads, 0, stream, static_cast<const T*>(t.j), t.w,
           static_cast<T*>(t.y), t.rows, t.cols, pieces);
  });
}

}  // namespace gradops
