// bf16_multiply.h: the product of blocks (bf16_blocks.h), on the tile unit or with vdpbf16ps.
//
//   multiply<N>(left, right, n, out, units, work):  out = sum over p < n of left[p] right[p]
//
// left: n blocks in R form; right: n blocks in V form; out: 32 rows of 16 even columns and then 16
// odd ones, float. With N = 2 a product is high high + high low + low high.
// Meanwhile work(0) .. work(units - 1) run, in this order: the conversions of the block before. They
// may neither touch `out` nor write `left` and `right`.
#pragma once
#include "common/amx.h"
#include "common/bf16_blocks.h"

namespace gradops {
namespace {

#if defined(GRADOPS_LEVEL_amx) || defined(GRADOPS_LEVEL_amx_twin)

// Spreads `units` calls over `slots`: vector work hides, in part, behind the tile unit.
template <class W>
struct Spread {
  long units, step, due, done;
  W work;
  Spread(long units, long slots, W work)
      : units(units), step(((units << 16) + slots - 1) / slots), due(0), done(0), work(work) {}
  GRADOPS_INLINE inline void next() {
    due += step;
    for (const long to = due >> 16 < units ? due >> 16 : units; done < to; ++done) work(done);
  }
};

constexpr long kPanelsBeyondL2 = 8;  // of the right operand, for one pass over the left one

// Tiles 0 .. 3 are the result (upper even, upper odd, lower even, lower odd), 4 and 5 the left
// operand, 6 and 7 the right one.
template <int N, class W>
GRADOPS_INLINE inline void multiply(const char* left, const char* right, long n, float* out, long units, W work) {
  Spread<W> spread(units, n, work);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (long p = 0; p < n; ++p) {
    tile_load<4>(left);
    if constexpr (N == 2) {  // high low
      tile_load<6>(right + kPart);
      tile_dp_bf16<0, 4, 6>();
      tile_load<7>(right + kPart + kTile);
      tile_dp_bf16<1, 4, 7>();
      tile_load<5>(left + kTile);
      tile_dp_bf16<2, 5, 6>();
      tile_dp_bf16<3, 5, 7>();
    }
    tile_load<6>(right);
    tile_dp_bf16<0, 4, 6>();
    tile_load<7>(right + kTile);
    tile_dp_bf16<1, 4, 7>();
    if constexpr (N == 1) tile_load<5>(left + kTile);
    tile_dp_bf16<2, 5, 6>();
    tile_dp_bf16<3, 5, 7>();
    if constexpr (N == 2) {  // low high
      tile_load<4>(left + kPart);
      tile_dp_bf16<0, 4, 6>();
      tile_dp_bf16<1, 4, 7>();
      tile_load<5>(left + kPart + kTile);
      tile_dp_bf16<2, 5, 6>();
      tile_dp_bf16<3, 5, 7>();
    }
    left += N * kPart;
    right += N * kPart;
    spread.next();
  }
  tile_store<0>(out, 32);
  tile_store<1>(out + 16, 32);
  tile_store<2>(out + 16 * 32, 32);
  tile_store<3>(out + 16 * 32 + 16, 32);
}

#else

// vdpbf16ps reads the same layouts: a dword of a row of the left block, broadcast, times a row of
// each right tile. Eight rows at a time: 16 sums, and fewer than two loads for every three products.
constexpr long kPanelsBeyondL2 = 4;  // of the right operand, for one pass over the left one
constexpr int kRows = 8;
using Sums = __m512[kRows][2];

constexpr long kAhead = 8 * kPart;  // bytes of the left operand between its use and its prefetch

template <int N>
GRADOPS_INLINE inline void multiply_rows(const char* left, const char* right, const char* ahead, Sums& sums) {
  const auto bf16s = [](__m512i v) GRADOPS_INLINE { return (__m512bh)v; };
  const auto pair = [](const char* p) GRADOPS_INLINE { return _mm512_set1_epi32(*reinterpret_cast<const int*>(p)); };
  for (long pair_of_k = 0; pair_of_k < 16; pair_of_k += 2) {
    // Rows of the left operand are strided, and all of a chunk of the right one is read in a quarter of the time that
    // it is used for: the processor sees neither coming. 1.1 to 1.4 times faster beyond L2.
    for (int q = 0; q < N; ++q) {
      _mm_prefetch(left + kAhead + q * kPart + 32 * pair_of_k, _MM_HINT_T0);
      _mm_prefetch(ahead + q * kPart + 32 * pair_of_k, _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (long k = pair_of_k; k < pair_of_k + 2; ++k) {
      __m512i even[N], odd[N];
      for (int q = 0; q < N; ++q) {
        even[q] = load(right + q * kPart + 64 * k);
        odd[q] = load(right + q * kPart + kTile + 64 * k);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i l = pair(left + 64 * r + 4 * k);
        for (int q = 0; q < N; ++q) {
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], bf16s(l), bf16s(even[q]));
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], bf16s(l), bf16s(odd[q]));
        }
      }
      if constexpr (N == 2) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512i l = pair(left + kPart + 64 * r + 4 * k);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], bf16s(l), bf16s(even[0]));
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], bf16s(l), bf16s(odd[0]));
        }
      }
    }
  }
}

template <int N, class W>
GRADOPS_INLINE inline void multiply(const char* left, const char* right, long n, float* out, long units, W work) {
  constexpr long kChunk = 8 / N;  // 16 KB of the right operand stay in L1 for the four groups of rows
  constexpr long kGroups = 32 / kRows;
  for (long u = 0; u < units; ++u) work(u);  // same ports: spreading would gain nothing
  for (long p0 = 0; p0 < n; p0 += kChunk) {
    const long p1 = p0 + kChunk < n ? p0 + kChunk : n;
    for (long g = 0; g < kGroups; ++g) {
      float* rows = out + g * kRows * 32;
      Sums sums;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        for (int h = 0; h < 2; ++h) sums[r][h] = _mm512_setzero_ps();
      for (long p = p0; p < p1; ++p)
        multiply_rows<N>(left + p * N * kPart + g * kRows * 64, right + p * N * kPart,
                         right + (p + kChunk) * N * kPart + g * (kPart / kGroups), sums);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        for (int h = 0; h < 2; ++h) {
          float* to = rows + 32 * r + 16 * h;
          _mm512_store_ps(to, p0 == 0 ? sums[r][h] : _mm512_add_ps(_mm512_load_ps(to), sums[r][h]));
        }
    }
  }
}

#endif

}  // namespace
}  // namespace gradops
