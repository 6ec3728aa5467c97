// device_number.cuh: numbers of any Element in CUDA kernels.
#pragma once
#include "common/element.h"
#include "common/half.h"

namespace gradops {

template <class T>
__device__ inline double to_double(T x) {
  return double(x);
}
template <>
__device__ inline double to_double(__nv_bfloat16 x) {
  return double(__bfloat162float(x));
}
template <>
__device__ inline double to_double(__half x) {
  return double(__half2float(x));
}

template <class T>
__device__ inline T from_double(double x) {
  return T(x);
}
template <>
__device__ inline __nv_bfloat16 from_double<__nv_bfloat16>(double x) {
  return __float2bfloat16_rn(float(x));
}
template <>
__device__ inline __half from_double<__half>(double x) {
  return __float2half_rn(float(x));
}

// To the precision of its argument
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }

// Number i of an array, where the type is known at run time only.
__device__ inline double number_at(Element e, const void* x, int64_t i) {
  switch (e) {
    case Element::bf16:
      return to_double(static_cast<const __nv_bfloat16*>(x)[i]);
    case Element::f16:
      return to_double(static_cast<const __half*>(x)[i]);
    case Element::f32:
      return double(static_cast<const float*>(x)[i]);
    default:
      return static_cast<const double*>(x)[i];
  }
}

// Calls f(T()) on the host with the CUDA type of e.
template <class F>
void with_device_type(Element e, const F& f) {
  switch (e) {
    case Element::bf16:
      return f(__nv_bfloat16());
    case Element::f16:
      return f(__half());
    case Element::f32:
      return f(0.f);
    case Element::f64:
      return f(0.);
  }
}

}  // namespace gradops
