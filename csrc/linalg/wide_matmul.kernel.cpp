// Products in float, in panels of common/simd_gemm.h; the left operand is packed as its transpose.
#include "common/simd_gemm.h"
#include "common/widen.h"
#include "linalg/wide_matmul_blocks.h"

namespace gradops {
namespace {

struct FloatKernel {
  static constexpr int64_t kSide = kPanel<float>, kSpare = 0;
  static_assert(kSide * kSide * sizeof(float) <= 4096);
  static int64_t panel_bytes(int64_t inner) { return inner * kSide * int64_t(sizeof(float)); }

  // Lines are those along `inner`: entry i of line k is data[k * stride + i], or, `across`, data[i * stride + k].
  static void pack(const WideOperand& x, bool across, int64_t first, int64_t length, int64_t inner, char* panel) {
    float* const to = reinterpret_cast<float*>(panel);
    const int64_t count = least(length - first, kSide);
    with_type(x.element, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (sizeof(T) <= sizeof(float)) {
        const T* from = static_cast<const T*>(x.data) + (across ? first * x.stride : first);
        if (across) {
          for (int64_t i = 0; i < count; ++i)
            for (int64_t k = 0; k < inner; ++k) to[k * kSide + i] = widen(from[i * x.stride + k]);
        } else {
          for (int64_t k = 0; k < inner; ++k)
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) to[k * kSide + i] = widen(from[k * x.stride + i]);
        }
      }
    });
    for (int64_t k = 0; k < inner && count < kSide; ++k)
      for (int64_t i = count; i < kSide; ++i) to[k * kSide + i] = 0;
  }
  static void pack_left(const WideMatmulTask& t, int64_t row, char* panel, char*) {
    pack(t.left, !t.left.transposed, row, t.rows, t.inner, panel);
  }
  static void pack_right(const WideMatmulTask& t, int64_t col, char* panel, char*) {
    pack(t.right, t.right.transposed, col, t.cols, t.inner, panel);
  }

  static void multiply(const char* left_panel, const char* right_panel, int64_t inner, float* sums) {
    const float *left = reinterpret_cast<const float*>(left_panel),
                *right = reinterpret_cast<const float*>(right_panel);
    flushing_denormals([=] {  // not while numbers are widened: f16 has some that are denormal on the way
      for (int64_t k = 0; k < inner; k += kDepth<float>)
        for (int64_t r = 0; r < kSide; r += kTileRows)
          tile<float, Left::by_columns, kTileRows, kTileVectors>(left + k * kSide + r, 0, right + k * kSide,
                                                                 least(inner - k, kDepth<float>), 1.f,
                                                                 k ? sums + r * kSide : nullptr, 1.f, sums + r * kSide);
    });
  }
  static void finish(const WideMatmulTask& t, int64_t row, int64_t col, const float* sums) {
    const int64_t rows = least(t.rows - row, kSide), cols = least(t.cols - col, kSide);
    with_type(t.out_element, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t r = 0; r < rows; ++r) {
        T* const to = static_cast<T*>(t.out) + (row + r) * t.out_stride + col;
        const float* const from = sums + r * kSide;
#pragma omp simd
        for (int64_t i = 0; i < cols; ++i) narrow(t.add ? from[i] + float(widen(to[i])) : from[i], to[i]);
      }
    });
  }
};

}  // namespace

const WideMatmulEngine& GRADOPS_ISA::wide_matmul_full() { return WideMatmulBlocks<FloatKernel>::engine; }

}  // namespace gradops
