#include "optim/harpg.h"

#include "common/stretch.h"

namespace gradops::GRADOPS_ISA {
namespace {

bool wide(Element a, Element b) { return a == Element::f64 || b == Element::f64; }

template <class A, class F>
void each_stretch(int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; i += kStretch) f(i, end - i < kStretch ? end - i : kStretch);
}

template <class A, bool kChange>
[[gnu::noinline]] double update(A* d, const A* old, const A* change, const A* grad, int64_t count, A keep, A sign,
                                A mix) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    const A x = keep * (kChange ? old[j] + sign * change[j] : old[j]) + mix * grad[j];
    d[j] = x;
    sum += double(x) * double(x);
  }
  return sum;
}
template <class A>
[[gnu::noinline]] double start(A* d, const A* grad, int64_t count, A sign) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    d[j] = sign * grad[j];
    sum += double(grad[j]) * double(grad[j]);
  }
  return sum;
}

template <class A>
double run_update(const HarpgUpdate& t, int64_t begin, int64_t end) {
  Buffer<A> old, change, grad;
  const A keep = A(1 - t.eta), sign = A(t.sign), mix = A(t.eta * t.sign);
  double sum = 0;
  each_stretch<A>(begin, end, [&](int64_t i, int64_t count) {
    const A* g = read(t.grad, t.grad_element, i, count, grad);
    A* d = target(t.d, t.d_element, i, old);
    if (t.eta == 1) {
      sum += start(d, g, count, sign);
    } else {
      const A* before = read(t.d, t.d_element, i, count, old);
      sum += t.change ? update<A, true>(d, before, read(t.change, t.change_element, i, count, change), g, count, keep,
                                        sign, mix)
                      : update<A, false>(d, before, before, g, count, keep, sign, mix);
    }
    written(t.d, t.d_element, i, count, old);
  });
  return sum;
}

template <class A>
void run_apply(const HarpgApply& t, A c, int64_t begin, int64_t end) {
  Buffer<A> param, direction;
  each_stretch<A>(begin, end, [&](int64_t i, int64_t count) {
    const A *p = read(t.param, t.param_element, i, count, param), *d = read(t.d, t.d_element, i, count, direction);
    A* to = target(t.param, t.param_element, i, param);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = p[j] - c * d[j];
    written(t.param, t.param_element, i, count, param);
  });
}

}  // namespace

double harpg_update(const HarpgUpdate& t, int64_t begin, int64_t end) {
  return wide(t.d_element, t.grad_element) ? run_update<double>(t, begin, end) : run_update<float>(t, begin, end);
}

double harpg_scale(const HarpgApply& t, const HarpgStep& step) {
  double c = step.lr;
  if (step.lr_tensor)
    with_type(step.lr_element, [&](auto zero) { c *= widen(*static_cast<const decltype(zero)*>(step.lr_tensor)); });
  if (step.norm) c = *step.norm > 0 ? c / *step.norm : 0;
  with_type(t.d_element, [&](auto zero) {
    decltype(zero)& to = *static_cast<decltype(zero)*>(t.scale);
    narrow(c, to);
    c = widen(to);
  });
  return c;
}

void harpg_apply(const HarpgApply& t, double c, int64_t begin, int64_t end) {
  wide(t.param_element, t.d_element) ? run_apply<double>(t, c, begin, end) : run_apply<float>(t, float(c), begin, end);
}

}  // namespace gradops::GRADOPS_ISA
