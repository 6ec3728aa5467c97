// The places are sorted by row (by torch), then every row has blocks that find its places, sum them in order in double,
// one column per thread, and update the row.

#include "common/cuda_launch.h"
#include "common/device_number.cuh"
#include "rl/capo_update_moments.h"

namespace gradops {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    make_keys(const int64_t* __restrict__ rows, const bool* __restrict__ mask, int64_t* __restrict__ keys, int64_t k,
              int64_t places, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < places) keys[i] = mask[i / k] ? rows[i] : count;
}

__device__ int64_t first_not_below(const int64_t* keys, int64_t n, int64_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads)
    update_rows(const __grid_constant__ CapoUpdate t, const int64_t* __restrict__ keys,
                const int64_t* __restrict__ order) {
  const int64_t row = blockIdx.x, k = t.tokens.k, h = t.tokens.h, places = t.tokens.tokens * k;
  const int64_t begin = first_not_below(keys, places, row);  // by every thread: they read the same lines
  if (begin == places || keys[begin] != row) return;
  const int64_t end = first_not_below(keys + begin, places - begin, row + 1) + begin;
  const T* hidden = static_cast<const T*>(t.tokens.hidden);
  const Real* probs = static_cast<const Real*>(t.tokens.probs);
  const Real* advantage = static_cast<const Real*>(t.tokens.advantage);
  for (int64_t c = int64_t(blockIdx.y) * kThreads + threadIdx.x; c < h; c += int64_t(gridDim.y) * kThreads) {
    double g = 0;
    bool any = false;
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i) {
      const int64_t place = order[i], n = place / k, action = t.tokens.action[n];
      if (action >= k) continue;
      any = true;
      const double v = double(place % k == action) - double(probs[place]);
      g += double(advantage[n]) * v * to_double(hidden[n * h + c]);
    }
    if (!any) continue;
    Real* average = static_cast<Real*>(t.average) + row * h + c;
    Real* squares = static_cast<Real*>(t.squares) + row * h + c;
    *average = Real(t.beta1 * double(*average) + (1 - t.beta1) * g);
    *squares = Real(t.beta2 * double(*squares) + (1 - t.beta2) * g * g);
  }
}

}  // namespace

void cuda::capo_update_keys(const CapoUpdate& t, int64_t* keys, void* stream) {
  const int64_t places = t.tokens.tokens * t.tokens.k;
  if (places > 0)
    launch(make_keys, blocks((places + kThreads - 1) / kThreads), kThreads, 0, stream, t.rows, t.mask, keys, t.tokens.k,
           places, t.count);
}

void cuda::capo_update_sorted(const CapoUpdate& t, const int64_t* keys, const int64_t* order, void* stream) {
  if (t.tokens.tokens * t.tokens.k == 0 || t.count == 0 || t.tokens.h == 0) return;
  const int64_t strips = (t.tokens.h + kThreads - 1) / kThreads;
  const dim3 grid(blocks(t.count), unsigned(strips < 65535 ? strips : 65535));
  with_device_type(t.tokens.element, [&](auto type) {
    using T = decltype(type);
    using Real = Arithmetic<T>;
    launch(update_rows<T, Real>, grid, kThreads, 0, stream, t, keys, order);
  });
}

}  // namespace gradops
