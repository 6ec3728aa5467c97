// wide_matmul_blocks.h: how both kernels of wide_matmul cut a product into squares of Kernel::kSide.
//
// A group of panels, kSide rows of the left operand each, is packed and stays in L2, while panels of kSide columns of
// the right one are packed and multiplied one after the other. A sum runs over all of `inner`.
// For *.kernel.cpp only.
#pragma once
#include "linalg/wide_matmul.h"

namespace gradops {
namespace {

constexpr int64_t kGroup = 8;       // left panels
constexpr int64_t kUnitPanels = 8;  // right panels of a unit, so that a few rows keep several threads busy
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kernel: kSide; panel_bytes(inner); pack_left, pack_right(task, first row or column, panel); multiply(left, right,
// inner, sums), a square of sums in the kernel's own order; finish(task, row, column, sums)
template <class Kernel>
struct WideMatmulBlocks {
  static int64_t columns(const WideMatmulTask& t) { return ceil_div(ceil_div(t.cols, Kernel::kSide), kUnitPanels); }
  static int64_t units(const WideMatmulTask& t) {
    return ceil_div(ceil_div(t.rows, Kernel::kSide), kGroup) * columns(t);
  }
  static int64_t scratch_bytes(const WideMatmulTask& t) {
    return kSums + (kGroup + 1) * Kernel::panel_bytes(t.inner) + Kernel::kSpare;
  }
  static void run(const WideMatmulTask& t, char* scratch, int64_t begin, int64_t end) {
    constexpr int64_t S = Kernel::kSide;
    float* const sums = reinterpret_cast<float*>(scratch);
    const int64_t size = Kernel::panel_bytes(t.inner);
    char* const spare = scratch + kSums;
    char *const right = spare + Kernel::kSpare, *const left = right + size;
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / columns(t), row = group * kGroup * S, rows = least(t.rows - row, kGroup * S);
      if (group != packed)
        for (int64_t i = 0; i < rows; i += S) Kernel::pack_left(t, row + i, left + i / S * size, spare);
      packed = group;
      const int64_t first = unit % columns(t) * kUnitPanels * S, last = least(first + kUnitPanels * S, t.cols);
      for (int64_t col = first; col < last; col += S) {
        Kernel::pack_right(t, col, right, spare);
        for (int64_t i = 0; i < rows; i += S) {
          Kernel::multiply(left + i / S * size, right, t.inner, sums);
          Kernel::finish(t, row + i, col, sums);
        }
      }
    }
  }
  static constexpr int64_t kSums = 4096;
  static constexpr WideMatmulEngine engine{units, scratch_bytes, run};
};

}  // namespace
}  // namespace gradops
