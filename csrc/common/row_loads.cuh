// row_loads.cuh: a row's numbers 16 bytes at a time, and sums that lose nothing, for CUDA kernels.
#pragma once
#include "common/device_number.cuh"

namespace gradops {

template <class T>
__device__ inline T nan() {
  return T(INFINITY) - T(INFINITY);
}

// A sum that carries what rounding lost.
template <class A>
struct Compensated {
  A sum = 0, lost = 0;
  __device__ void add(A x) {
    const A y = x - lost, next = sum + y;
    lost = (next - sum) - y;
    sum = next;
  }
  __device__ void scale(A f) { sum *= f, lost *= f; }
  __device__ double value() const { return double(sum) - double(lost); }
};

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / int(sizeof(T));
  T at[kSize];
};
template <class T>
__device__ inline bool aligned(const T* x) {
  return (reinterpret_cast<uintptr_t>(x) & 15) == 0;
}

}  // namespace gradops
