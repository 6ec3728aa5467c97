// cost.h (placeholder until the scan's room brings its own)
#pragma once
#include <cstdint>

#include "common/element.h"

namespace gradops {
struct Cost {
  const void* matrix;
  const void *x, *y;
  Element element;
  int64_t n, m, d;
};
}  // namespace gradops
