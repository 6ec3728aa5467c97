// softmax_block.h: what the kernels of selective_log_softmax and of its gradient share: softcaps, keep sets. For
// *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/float_vectors.h"

namespace gradops::GRADOPS_ISA {
namespace {

// softcap * tanh(x / softcap) and its derivative; a masked entry, -inf, stays masked.
struct Cap {
  Floats cap, rate;  // rate = -2 log2(e) / softcap
  explicit Cap(double softcap) : cap(all(float(softcap))), rate(all(softcap > 0 ? float(-2 / (kLn2 * softcap)) : 0)) {}
  [[gnu::always_inline]] Floats operator()(Floats x, Floats& slope) const {
    const Words sign = words_of(x) & 0x80000000u;
    const Floats e = exp2_of(larger(all(kLowest), floats_of(words_of(x) & 0x7fffffffu) * rate));
    const Floats q = (1.f - e) / (1.f + e);
    slope = 1.f - q * q;
    return x == all(-float(kInfinity)) ? x : floats_of(words_of(q * cap) | sign);
  }
};

// The same for float64 logits, in double; softcap 0: none
inline double capped(double x, double softcap, double& slope) {
  slope = 1;
  if (softcap == 0 || x == -kInfinity) return x;
  const double e = exp_of(__builtin_fabs(x) * (-2 / softcap)), q = (1 - e) / (1 + e);
  slope = 1 - q * q;
  return x < 0 ? -softcap * q : softcap * q;
}

// Whether id is one of ids[begin, end), which ascend; begin becomes its place.
inline bool find(const int64_t* ids, int64_t& begin, int64_t end, int64_t id) {
  const int64_t last = end;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] < id)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin < last && ids[begin] == id;
}

// Calls f with whether there is a softcap, and the type of the logits.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <class F>
void with_capped(double softcap, Element element, const F& f) {
  with_type(element, [&](auto zero) { softcap > 0 ? f(Flag<true>(), zero) : f(Flag<false>(), zero); });
}

}  // namespace
}  // namespace gradops::GRADOPS_ISA
