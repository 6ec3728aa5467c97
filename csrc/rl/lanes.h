// lanes.h: a vector of doubles as a number, so that a formula written for double also works one group per lane.
// For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/simd.h"
#include "rl/group_rules.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int W = kLanes<double>;

struct Mask {
  Vec<int64_t> m;
  friend Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
  friend Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
};
struct Lanes {
  Vec<double> v;
  Lanes() : v{} {}
  Lanes(double x) : v(Vec<double>{} + x) {}
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
inline Lanes scale_of(Lanes range) {
  const Vec<int64_t> biased = 2045 - (reinterpret_cast<Vec<int64_t>&>(range.v) >> 52 & 0x7ff);
  Vec<int64_t> bits = (biased < 1 ? biased * 0 + 1 : biased) << 52;
  return reinterpret_cast<Vec<double>&>(bits);
}

template <class Op>
inline Lanes over_all(Lanes x, Op op) {  // every lane gets the result
  for (int step = W / 2; step > 0; step /= 2) {
    Vec<double> other;
    for (int i = 0; i < W; ++i) other[i] = x.v[i ^ step];
    x = op(x, Lanes(other));
  }
  return x;
}
inline Lanes sum_over_all(Lanes x) {
  return over_all(x, [](Lanes a, Lanes b) { return a + b; });
}

}  // namespace
}  // namespace gradops::GRADOPS_ISA
