// lanes.h: a vector of doubles as a number, so that a formula written for double also works one group per lane.
// For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/simd.h"
#include "rl/group_rules.h"

namespace gradops::GRADOPS_ISA {
namespace {

using gradops::above;  // for double, beside those for Lanes
using gradops::root;
using gradops::scale_of;
using gradops::select;

constexpr int W = kLanes<double>;

struct Mask {
  Vec<int64_t> m;
  friend Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
  friend Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
};
struct Lanes {
  Vec<double> v;
  Lanes() : v{} {}
  Lanes(double x) : v(x - Vec<double>{}) {}  // as it is; + would turn -0 into 0
  Lanes(Vec<double> x) : v(x) {}
  double operator[](int i) const { return v[i]; }
  friend Lanes operator+(Lanes a, Lanes b) { return a.v + b.v; }
  friend Lanes operator-(Lanes a, Lanes b) { return a.v - b.v; }
  friend Lanes operator*(Lanes a, Lanes b) { return a.v * b.v; }
  friend Lanes operator/(Lanes a, Lanes b) { return a.v / b.v; }
  friend Lanes operator-(Lanes a) { return -a.v; }
  friend Mask operator<(Lanes a, Lanes b) { return {a.v < b.v}; }
  friend Mask operator<=(Lanes a, Lanes b) { return {a.v <= b.v}; }
  friend Mask operator>(Lanes a, Lanes b) { return {a.v > b.v}; }
  friend Mask operator==(Lanes a, Lanes b) { return {a.v == b.v}; }
};
inline Lanes select(Mask c, Lanes a, Lanes b) { return c.m ? a.v : b.v; }
inline Lanes smaller(Lanes a, Lanes b) { return select(a < b, a, b); }  // b where one is no number
inline Lanes larger(Lanes a, Lanes b) { return select(a > b, a, b); }
inline Lanes root(Lanes x) {
  for (int i = 0; i < W; ++i) x.v[i] = __builtin_sqrt(x.v[i]);
  return x;
}
inline Lanes above(Lanes x) {
  const Vec<int64_t> exponent = (reinterpret_cast<Vec<int64_t>&>(x.v) >> 52 & 0x7ff) + 1;
  Vec<int64_t> bits = (exponent > 2045 ? exponent * 0 + 2045 : exponent) << 52;
  return reinterpret_cast<Vec<double>&>(bits);
}
inline Lanes scale_of(Lanes x) {
  const Lanes inverse = above(x);
  Vec<int64_t> bits = (Vec<int64_t>{} + (int64_t(2046) << 52)) - reinterpret_cast<const Vec<int64_t>&>(inverse.v);
  return reinterpret_cast<Vec<double>&>(bits);
}

// Every lane gets op over all lanes.
template <int kStep = W / 2, class Op>
[[gnu::always_inline]] inline Lanes over_all(Lanes x, Op op) {
  if constexpr (kStep == 0) {
    return x;
  } else {
    Vec<int64_t> partner;
    for (int i = 0; i < W; ++i) partner[i] = i ^ kStep;
    return over_all<kStep / 2>(op(x, Lanes(__builtin_shuffle(x.v, partner))), op);
  }
}
inline Lanes sum_over_all(Lanes x) {
  return over_all(x, [](Lanes a, Lanes b) { return a + b; });
}

}  // namespace
}  // namespace gradops::GRADOPS_ISA
