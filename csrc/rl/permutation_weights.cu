// One block per group: its warps share the answers. Sums in double, in a fixed order.
#include <cmath>

#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "rl/permutation_weights.h"

namespace gradops {
namespace {

constexpr int kThreads = 128;

template <class T, class Real>
__global__ void __launch_bounds__(kThreads) groups(const __grid_constant__ PermutationWeights t) {
  __shared__ double scratch[32];
  const T* logp = static_cast<const T*>(t.logp);
  Real* weights = static_cast<Real*>(t.weights);
  const int64_t first = t.offsets[blockIdx.x], last = t.offsets[blockIdx.x + 1];
  if (first < 0 || last > t.answers) return;  // by the whole block; the weights were set to NaN
  const int lane = threadIdx.x % 32;
  for (int64_t i = first + threadIdx.x / 32; i < last; i += kThreads / 32) {  // whole warps
    const int64_t from = t.cu_seqlens[i], to = t.cu_seqlens[i + 1];
    double s = 0;
    const bool good = from >= 0 && to <= t.tokens;
    for (int64_t j = from + lane; good && j < to; j += 32) s += to_double(logp[j]);
    s = warp_all(s, Add());
    if (lane == 0) t.means[i] = good ? s / (double(to - from) * t.tau) : double(NAN);
  }
  __syncthreads();
  double most = -double(INFINITY);
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) most = Larger()(t.means[i], most);
  most = block_all(most, -double(INFINITY), scratch, Larger());
  double sum = 0;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) sum += exp(t.means[i] - most);
  const double scale = 1 / block_all(sum, 0., scratch, Add());
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) weights[i] = Real(exp(t.means[i] - most) * scale);
}

template <class Real>
__global__ void __launch_bounds__(kThreads) fill_nan(Real* __restrict__ x, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) x[i] = Real(NAN);
}

template <class T>
void run(const PermutationWeights& t, void* stream) {
  using Real = Arithmetic<T>;
  launch(fill_nan<Real>, blocks((t.answers + kThreads - 1) / kThreads), kThreads, 0, stream,
         static_cast<Real*>(t.weights), t.answers);
  launch(groups<T, Real>, blocks(t.groups), kThreads, 0, stream, t);
}

}  // namespace

void cuda::permutation_weights(const PermutationWeights& t, void* stream) {
  if (t.answers == 0 || t.groups == 0) return;
  with_device_type(t.element, [&](auto type) { run<decltype(type)>(t, stream); });
}

}  // namespace gradops
