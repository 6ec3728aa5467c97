// One block per token. The warps share the support, the lanes a row; sums over rows are made in double (over lanes in
// the precision of the moments), in a fixed order.
#include <cmath>

#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "rl/capo_curvature.h"

namespace gradops {
namespace {

constexpr int kThreads = 128;

template <class Real>
struct Out {
  Real *grad_dot, *hess, *fisher;
  __device__ void put(int64_t n, double advantage, double vu, double pu, double puu) const {
    grad_dot[n] = Real(advantage * vu);
    hess[n] = Real(advantage * (vu * vu - (puu - pu * pu)));
    fisher[n] = Real(vu * vu);
  }
};

template <class T>
__device__ double squared_norm(const T* x, int64_t n, double* scratch) {
  double s = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) s += to_double(x[i]) * to_double(x[i]);
  return block_all(s, 0., scratch, Add());
}

template <class T, class Real>
__device__ Real adam_dot(const CapoAdam& t, double g, const T* __restrict__ h, int64_t row, int64_t n) {
  const Real* m = static_cast<const Real*>(t.average) + row * n;
  const Real* s = static_cast<const Real*>(t.squares) + row * n;
  const Real old1 = Real(t.old1), new1 = Real(t.new1 * g), old2 = Real(t.old2), new2 = Real(t.new2 * g * g);
  const Real eps = Real(t.eps);
  Real sum = 0;
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) {
    const Real x = Real(to_double(h[i])), first = old1 * m[i] + new1 * x, second = old2 * s[i] + new2 * (x * x);
    sum += x * first / (sqrt(second) + eps);
  }
  return warp_all(sum, Add());
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads)
    tokens(const __grid_constant__ CapoTokens t, const __grid_constant__ CapoAdam adam, Out<Real> out) {
  __shared__ double scratch[32];
  const int64_t n = blockIdx.x;
  const T* hidden = static_cast<const T*>(t.hidden) + n * t.h;
  const Real* probs = static_cast<const Real*>(t.probs) + n * t.k;
  const double advantage = double(static_cast<const Real*>(t.advantage)[n]);
  const int64_t action = t.action[n];
  const double nan = double(NAN);
  double vu = 0, pu = 0, puu = 0;
  const auto add = [&](double p, double v, double u) { vu += v * u, pu += p * u, puu += p * u * u; };
  if (adam.rows) {
    const int lane = threadIdx.x % 32;
    for (int64_t k = threadIdx.x / 32; k < t.k; k += kThreads / 32) {  // whole warps
      const int64_t row = adam.rows[n * t.k + k];
      const double p = double(probs[k]), v = double(k == action) - p;
      double u = nan;
      if (row >= 0 && row < adam.count) u = double(adam_dot<T, Real>(adam, advantage * v, hidden, row, t.h));
      if (lane == 0) add(p, v, u);
    }
  } else {
    const double scale = advantage * squared_norm(hidden, t.h, scratch);
    for (int64_t k = threadIdx.x; k < t.k; k += kThreads) {
      const double p = double(probs[k]), v = double(k == action) - p;
      add(p, v, scale * v);
    }
  }
  vu = block_all(vu, 0., scratch, Add());
  pu = block_all(pu, 0., scratch, Add());
  puu = block_all(puu, 0., scratch, Add());
  if (threadIdx.x == 0) out.put(n, action < t.k ? advantage : nan, action < t.k ? vu : nan, pu, puu);
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads)
    closed(const __grid_constant__ CapoTokens t, const Real* __restrict__ logp, const Real* __restrict__ sum_p2,
           const Real* __restrict__ sum_p3, Out<Real> out) {
  __shared__ double scratch[32];
  const int64_t n = blockIdx.x;
  const double advantage = double(static_cast<const Real*>(t.advantage)[n]);
  const double scale = advantage * squared_norm(static_cast<const T*>(t.hidden) + n * t.h, t.h, scratch);
  if (threadIdx.x > 0) return;
  const auto not_below_zero = [](double x) { return x < 0 ? 0. : x; };  // a NaN passes
  const double p = exp(double(logp[n])), others2 = not_below_zero(double(sum_p2[n]) - p * p),
               others3 = not_below_zero(double(sum_p3[n]) - p * p * p);
  const double vv = (1 - p) * (1 - p) + others2, pv = p * (1 - p) - others2, pvv = p * (1 - p) * (1 - p) + others3;
  out.put(n, advantage, scale * vv, scale * pv, scale * scale * pvv);
}

template <class Real>
Out<Real> typed(const CapoResults& out) {
  return {static_cast<Real*>(out.grad_dot), static_cast<Real*>(out.hess), static_cast<Real*>(out.fisher)};
}

}  // namespace

void cuda::capo_curvature(const CapoTokens& t, const CapoAdam& adam, const CapoResults& out, void* stream) {
  if (t.tokens == 0) return;
  with_device_type(t.element, [&](auto type) {
    using T = decltype(type);
    using Real = Arithmetic<T>;
    launch(tokens<T, Real>, blocks(t.tokens), kThreads, 0, stream, t, adam, typed<Real>(out));
  });
}

void cuda::capo_curvature_sgd(const CapoTokens& t, const CapoMoments& m, const CapoResults& out, void* stream) {
  if (t.tokens == 0) return;
  with_device_type(t.element, [&](auto type) {
    using T = decltype(type);
    using Real = Arithmetic<T>;
    launch(closed<T, Real>, blocks(t.tokens), kThreads, 0, stream, t, static_cast<const Real*>(m.logp),
           static_cast<const Real*>(m.sum_p2), static_cast<const Real*>(m.sum_p3), typed<Real>(out));
  });
}

}  // namespace gradops
