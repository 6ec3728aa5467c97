#include "curvature/swiglu.h"

#include "common/exp_log.h"
#include "common/stretch.h"
#include "curvature/silu.h"

namespace gradops::GRADOPS_ISA {
namespace {

// e^-|x|, but 0 below the normal range: in two thirds of the time of exp_of, and most of all time is spent here
[[gnu::always_inline]] inline float negative_magnitude(float x) { return -__builtin_fabsf(x); }
[[gnu::always_inline]] inline double negative_magnitude(double x) { return -__builtin_fabs(x); }
template <class A>
[[gnu::always_inline]] inline A exp_of_negative_magnitude(A x) {
  using B = FloatBits<A>;
  using Int = typename B::Int;
  constexpr A lowest = A(1 - B::kBias) * A(0.69314718055994530942) - A(0.5);  // there n is -kBias, and 2^n is 0
  x = negative_magnitude(x);
  x = x < lowest ? lowest : x;  // a NaN passes
  const A shifted = x * A(1.44269504088896340736) + B::kRound;
  const A n = shifted - B::kRound;
  const A r = (x - n * B::kLn2High) - n * B::kLn2Low;
  const Int k = __builtin_bit_cast(Int, shifted) - __builtin_bit_cast(Int, B::kRound);
  return (A(1) + (r + r * r * exp_tail(r))) * __builtin_bit_cast(A, (k + B::kBias) << B::kMantissa);
}

template <class A>
struct Numbers {
  const A *gate, *up, *g, *gate_dot, *up_dot, *g_dot;
  A *value[2], *change[2];
};

template <class A, bool kValue, bool kChange>
[[gnu::noinline]] void forward(const Numbers<A>& t, int64_t count) {
  const A *gate = t.gate, *up = t.up, *gate_dot = t.gate_dot, *up_dot = t.up_dot;
  A *value = t.value[0], *change = t.change[0];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A x = gate[i];
    const Silu<A> s = silu_of(x, exp_of_negative_magnitude(x));
    if (kValue) value[i] = s.value * up[i];
    if (kChange) change[i] = s.slope * gate_dot[i] * up[i] + s.value * up_dot[i];
  }
}

template <class A, bool kValue, bool kChange>
[[gnu::noinline]] void backward(const Numbers<A>& t, int64_t count) {
  const A *gate = t.gate, *up = t.up, *g = t.g, *gate_dot = t.gate_dot, *up_dot = t.up_dot, *g_dot = t.g_dot;
  A *value0 = t.value[0], *value1 = t.value[1], *change0 = t.change[0], *change1 = t.change[1];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A x = gate[i], u = up[i], w = g[i];
    const Silu<A> s = silu_of(x, exp_of_negative_magnitude(x));
    if (kValue) {
      value0[i] = w * u * s.slope;
      value1[i] = w * s.value;
    }
    if (kChange) {
      const A xd = gate_dot[i], wd = g_dot[i];
      change0[i] = (wd * u + w * up_dot[i]) * s.slope + w * u * s.curve * xd;
      change1[i] = wd * s.value + w * s.slope * xd;
    }
  }
}

template <class A>
const A* fill(Buffer<A>& buffer, int64_t count, A x) {
  for (int64_t i = 0; i < count; ++i) buffer.at[i] = x;
  return buffer.at;
}

template <class A>
void run(const SwigluTask& t, int64_t begin, int64_t end) {
  Buffer<A> in[6], out[4];
  const SwigluRows* rows[6] = {&t.gate, &t.up, &t.g, &t.gate_dot, &t.up_dot, &t.g_dot};
  void* const to[4] = {t.value[0], t.value[1], t.change[0], t.change[1]};
  const bool value = to[0] || to[1], change = to[2] || to[3];
  const auto kernel = t.backward ? !change ? backward<A, true, false>
                                   : value ? backward<A, true, true>
                                           : backward<A, false, true>
                      : !change  ? forward<A, true, false>
                      : value    ? forward<A, true, true>
                                 : forward<A, false, true>;
  const A* from[6];
  for (int k = 0; k < 6; ++k)
    if (!rows[k]->data) from[k] = fill(in[k], kStretch, A(k == 1));
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / t.cols, col = i - row * t.cols;
    int64_t count = t.cols - col < kStretch ? t.cols - col : kStretch;
    count = end - i < count ? end - i : count;
    for (int k = 0; k < 6; ++k)
      if (rows[k]->data) from[k] = read(rows[k]->data, t.element, row * rows[k]->stride + col, count, in[k]);
    A* at[4];
    for (int k = 0; k < 4; ++k) at[k] = target(to[k], t.element, i, out[k]);
    kernel({from[0], from[1], from[2], from[3], from[4], from[5], {at[0], at[1]}, {at[2], at[3]}}, count);
    for (int k = 0; k < 4; ++k) written(to[k], t.element, i, count, out[k]);
    i += count;
  }
}

}  // namespace

void swiglu(const SwigluTask& t, int64_t begin, int64_t end) {
  t.element == Element::f64 ? run<double>(t, begin, end) : run<float>(t, begin, end);
}

}  // namespace gradops::GRADOPS_ISA
