#include "common/device_number.cuh"
#include "curvature/silu.h"
#include "curvature/swiglu.h"

namespace gradops {
namespace {

constexpr int kThreads = 256, kEach = 4;  // numbers of a thread, a block's threads side by side

template <class T>
__device__ Arithmetic<T> at(const SwigluRows& x, int64_t row, int64_t col, double otherwise) {
  return Arithmetic<T>(x.data ? to_double(static_cast<const T*>(x.data)[row * x.stride + col]) : otherwise);
}
template <class T>
__device__ void put(void* y, int64_t i, Arithmetic<T> x) {
  if (y) static_cast<T*>(y)[i] = from_double<T>(x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) run(const __grid_constant__ SwigluTask t) {
  using A = Arithmetic<T>;
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kEach) + threadIdx.x, n = t.rows * t.cols;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = first + k * kThreads;
    if (i >= n) return;
    const int64_t row = t.rows == 1 ? 0 : i / t.cols, col = i - row * t.cols;
    const A x = at<T>(t.gate, row, col, 0), u = at<T>(t.up, row, col, 1), xd = at<T>(t.gate_dot, row, col, 0),
            ud = at<T>(t.up_dot, row, col, 0);
    const Silu<A> s = silu_of(x, exp_of(x < A(0) ? x : -x));
    if (!t.backward) {
      put<T>(t.value[0], i, s.value * u);
      put<T>(t.change[0], i, s.slope * xd * u + s.value * ud);
    } else {
      const A w = at<T>(t.g, row, col, 0), wd = at<T>(t.g_dot, row, col, 0);
      put<T>(t.value[0], i, w * u * s.slope);
      put<T>(t.value[1], i, w * s.value);
      put<T>(t.change[0], i, (wd * u + w * ud) * s.slope + w * u * s.curve * xd);
      put<T>(t.change[1], i, wd * s.value + w * s.slope * xd);
    }
  }
}

}  // namespace

void cuda::swiglu(const SwigluTask& t, void* stream) {
  if (t.rows * t.cols == 0) return;
  const unsigned grid = blocks((t.rows * t.cols + kThreads * kEach - 1) / (kThreads * kEach));
  with_device_type(t.element, [&](auto type) { launch(run<decltype(type)>, grid, kThreads, 0, stream, t); });
}

}  // namespace gradops
