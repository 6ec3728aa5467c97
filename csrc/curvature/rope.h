// rope: rotates pairs of numbers of each row by angles whose cosines and sines are given; the rest of a row is copied.
// Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

constexpr int kRopeDims = 8;  // of rows, at most, after those are merged that can be
struct RopeDim {
  int64_t size, x, cos, sin;  // distances between rows
};
struct RopeTask {
  const void *x, *cos, *sin;
  void* y;                 // contiguous
  Element element, table;  // table: `element`, or the type that numbers of `element` are computed in
  int64_t rows, cols, pairs;
  bool interleaved;  // pairs are numbers 2j and 2j + 1, not j and pairs + j
  bool inverse;      // the angles are negative
  int dims;
  RopeDim dim[kRopeDims];  // outermost first
};
GRADOPS_DECLARE(void, rope, const RopeTask&, int64_t begin, int64_t end)  // rows

namespace cpu {
void rope(const RopeTask&, void* = nullptr);
}
namespace cuda {
void rope(const RopeTask&, void* stream);
}
}  // namespace gradops
