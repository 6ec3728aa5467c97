// bf16_blocks.h: matrices as blocks of 32 x 32 bf16, ready to be operands of products.
//
// A block is 2 KB, in one of two forms. With N = 2, a number is the sum of two bf16, and a block of
// the high parts is followed by one of the low parts.
//   R ("rows"):  32 rows of 64 bytes: the LEFT operand.
//   V ("VNNI"):  the RIGHT operand: two tiles of 16 rows, where dword n of row k holds the pair
//                (M[2k][j], M[2k+1][j]), j = 2n in the first tile and 2n+1 in the second.
// Even columns in the first tile and odd ones in the second mean that R -> V and float sums -> R need
// shifts and blends only. For the transpose there are two identities (T transposes 16 x 16 dwords):
//   V(M^T) = T(even rows of R(M)), T(odd rows of R(M))
//   even rows of R(M^T) = T(first tile of V(M)), odd rows = T(second tile of V(M))
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define GRADOPS_INLINE __attribute__((always_inline))

namespace gradops {
namespace {

constexpr long kPart = 2048;  // bytes of a block of bf16: of the high parts, or of the low ones
constexpr long kTile = 1024;  // bytes of one of its two tiles

inline __m512i load(const void* p) { return _mm512_load_si512(p); }
inline void store(void* p, __m512i v) { _mm512_store_si512(p, v); }

// A row of 32 numbers. As floats they are two vectors: the even and the odd columns.
template <int N>
struct Row {
  __m512i part[N];
};
template <int N>
inline Row<N> load_row(const char* p) {
  Row<N> r;
  for (int k = 0; k < N; ++k) r.part[k] = load(p + k * kPart);
  return r;
}
template <int N>
inline void store_row(char* p, const Row<N>& r) {
  for (int k = 0; k < N; ++k) store(p + k * kPart, r.part[k]);
}

inline __m512 even_float(__m512i r) { return _mm512_castsi512_ps(_mm512_slli_epi32(r, 16)); }
inline __m512 odd_float(__m512i r) {
  return _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32(int(0xFFFF0000))));
}
template <int N>
inline __m512 even_float(const Row<N>& r) {
  const __m512 high = even_float(r.part[0]);
  return N == 1 ? high : _mm512_add_ps(high, even_float(r.part[N - 1]));
}
template <int N>
inline __m512 odd_float(const Row<N>& r) {
  const __m512 high = odd_float(r.part[0]);
  return N == 1 ? high : _mm512_add_ps(high, odd_float(r.part[N - 1]));
}

inline __m512i round_to_bf16(__m512 even, __m512 odd) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
template <int N>
inline Row<N> to_row(__m512 even, __m512 odd) {
  Row<N> r;
  r.part[0] = round_to_bf16(even, odd);
  if (N == 2)
    r.part[N - 1] = round_to_bf16(_mm512_sub_ps(even, even_float(r.part[0])), _mm512_sub_ps(odd, odd_float(r.part[0])));
  return r;
}

// T, of columns 8 h .. 8 h + 7 of the source. Rows r and r + 8 are joined by the loads; that leaves
// 24 of 32 shuffles.
template <long kSourceStep, long kTargetStep>
inline void transpose16(const char* source, char* target, long h) {
  source += 32 * h, target += 8 * h * kTargetStep;
  __m512 t[8], s[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
    t[r] = _mm512_insertf32x8(
        _mm512_castps256_ps512(_mm256_load_ps(reinterpret_cast<const float*>(source + r * kSourceStep))),
        _mm256_load_ps(reinterpret_cast<const float*>(source + (r + 8) * kSourceStep)), 1);
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    s[r] = _mm512_unpacklo_ps(t[r], t[r + 1]);
    s[r + 1] = _mm512_unpackhi_ps(t[r], t[r + 1]);
  }
  const __m512i first = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);
  const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const auto pd = [](__m512 v) { return _mm512_castps_pd(v); };
    const __m512d a0 = pd(s[k >> 1]), a1 = pd(s[2 + (k >> 1)]);
    const __m512d b0 = pd(s[4 + (k >> 1)]), b1 = pd(s[6 + (k >> 1)]);
    const __m512d a = k & 1 ? _mm512_unpackhi_pd(a0, a1) : _mm512_unpacklo_pd(a0, a1);
    const __m512d b = k & 1 ? _mm512_unpackhi_pd(b0, b1) : _mm512_unpacklo_pd(b0, b1);
    _mm512_store_pd(target + k * kTargetStep, _mm512_permutex2var_pd(a, first, b));
    _mm512_store_pd(target + (k + 4) * kTargetStep, _mm512_permutex2var_pd(a, second, b));
  }
}

// Conversions of a block, in units that may be spread over other work: 0 .. kPairs - 1 (pairs of
// rows) or 0 .. kQuarters<N> - 1 (half tiles).
constexpr long kPairs = 16;
template <int N>
constexpr long kQuarters = 4 * N;

inline void vnni_to_rows_of_transpose(const char* v, char* r, long quarter) {
  const long part = (quarter >> 2) * kPart, tile = quarter >> 1 & 1;
  transpose16<64, 128>(v + part + tile * kTile, r + part + tile * 64, quarter & 1);
}
inline void rows_to_vnni_of_transpose(const char* r, char* v, long quarter) {
  const long part = (quarter >> 2) * kPart, tile = quarter >> 1 & 1;
  transpose16<128, 64>(r + part + tile * 64, v + part + tile * kTile, quarter & 1);
}
template <int N>
inline void rows_to_vnni(const Row<N>& r0, const Row<N>& r1, char* v, long pair) {
  constexpr __mmask32 kOdd = 0xAAAAAAAAu;
  for (int k = 0; k < N; ++k) {
    const __m512i a = r0.part[k], b = r1.part[k];
    char* at = v + k * kPart + 64 * pair;
    store(at, _mm512_mask_blend_epi16(kOdd, a, _mm512_slli_epi32(b, 16)));
    store(at + kTile, _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(a, 16), b));
  }
}
template <int N>
inline void rows_to_vnni(const char* r, char* v, long pair) {
  rows_to_vnni<N>(load_row<N>(r + 128 * pair), load_row<N>(r + 128 * pair + 64), v, pair);
}
// R(M) -> R(M^T), through V(M).
template <int N>
inline void transpose_block(const char* r, char* v, char* r_of_transpose) {
  for (long u = 0; u < kPairs; ++u) rows_to_vnni<N>(r, v, u);
  for (long u = 0; u < kQuarters<N>; ++u) vnni_to_rows_of_transpose(v, r_of_transpose, u);
}

}  // namespace
}  // namespace gradops
