#include "quant/gptq_spread.h"

#include <type_traits>

#include "common/simd.h"

namespace gradops::GRADOPS_ISA {
namespace {

using V = Vec<float>;
constexpr int kLane = kLanes<float>;
// Sums in registers: a tile of rows and vectors, with room for one row of u beside it.
constexpr int kRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 4 : 2;
constexpr int kVectors = kVectorBytes == 64 ? 2 : kVectorBytes == 32 ? 3 : 4;
constexpr int kWidth = kVectors * kLane;

V load_anywhere(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// kRows (or fewer) rows of w, all columns of one panel. u: depth x kWidth, packed.
template <int R>
[[gnu::always_inline]] inline void tile(const SpreadTask& t, float* w, const float* e, const float* u, int64_t cols) {
  V sum[R][kVectors] = {};
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kVectors; ++c) __builtin_prefetch(w + r * t.w_row + c * kLane, 1);
  for (int64_t k = 0; k < t.depth; ++k, u += kWidth) {
    V row[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) row[c] = vec_at(u + c * kLane);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V factor = V{} + e[r * t.e_row + k];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sum[r][c] += factor * row[c];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      float* to = w + r * t.w_row + c * kLane;
      const int64_t left = cols - c * kLane;
      if (left >= kLane) {
        const V before = load_anywhere(to), after = t.add ? before + sum[r][c] : before - sum[r][c];
        __builtin_memcpy(to, &after, sizeof after);
      } else {
        for (int64_t i = 0; i < left; ++i) to[i] = t.add ? to[i] + sum[r][c][i] : to[i] - sum[r][c][i];
      }
    }
}

template <int R>
void rows_of(const SpreadTask& t, int64_t& row, float* w, const float* e, const float* u, int64_t cols) {
  for (; row + R <= t.rows; row += R) tile<R>(t, w + row * t.w_row, e + row * t.e_row, u, cols);
}

}  // namespace

int64_t gptq_spread_panels(int64_t cols) { return (cols + kWidth - 1) / kWidth; }
int64_t gptq_spread_scratch(int64_t depth) { return 4 * depth * kWidth; }

void gptq_spread_range(const SpreadTask& t, int64_t begin, int64_t end, char* scratch) {
  const int64_t panels = gptq_spread_panels(t.cols);
  float* packed = reinterpret_cast<float*>(scratch);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t item = n / panels, first = n % panels * kWidth;
    const int64_t cols = t.cols - first < kWidth ? t.cols - first : kWidth;
    for (int64_t k = 0; k < t.depth; ++k) {
      const float* from = t.u + item * t.u_batch + k * t.u_row + first * t.u_col;
      for (int64_t c = 0; c < kWidth; ++c) packed[k * kWidth + c] = c < cols ? from[c * t.u_col] : 0.f;
    }
    float* w = t.w + item * t.w_batch + first;
    const float* e = t.e + item * t.e_batch;
    int64_t row = 0;
    rows_of<kRows>(t, row, w, e, packed, cols);
    rows_of<1>(t, row, w, e, packed, cols);
  }
}

}  // namespace gradops::GRADOPS_ISA
