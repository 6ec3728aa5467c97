#include "rl/top_p_keep.h"

#include "common/exp_log.h"
#include "common/float_key.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <class T>
using Arithmetic = decltype(widen(T()));

struct Mass {
  double mass = 0;
  int64_t count = 0;
};
template <class A>
Mass mass_from(const A* x, const A* w, int64_t n, A least) {  // of the entries of at least `least`
  constexpr int64_t kRun = 1024;
  Mass all;
  for (int64_t b = 0; b < n; b += kRun) {
    const int64_t end = b + kRun < n ? b + kRun : n;
    A s = 0;
    typename FloatBits<A>::Int count = 0;
#pragma omp simd reduction(+ : s, count)
    for (int64_t i = b; i < end; ++i) s += x[i] >= least ? w[i] : A(0), count += x[i] >= least;
    all.mass += double(s), all.count += count;
  }
  return all;
}

template <class T>
void row_mask(const TopPTask& t, const T* logits, bool* mask, Arithmetic<T>* x, Arithmetic<T>* w) {
  using A = Arithmetic<T>;
  using Int = KeyOf<A>;
  using Wide = __int128;
  const int64_t n = t.cols, least_count = t.min_keep < n ? t.min_keep : n;
  const A infinity = A(__builtin_inf());
  A top = -infinity;
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = widen(logits[i]);
    top = x[i] > top ? x[i] : top;
    nan |= x[i] != x[i];
  }
  if (nan || top == -infinity || top == infinity) {  // no softmax: nothing is left out
    for (int64_t i = 0; i < n; ++i) mask[i] = true;
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) w[i] = exp_of(x[i] - top);
  const bool all = t.p >= 1;  // that are not masked
  const double goal = all ? 0 : t.p * mass_from(x, w, n, -infinity).mass;
  const auto enough = [&](Mass m) { return m.mass >= goal && m.count >= least_count; };
  // Of `low` and all above there is enough, strictly above there is not.
  Int low = key_of(-infinity), high = all ? low + 1 : key_of(top) + 1;
  Mass above = all ? mass_from(x, w, n, number_of<A>(high)) : Mass();
  while (low + 1 < high) {
    const Int middle = low + Int((Wide(high) - low) / 2);
    const Mass m = mass_from(x, w, n, number_of<A>(middle));
    if (enough(m))
      low = middle;
    else
      high = middle, above = m;
  }
  const A edge = number_of<A>(low);
  for (int64_t i = 0; i < n; ++i) mask[i] = x[i] > edge;
  for (int64_t i = 0; i < n && !enough(above); ++i)
    if (x[i] == edge) mask[i] = true, above.mass += double(w[i]), ++above.count;
}

}  // namespace

void top_p_rows(const TopPTask& t, int64_t begin, int64_t end, char* scratch) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    using A = Arithmetic<T>;
    A* x = reinterpret_cast<A*>(scratch);
    for (int64_t r = begin; r < end; ++r)
      row_mask(t, static_cast<const T*>(t.logits) + r * t.cols, t.mask + r * t.cols, x, x + t.cols);
  });
}

}  // namespace gradops::GRADOPS_ISA
