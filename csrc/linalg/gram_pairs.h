// gram_pairs.h: how the lower triangle of a symmetric matrix is cut into pairs of groups of rows.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace gradops {
GRADOPS_BOTH constexpr int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Pair {
  int64_t i, j;
};
GRADOPS_BOTH constexpr Pair pair_of(int64_t n) {  // the n-th of (0, 0), (1, 0), (1, 1), (2, 0), ...
  int64_t i = 0;
  while (n > i) n -= ++i;
  return {i, n};
}
}  // namespace gradops
