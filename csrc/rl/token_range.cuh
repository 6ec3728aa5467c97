// token_range.cuh: where the tokens of a sequence lie, in kernels that give each sequence a block.
#pragma once
#include "common/cuda_launch.h"

namespace gradops {
namespace {

struct TokenRange {
  int64_t begin, end;
};

// Packed (t.offsets) or rows of t.length. Offsets are not checked on the host, which would have to wait for the device.
template <class Task>
__device__ inline TokenRange token_range(const Task& t, int64_t sequence) {
  const int64_t begin = t.offsets ? t.offsets[sequence] : sequence * t.length;
  const int64_t end = t.offsets ? t.offsets[sequence + 1] : begin + t.length;
  return {begin < 0 ? 0 : begin, end > t.tokens ? t.tokens : end};
}

}  // namespace
}  // namespace gradops
