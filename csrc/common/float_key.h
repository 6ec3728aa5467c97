// float_key.h: integers in the order of the floating-point numbers, for bisection that ends. Local to the includer.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/host_device.h"

namespace gradops {
namespace {

template <class A>
using KeyOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

template <class A>
GRADOPS_SHARED KeyOf<A> key_of(A x) {
  const KeyOf<A> bits = __builtin_bit_cast(KeyOf<A>, x + A(0));  // no -0
  return bits >= 0 ? bits : ~(bits & ~(KeyOf<A>(1) << (sizeof(A) * 8 - 1)));
}
template <class A>
GRADOPS_SHARED A number_of(KeyOf<A> key) {
  return __builtin_bit_cast(A, key >= 0 ? key : KeyOf<A>(~key | (KeyOf<A>(1) << (sizeof(A) * 8 - 1))));
}

}  // namespace
}  // namespace gradops
