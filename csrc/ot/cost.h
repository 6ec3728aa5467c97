// cost.h: what it costs to move mass from row i to column j: a matrix as it lies in memory, or squared Euclidean
// distances of two clouds of points, which are never stored. For CPU and CUDA kernels; everything is local to the
// includer.
#pragma once
#include <cstdint>

#include "common/element.h"

#if defined(__CUDACC__)  // a function of its own: inlined everywhere it takes ptxas long
#define GRADOPS_OT_CALL __host__ __device__ __noinline__
#else
#define GRADOPS_OT_CALL GRADOPS_SHARED
#endif

namespace gradops {

struct Cost {          // of one problem
  const void* matrix;  // n x m, rows contiguous; null: squared Euclidean distances of x and y
  const void *x, *y;   // points, (n, d) and (m, d), contiguous
  Element element;     // of matrix, or of x and y
  int64_t n, m, d;
};

namespace {

// Number i of an array, exactly.
GRADOPS_SHARED double stored_number(Element e, const void* p, int64_t i) {
  if (e == Element::f64) return static_cast<const double*>(p)[i];
  if (e == Element::f32) return double(static_cast<const float*>(p)[i]);
  const uint32_t half = static_cast<const uint16_t*>(p)[i];
  uint32_t bits = half << 16;
  if (e == Element::f16) {  // the biases of the exponents differ by 112; infinities move as far again
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    if (magnitude < 0x400u << 13) return (half & 0x8000u ? -1. : 1.) * double(half & 0x3ffu) * 0x1p-24;
    bits = (magnitude + (magnitude < 0x7c00u << 13 ? 112u << 23 : 224u << 23)) | (half & 0x8000u) << 16;
  }
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return double(x);
}

// Of points: differences, squares and sums in double, so that nothing cancels.
GRADOPS_OT_CALL double cost_at(const Cost& c, int64_t i, int64_t j) {
  if (c.matrix) return stored_number(c.element, c.matrix, i * c.m + j);
  double sum = 0;
  for (int64_t k = 0; k < c.d; ++k) {
    const double difference = stored_number(c.element, c.x, i * c.d + k) - stored_number(c.element, c.y, j * c.d + k);
    sum += difference * difference;
  }
  return sum;
}

}  // namespace
}  // namespace gradops
