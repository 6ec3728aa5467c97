// silu.h: silu(x) = x sigmoid(x) and its first two derivatives, for the CPU and the CUDA kernels alike.
#pragma once
#include "common/host_device.h"

namespace gradops {

template <class A>
struct Silu {
  A value, slope, curve;
};
// e: exp(-|x|), so that neither sigmoid(x) nor 1 - sigmoid(x) loses digits, and nothing overflows
template <class A>
GRADOPS_SHARED Silu<A> silu_of(A x, A e) {
  const A near = A(1) / (A(1) + e), far = e * near;
  const A p = x < A(0) ? far : near, q = x < A(0) ? near : far;
  return {x * p, p * (A(1) + x * q), p * q * (A(2) + x * (q - p))};
}

}  // namespace gradops
