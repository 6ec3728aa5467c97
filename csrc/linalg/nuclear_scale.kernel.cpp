#include "linalg/nuclear_scale.h"

#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

// In sixteen sums: one that waits for the addition before it takes longer than what is added.
template <class F>
[[gnu::always_inline]] inline double sum(int64_t count, const F& f) {
  double part[16] = {}, all = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) part[k] += f(i + k);
  for (; i < count; ++i) all += f(i);
  for (int k = 0; k < 16; ++k) all += part[k];
  return all;
}

template <class T>
double dot(const T* m, const T* u, int64_t count) {
  return sum(count, [=](int64_t i) { return double(widen(m[i])) * double(widen(u[i])); });
}
// Two numbers of a word at a time: to spread single ones over wider lanes takes longer than the sum.
double dot(const Bf16* m, const Bf16* u, int64_t count) {
  typedef uint32_t Word __attribute__((may_alias, aligned(2)));
  const Word *x = reinterpret_cast<const Word*>(m), *y = reinterpret_cast<const Word*>(u);
  const double s = sum(count / 2, [=](int64_t k) {
    return double(float_of(x[k] << 16)) * double(float_of(y[k] << 16)) +
           double(float_of(x[k] & 0xffff0000u)) * double(float_of(y[k] & 0xffff0000u));
  });
  return count % 2 ? s + double(widen(m[count - 1])) * double(widen(u[count - 1])) : s;
}

}  // namespace

double nuclear_scale_dot(const void* m, const void* u, Element element, int64_t begin, int64_t end) {
  double all = 0;
  with_type(element, [&](auto zero) {
    using T = decltype(zero);
    all = dot(static_cast<const T*>(m) + begin, static_cast<const T*>(u) + begin, end - begin);
  });
  return all;
}

}  // namespace gradops::GRADOPS_ISA
