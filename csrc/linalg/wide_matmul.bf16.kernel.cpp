// Products of bf16 in blocks of 32 x 32 (common/bf16_blocks.h).
#include "common/bf16_multiply.h"
#include "common/simd.h"
#include "linalg/wide_matmul_blocks.h"

namespace gradops {
namespace {

inline uint32_t first_bits(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// 32 numbers; those at and after `count` are zero.
template <Element E>
inline Row<1> load_row32(const char* p, int64_t count) {
  const uint32_t m = first_bits(count);
  if constexpr (E == Element::bf16) return {{_mm512_maskz_loadu_epi16(m, p)}};
  const __m512 low = _mm512_maskz_loadu_ps(__mmask16(m), p), high = _mm512_maskz_loadu_ps(__mmask16(m >> 16), p + 64);
  return {{(__m512i)_mm512_cvtne2ps_pbh(high, low)}};
}

// The block of x, as it is stored, from line `line` of `lines` and place `at` of `length` on: in V form or in R form.
template <Element E, bool kVnni>
inline void pack_block(const WideOperand& x, int64_t line, int64_t lines, int64_t at, int64_t length, char* out) {
  const char* from = static_cast<const char*>(x.data) + (line * x.stride + at) * element_size(E);
  const int64_t step = x.stride * element_size(E), count = lines - line;
  const auto row = [=](int64_t k) GRADOPS_INLINE {
    return k < count ? load_row32<E>(from + k * step, length - at) : Row<1>{{_mm512_setzero_si512()}};
  };
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    const Row<1> r0 = row(2 * pair), r1 = row(2 * pair + 1);
    if constexpr (kVnni)
      rows_to_vnni<1>(r0, r1, out, pair);
    else
      store_row(out + 128 * pair, r0), store_row(out + 128 * pair + 64, r1);
  }
}

template <Element E>
void pack_left_panel(const WideMatmulTask& t, int64_t row, char* panel, char* spare) {
  for (int64_t k = 0; k < t.inner; k += 32, panel += kPart)
    if (t.left.transposed) {
      pack_block<E, true>(t.left, k, t.inner, row, t.rows, spare);
      for (long u = 0; u < kQuarters<1>; ++u) vnni_to_rows_of_transpose(spare, panel, u);
    } else {
      pack_block<E, false>(t.left, row, t.rows, k, t.inner, panel);
    }
}

inline float* float_at(const WideMatmulTask& t, int64_t row, int64_t col) {
  return static_cast<float*>(t.out) + row * t.out_stride + col;
}

struct Bf16Kernel {
  static constexpr int64_t kSide = 32, kSpare = kPart;
  static int64_t panel_bytes(int64_t inner) { return ceil_div(inner, 32) * kPart; }
  static void pack_left(const WideMatmulTask& t, int64_t row, char* panel, char* spare) {
    if (t.left.element == Element::f32)
      pack_left_panel<Element::f32>(t, row, panel, spare);
    else
      pack_left_panel<Element::bf16>(t, row, panel, spare);
  }
  static void pack_right(const WideMatmulTask& t, int64_t col, char* panel, char* spare) {
    for (int64_t k = 0; k < t.inner; k += 32, panel += kPart)
      if (t.right.transposed) {
        pack_block<Element::bf16, false>(t.right, col, t.cols, k, t.inner, spare);
        for (long u = 0; u < kQuarters<1>; ++u) rows_to_vnni_of_transpose(spare, panel, u);
      } else {
        pack_block<Element::bf16, true>(t.right, k, t.inner, col, t.cols, panel);
      }
  }
  static void multiply(const char* left, const char* right, int64_t inner, float* sums) {
    gradops::multiply<1>(left, right, ceil_div(inner, 32), sums, 0, [](long) {});
  }
  static void finish(const WideMatmulTask& t, int64_t row, int64_t col, const float* sums) {
    const uint32_t m = first_bits(t.cols - col);
    const __mmask16 m0 = __mmask16(m), m1 = __mmask16(m >> 16);
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const int64_t rows = least(t.rows - row, 32);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 even = _mm512_load_ps(sums + 32 * r), odd = _mm512_load_ps(sums + 32 * r + 16);
      if (t.out_element == Element::bf16) {
        char* to = static_cast<char*>(t.out) + 2 * ((row + r) * t.out_stride + col);
        _mm512_mask_storeu_epi16(to, m, round_to_bf16(even, odd));
        continue;
      }
      float* to = float_at(t, row + r, col);
      __m512 low = _mm512_permutex2var_ps(even, first, odd), high = _mm512_permutex2var_ps(even, second, odd);
      if (t.add) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(m0, to));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(m1, to + 16));
      }
      _mm512_mask_storeu_ps(to, m0, low);
      _mm512_mask_storeu_ps(to + 16, m1, high);
    }
  }
};

// Denormals are zeros in products of bf16 anyway; elsewhere each would cost a microcode assist.
struct Bf16Blocks : WideMatmulBlocks<Bf16Kernel> {
  static void run(const WideMatmulTask& t, char* scratch, int64_t begin, int64_t end) {
    flushing_denormals([&] {
      tile_configure();
      WideMatmulBlocks<Bf16Kernel>::run(t, scratch, begin, end);
      tile_release();
    });
  }
  static constexpr WideMatmulEngine engine{units, scratch_bytes, run};
};

}  // namespace

const WideMatmulEngine& GRADOPS_ISA::wide_matmul_bf16() { return Bf16Blocks::engine; }

}  // namespace gradops
