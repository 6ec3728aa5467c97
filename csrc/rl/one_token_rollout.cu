// One block per row. Sums are made in a fixed order: by thread, then over the block.
#include <cstring>

#include "common/device_number.cuh"
#include "common/philox.h"
#include "common/reduce.cuh"
#include "rl/one_token_rollout.h"

namespace gradops {
namespace {

constexpr int kThreads = 256, kBatch = 8;  // logits per thread between two looks at the maximum
constexpr int64_t kSegments = 4096;        // at most, of a row: their sums lie in shared memory

__device__ inline int64_t bits_of(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
__device__ inline double number_of(int64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

__host__ __device__ inline int64_t segment_length(int64_t cols) {
  const int64_t least = (cols + kSegments - 1) / kSegments;
  return least <= kRolloutSegment ? kRolloutSegment : (least + 31) / 32 * 32;
}

// Draws k columns with probability exp((z - shift) * inverse) / total, in ascending order, as the CPU kernel does.
template <class T>
__device__ void draw(const T* z, int64_t cols, Arithmetic<T> shift, Arithmetic<T> inverse, uint64_t seed, int64_t k,
                     int64_t* samples, double* upto, double* part) {
  const int64_t length = segment_length(cols), segments = (cols + length - 1) / length;
  const int lane = threadIdx.x % 32;
  const auto weight = [=](int64_t c) { return double(exp_of((Arithmetic<T>(to_double(z[c])) - shift) * inverse)); };
  for (int64_t s = threadIdx.x / 32; s < segments; s += kThreads / 32) {
    double sum = 0;
    for (int64_t c = s * length + lane; c < cols && c < (s + 1) * length; c += 32) sum += weight(c);
    sum = warp_all(sum, Add());
    if (lane == 0) upto[s] = sum;
  }
  // Partial sums of exponential numbers, in the memory of the samples for now.
  for (int64_t i = threadIdx.x; i < k; i += kThreads) samples[i] = bits_of(-log(philox_uniform(seed, i)));
  __syncthreads();
  const int64_t run = (segments + kThreads - 1) / kThreads, first = threadIdx.x * run;
  const int64_t last = first + run < segments ? first + run : segments;
  double sum = 0;
  for (int64_t s = first; s < last; ++s) upto[s] = sum += upto[s];
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double before = 0;
    for (int i = 0; i < kThreads; ++i) {
      const double next = before + part[i];
      part[i] = before, before = next;
    }
    double waited = 0;
    for (int64_t i = 0; i < k; ++i) samples[i] = bits_of(waited += number_of(samples[i]));
    part[kThreads] = before / (waited - log(philox_uniform(seed, k)));
  }
  __syncthreads();
  for (int64_t s = first; s < last; ++s) upto[s] += part[threadIdx.x];
  __syncthreads();
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    const double r = number_of(samples[i]) * part[kThreads];
    int64_t low = 0, high = segments - 1;  // the first segment with upto > r
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (upto[middle] <= r)
        low = middle + 1;
      else
        high = middle;
    }
    const int64_t begin = low * length, end = begin + length < cols ? begin + length : cols;
    double reached = low ? upto[low - 1] : 0;
    int64_t pick = end, reserve = begin;  // the segment's sum may round to more than its parts
    for (int64_t c = begin; c < end && pick == end; ++c) {
      const double w = weight(c);
      if (w > 0) reserve = c;
      if (reached + w > r) pick = c;
      reached += w;
    }
    samples[i] = pick < end ? pick : reserve;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ OneTokenRolloutTask t) {
  using C = Arithmetic<T>;
  __shared__ double scratch[32], part[kThreads + 1];
  GRADOPS_DYNAMIC_SHARED(double, upto);
  const int64_t row = blockIdx.x, x = t.targets[row];
  const T* z = static_cast<const T*>(t.logits) + row * t.cols;
  const C inverse = C(1 / t.temperature), none = -C(INFINITY);
  C max = none;
  double p = 0, q = 0, qd = 0;
  for (int64_t begin = 0; begin < t.cols; begin += kThreads * kBatch) {
    C v[kBatch], big = max;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t c = begin + i * kThreads + threadIdx.x;
      v[i] = c < t.cols ? C(to_double(z[c])) : none;
      big = v[i] > big ? v[i] : big;
    }
    if (big > max) {
      if (max > none) {
        const double d = double(max) - double(big), scale = exp(d / t.temperature);
        p *= exp(d);
        qd = scale * (qd + q * d);
        q *= scale;
      }
      max = big;
    }
    const C shift = max > none ? max : C(0);
    C bp = 0, bq = 0, bqd = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const C d = v[i] - shift, e = exp_of(d * inverse);
      bp += exp_of(d);
      bq += e;
      bqd += e * (d < C(-1e30) ? C(-1e30) : d);
    }
    p += double(bp), q += double(bq), qd += double(bqd);
  }
  const C row_max = C(block_all(double(max), -double(INFINITY), scratch, Larger()));
  if (max > none && max < row_max) {
    const double d = double(max) - double(row_max), scale = exp(d / t.temperature);
    p *= exp(d);
    qd = scale * (qd + q * d);
    q *= scale;
  }
  const double log_p = log(block_all(p, 0., scratch, Add())), sum_q = block_all(q, 0., scratch, Add());
  const double sum_qd = block_all(qd, 0., scratch, Add()), log_q = log(sum_q);
  const bool inside = x >= 0 && x < t.cols;
  double loss = 0;
  if (t.k) {
    int64_t* samples = t.samples + row * t.k;
    draw(z, t.cols, row_max > none ? row_max : C(0), inverse, uint64_t(t.seeds[row]), t.k, samples, upto, part);
    for (int64_t i = threadIdx.x; i < t.k; i += kThreads)
      loss -= (samples[i] == x ? 1 : t.beta) * (to_double(z[samples[i]]) - double(row_max) - log_p);
    loss = block_all(loss, 0., scratch, Add()) / double(t.k);
  } else if (inside) {
    const double d = to_double(z[x]) - double(row_max), w = exp(d / t.temperature - log_q);
    loss = -(w == 0 ? 0 : (1 - t.beta) * w * (d - log_p)) - t.beta * (sum_qd / sum_q - log_p);
  }
  if (threadIdx.x == 0) {
    double* state = t.state + 3 * row;
    state[0] = double(row_max), state[1] = log_p, state[2] = log_q;
    static_cast<C*>(t.loss)[row] = inside ? C(loss) : C(NAN);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ OneTokenRolloutBackwardTask t) {
  using C = Arithmetic<T>;
  __shared__ double scratch[32];
  const int64_t row = blockIdx.x, x = t.targets[row];
  const T* z = static_cast<const T*>(t.logits) + row * t.cols;
  T* to = static_cast<T*>(t.grad_logits) + row * t.cols;
  const int64_t* samples = t.samples + row * t.k;
  const double* state = t.state + 3 * row;
  const bool inside = x >= 0 && x < t.cols;
  const double g = inside ? double(static_cast<const C*>(t.grad)[row]) : double(NAN);
  const C max = C(state[0]), log_p = C(state[1]), log_q = C(state[2]), inverse = C(1 / t.temperature);
  double q = 0, reward = 0;
  if (t.k) {
    for (int64_t i = threadIdx.x; i < t.k; i += kThreads) reward += samples[i] == x ? 1 : t.beta;
    reward = block_all(reward, 0., scratch, Add()) / double(t.k);
  } else {
    if (inside) q = exp((to_double(z[x]) - state[0]) / t.temperature - state[2]);
    reward = (1 - t.beta) * q + t.beta;
  }
  const C on_p = C(g * reward), on_q = C(t.k ? 0 : g * t.beta);
  for (int64_t c = threadIdx.x; c < t.cols; c += kThreads) {
    const C d = C(to_double(z[c])) - max;
    to[c] = from_double<T>(double(on_p * exp_of(d - log_p) - (t.k ? C(0) : on_q * exp_of(d * inverse - log_q))));
  }
  __syncthreads();
  const auto on_target = [&](int64_t c, double w) {
    to[c] = from_double<T>(g * reward * double(exp_of(C(to_double(z[c])) - max - log_p)) - g * w);
  };
  if (t.k == 0 && threadIdx.x == 0 && inside) on_target(x, q);
  for (int64_t i = threadIdx.x; i < t.k; i += kThreads) {
    const int64_t c = samples[i];
    if (c < 0 || c >= t.cols || (i > 0 && samples[i - 1] == c)) continue;  // the first of its run does the work
    int64_t end = i + 1;
    while (end < t.k && samples[end] == c) ++end;
    on_target(c, (c == x ? 1 : t.beta) * double(end - i) / double(t.k));
  }
}

}  // namespace

void cuda::one_token_rollout(const OneTokenRolloutTask& t, void* stream) {
  if (t.rows == 0) return;
  const int64_t length = segment_length(t.cols), segments = (t.cols + length - 1) / length;
  with_device_type(t.element, [&](auto type) {
    launch(forward<decltype(type)>, blocks(t.rows), kThreads, t.k ? size_t(segments) * sizeof(double) : 0, stream, t);
  });
}

void cuda::one_token_rollout_backward(const OneTokenRolloutBackwardTask& t, void* stream) {
  if (t.rows == 0) return;
  with_device_type(t.element,
                   [&](auto type) { launch(backward<decltype(type)>, blocks(t.rows), kThreads, 0, stream, t); });
}

}  // namespace gradops
