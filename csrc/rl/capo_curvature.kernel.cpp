#include "rl/capo_curvature.h"

#include "common/exp_log.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

struct Sums {  // over the support, in double
  double vu = 0, pu = 0, puu = 0;
};

template <class Real>
void put(const CapoResults& out, int64_t n, double advantage, const Sums& s) {
  static_cast<Real*>(out.grad_dot)[n] = Real(advantage * s.vu);
  static_cast<Real*>(out.hess)[n] = Real(advantage * (s.vu * s.vu - (s.puu - s.pu * s.pu)));
  static_cast<Real*>(out.fisher)[n] = Real(s.vu * s.vu);
}

template <class T>
double squared_norm(const T* x, int64_t n) {
  double s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += double(widen(x[i])) * double(widen(x[i]));
  return s;
}

const float* as_real(const float* x, int64_t, void*) { return x; }
const double* as_real(const double* x, int64_t, void*) { return x; }
template <class T>
const float* as_real(const T* x, int64_t n, void* scratch) {
  float* y = static_cast<float*>(scratch);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = widen(x[i]);
  return y;
}

float root(float x) { return __builtin_sqrtf(x); }
double root(double x) { return __builtin_sqrt(x); }

// G h for one row: g is the row's gradient over h.
template <class Real>
Real adam_dot(const CapoAdam& t, double g, const Real* h, const Real* m, const Real* s, int64_t n) {
  const Real old1 = Real(t.old1), new1 = Real(t.new1 * g), old2 = Real(t.old2), new2 = Real(t.new2 * g * g);
  const Real eps = Real(t.eps);
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real x = h[i], first = old1 * m[i] + new1 * x, second = old2 * s[i] + new2 * (x * x);
    sum += x * first / (root(second) + eps);
  }
  return sum;
}

template <class T>
void tokens(const CapoTokens& t, const CapoAdam& adam, const CapoResults& out, int64_t begin, int64_t end,
            void* scratch) {
  using Real = decltype(widen(T()));
  for (int64_t n = begin; n < end; ++n) {
    const T* hidden = static_cast<const T*>(t.hidden) + n * t.h;
    const Real* probs = static_cast<const Real*>(t.probs) + n * t.k;
    const double advantage = double(static_cast<const Real*>(t.advantage)[n]);
    Sums sums;
    const auto add = [&](double p, double v, double u) {
      sums.vu += v * u;
      sums.pu += p * u;
      sums.puu += p * u * u;
    };
    const auto residual = [&](int64_t k) { return double(k == t.action[n]) - double(probs[k]); };
    if (adam.rows) {
      const Real* h = as_real(hidden, t.h, scratch);
      for (int64_t k = 0; k < t.k; ++k) {
        const int64_t row = adam.rows[n * t.k + k] * t.h;
        const double v = residual(k);
        add(probs[k], v,
            adam_dot(adam, advantage * v, h, static_cast<const Real*>(adam.average) + row,
                     static_cast<const Real*>(adam.squares) + row, t.h));
      }
    } else {
      const double scale = advantage * squared_norm(hidden, t.h);
      for (int64_t k = 0; k < t.k; ++k) add(probs[k], residual(k), scale * residual(k));
    }
    put<Real>(out, n, advantage, sums);
  }
}

double not_below_zero(double x) { return x < 0 ? 0 : x; }  // a NaN passes

template <class T>
void closed(const CapoTokens& t, const CapoMoments& moments, const CapoResults& out, int64_t begin, int64_t end) {
  using Real = decltype(widen(T()));
  for (int64_t n = begin; n < end; ++n) {
    const double advantage = double(static_cast<const Real*>(t.advantage)[n]);
    const double p = exp_of(double(static_cast<const Real*>(moments.logp)[n]));
    const double others2 = not_below_zero(double(static_cast<const Real*>(moments.sum_p2)[n]) - p * p);
    const double others3 = not_below_zero(double(static_cast<const Real*>(moments.sum_p3)[n]) - p * p * p);
    const double vv = (1 - p) * (1 - p) + others2, pv = p * (1 - p) - others2, pvv = p * (1 - p) * (1 - p) + others3;
    const double scale = advantage * squared_norm(static_cast<const T*>(t.hidden) + n * t.h, t.h);
    put<Real>(out, n, advantage, {scale * vv, scale * pv, scale * scale * pvv});
  }
}

}  // namespace

void capo_curvature_tokens(const CapoTokens& t, const CapoAdam& adam, const CapoResults& out, int64_t begin,
                           int64_t end, void* scratch) {
  with_type(t.element, [&](auto zero) { tokens<decltype(zero)>(t, adam, out, begin, end, scratch); });
}

void capo_curvature_closed(const CapoTokens& t, const CapoMoments& moments, const CapoResults& out, int64_t begin,
                           int64_t end) {
  with_type(t.element, [&](auto zero) { closed<decltype(zero)>(t, moments, out, begin, end); });
}

}  // namespace gradops::GRADOPS_ISA
