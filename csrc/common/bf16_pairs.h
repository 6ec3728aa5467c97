// bf16_pairs.h: products of bf16 with vdpbf16ps, of matrices in "pairs": panels of 32 columns, where row k of a panel
// has the dwords (M[2k][j], M[2k+1][j]). One dword is multiplied by 16 of them. So a matrix in pairs is the right
// operand of a product, and the left operand of its transpose's, without another copy. For *.bf16.kernel.cpp only:
// everything is local to the file that includes it.
#pragma once
#include "common/bf16_blocks.h"

namespace gradops {
namespace {

constexpr long kRow = 128;   // bytes of a row of a panel: 32 dwords
constexpr long kGroup = 16;  // pairs of terms: a panel's columns

// Panels of 32 columns of floats, or of pairs of bf16.
struct Panels {
  char* data;
  long rows;
  char* at(long row, long col) const { return data + (col / 32 * rows + row) * kRow + col % 32 * 4; }
  float* floats(long row, long col) const { return reinterpret_cast<float*>(at(row, col)); }
  char* end(long cols) const { return at(0, cols); }
};

// Two rows of 32 bf16, as numbers or as pairs.
struct TwoRows {
  __m512i first, second;
};
inline __m512i words(bool from_pairs, int half) {
  alignas(64) uint16_t w[32];
  for (int i = 0; i < 32; ++i)
    w[i] = uint16_t(from_pairs ? 2 * (i % 16) + (i / 16) * 32 + half : (i % 2) * 32 + i / 2 + 16 * half);
  return load(w);
}
GRADOPS_INLINE inline TwoRows pairs_of(__m512i row0, __m512i row1) {
  return {_mm512_permutex2var_epi16(row0, words(false, 0), row1),
          _mm512_permutex2var_epi16(row0, words(false, 1), row1)};
}
GRADOPS_INLINE inline TwoRows rows_of(__m512i pairs0, __m512i pairs1) {
  return {_mm512_permutex2var_epi16(pairs0, words(true, 0), pairs1),
          _mm512_permutex2var_epi16(pairs0, words(true, 1), pairs1)};
}
inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// The left operand has the dword of row r and pair k at r * kRowStep + k * kPairStep.
struct ByColumns {  // pairs, read as their transpose
  static constexpr long kRowStep = 4, kPairStep = kRow;
};
struct ByRows {
  static constexpr long kRowStep = 64, kPairStep = 4;
};

// A tile of left * right, 16 R by C, a pass over some terms at a time: `kept` has the sums in between. The last one
// calls done(sums).
template <class Left, int R, int C, class F>
GRADOPS_INLINE inline void tile(const char* left, long group_step, const char* right, long groups, bool begins,
                                bool ends, float* kept, F done) {
  __m512 sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  if (!begins)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sums[r][c] = _mm512_load_ps(kept + 32 * r + 16 * c);
  for (; groups > 0; --groups, left += group_step, right += kGroup * kRow)
#pragma GCC unroll 4
    for (long k = 0; k < kGroup; ++k) {
      __m512bh x[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) x[c] = (__m512bh)load(right + k * kRow + 64 * c);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const int dword = *reinterpret_cast<const int*>(left + r * Left::kRowStep + k * Left::kPairStep);
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(dword);
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], pair, x[c]);
      }
    }
  if (ends) {
    done(sums);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) _mm512_store_ps(kept + 32 * r + 16 * c, sums[r][c]);
  }
}

}  // namespace
}  // namespace gradops
