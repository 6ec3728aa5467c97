#include "common/device_number.cuh"
#include "curvature/rope.h"

namespace gradops {
namespace {

constexpr int kThreads = 256;

// A warp has a row; a lane has a pair at a time, then a number that is copied.
template <class T, class C>
__global__ void __launch_bounds__(kThreads) run(const __grid_constant__ RopeTask t) {
  using A = Arithmetic<T>;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= t.rows) return;
  const T* x = static_cast<const T*>(t.x);
  const C *cos = static_cast<const C*>(t.cos), *sin = static_cast<const C*>(t.sin);
  T* y = static_cast<T*>(t.y) + row * t.cols;
  int64_t rest = row;
  for (int k = t.dims - 1; k >= 0; --k) {
    const int64_t i = rest % t.dim[k].size;
    rest /= t.dim[k].size;
    x += i * t.dim[k].x, cos += i * t.dim[k].cos, sin += i * t.dim[k].sin;
  }
  const A sign = t.inverse ? -1 : 1;
  for (int64_t j = threadIdx.x % 32; j < t.pairs; j += 32) {
    const int64_t first = t.interleaved ? 2 * j : j, second = t.interleaved ? first + 1 : first + t.pairs;
    const A c = A(to_double(cos[j])), s = sign * A(to_double(sin[j]));
    const A a = A(to_double(x[first])), b = A(to_double(x[second]));
    y[first] = from_double<T>(a * c - b * s);
    y[second] = from_double<T>(a * s + b * c);
  }
  for (int64_t j = 2 * t.pairs + threadIdx.x % 32; j < t.cols; j += 32) y[j] = x[j];
}

}  // namespace

void cuda::rope(const RopeTask& t, void* stream) {
  if (t.rows * t.cols == 0) return;
  const unsigned grid = blocks((t.rows + kThreads / 32 - 1) / (kThreads / 32));
  with_device_type(t.element, [&](auto type) {
    using T = decltype(type);
    launch(t.table == t.element ? run<T, T> : run<T, Arithmetic<T>>, grid, kThreads, 0, stream, t);
  });
}

}  // namespace gradops
