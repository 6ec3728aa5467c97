// x in bf16 and codes of 2 or 4 bits: a code less its zero point is a whole number that bf16 holds exactly, so products
// of bf16 with sums in float lose nothing, and are twice as many as products of float. Two codes 16 bits apart in a
// word become such a pair at once: a shift, an and, a subtraction, and a look-up of 5 bits.
#include <immintrin.h>

#include "quant/dequant_tiles.h"

namespace gradops::GRADOPS_ISA {
namespace {

static_assert(kLane == 16 && kRows == 8);

constexpr int kApart = 16;  // bits between the codes of a pair
template <int b>
constexpr int kPairs = kApart / b;  // of a word
constexpr int64_t kMostPairs = kDequantTerms / 2;

// Whole numbers of 5 bits with a sign, as bf16.
__m512i numbers() {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) table[i] = uint16_t(bits_of(float(i < 16 ? i : i - 32)) >> 16);
  return _mm512_load_si512(table);
}
template <int b>
[[gnu::always_inline]] inline __m512i pair_of(__m512i words, int j, __m512i zero, __m512i numbers) {
  const __m512i mask = _mm512_set1_epi32(((1 << b) - 1) * 0x10001);
  const __m512i code = _mm512_and_si512(_mm512_srli_epi32(words, unsigned(b * j)), mask);
  return _mm512_permutexvar_epi16(_mm512_sub_epi16(code, zero), numbers);
}

// y[r] += x[r] times N vectors of columns, for R rows. `panel`: pairs that were unpacked before, or null.
template <int b, int R, int N>
[[gnu::noinline]] void multiply(const Run& run, const int32_t* zero, const int32_t* panel, const int32_t* x, float* y,
                                int64_t y_row) {
  constexpr int kAhead = 8;
  const __m512i table = numbers();
  __m512 sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();
  const auto step = [&](const __m512i(&w)[N], const int32_t* at) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh l = (__m512bh)_mm512_set1_epi32(at[r]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], l, (__m512bh)w[n]);
    }
  };
  if (panel) {
#pragma GCC unroll 2
    for (int64_t p = 0; p < run.units * kPairs<b>; ++p, panel += N * kLane, x += R) {
      __m512i w[N];
      for (int n = 0; n < N; ++n) w[n] = _mm512_load_si512(panel + n * kLane);
      step(w, x);
    }
  } else {
    const uint32_t* words = run.words;
    for (int64_t u = 0; u < run.units; ++u, words += run.stride) {
      // Rows are too far apart for the processor to guess; after the last, the next tile begins.
      const int64_t ahead = u + kAhead < run.units ? kAhead : kAhead - run.units;
      const uint32_t* next = words + ahead * run.stride + (ahead == kAhead ? 0 : N * kLane);
      __m512i q[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) q[n] = _mm512_loadu_si512(words + n * kLane), __builtin_prefetch(next + n * kLane);
#pragma GCC unroll 8
      for (int j = 0; j < kPairs<b>; ++j, x += R) {
        __m512i w[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) w[n] = pair_of<b>(q[n], j, _mm512_load_si512(zero + n * kLane), table);
        step(w, x);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* const to = y + r * y_row + n * kLane;
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(run.scale + n * kLane), sum[r][n], _mm512_load_ps(to)));
    }
}

constexpr int kWide = 2;  // vectors of columns of a panel
template <int b>
void unpack(const Run& run, const int32_t* zero, int32_t* panel) {
  const __m512i table = numbers();
  for (int64_t u = 0; u < run.units; ++u)
    for (int n = 0; n < kWide; ++n) {
      const uint32_t* const words = run.words + u * run.stride + n * kLane;
      __builtin_prefetch(words + kWide * kLane);  // the next panel's
      const __m512i q = _mm512_loadu_si512(words), z = _mm512_load_si512(zero + n * kLane);
#pragma GCC unroll 8
      for (int j = 0; j < kPairs<b>; ++j)
        _mm512_store_si512(panel + ((u * kPairs<b> + j) * kWide + n) * kLane, pair_of<b>(q, j, z, table));
    }
}

// The first `cols` columns of a tile, all rows of a block. More than kRows rows share what was unpacked.
template <int b>
void multiply_tile(const Run& run, const int32_t* zero, int64_t cols, const int32_t* x, int64_t inputs, int64_t first,
                   int64_t rows, float* y, int64_t y_row) {
  alignas(64) int32_t panel[kMostPairs * kWide * kLane];
  const auto part_at = [&](int64_t c) __attribute__((always_inline)) {
    Run part = run;
    part.words += c, part.scale += c;
    return part;
  };
  const auto tile = [&](auto count, auto wide, int64_t r, int64_t c,
                        const int32_t* unpacked) __attribute__((always_inline)) {
    constexpr int R = decltype(count)::value, N = decltype(wide)::value;
    multiply<b, R, N>(part_at(c), zero + c, unpacked, x + r * inputs + first * R, y + r * y_row + c, y_row);
  };
  const auto rest = [&](auto f, int64_t r) __attribute__((always_inline)) {
    const int64_t left = rows - r;
    if (left > 4)
      f(Bits<8>(), r);
    else if (left > 2)
      f(Bits<4>(), r);
    else if (left == 2)
      f(Bits<2>(), r);
    else if (left == 1)
      f(Bits<1>(), r);
  };
  if (rows <= kRows) {
    rest(
        [&](auto count, int64_t r) __attribute__((always_inline)) {
          constexpr int R = decltype(count)::value, N = R < 4 ? 8 : 16 / R;
          for (int64_t c = 0; c < cols; c += N * kLane) tile(count, Bits<N>(), r, c, nullptr);
        },
        0);
    return;
  }
  for (int64_t c = 0; c < cols; c += kWide * kLane) {
    unpack<b>(part_at(c), zero + c, panel);
    int64_t r = 0;
    for (; rows - r >= kRows; r += kRows) tile(Bits<kRows>(), Bits<kWide>(), r, c, panel);
    rest([&](auto count, int64_t at) __attribute__((always_inline)) { tile(count, Bits<kWide>(), at, c, panel); }, r);
  }
}

}  // namespace

void dequant_arrange_bf16(const DequantLinearTask& t, int64_t begin, int64_t end, int64_t inputs, float* to) {
  const int64_t unit = unit_inputs(t.w.bits), half = unit / 2;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows, R = padded_rows(rows);
    int32_t* const at = reinterpret_cast<int32_t*>(to) + first * inputs;  // half of it is used
    for (int64_t r = 0; r < R; ++r) {
      const uint16_t* x = static_cast<const uint16_t*>(t.x) + (first + r) * t.w.in;
      const auto one = [&](int64_t i) { return uint32_t(r < rows && i < t.w.in ? x[i] : 0); };
      for (int64_t u = 0; u < inputs; u += unit)
        for (int64_t j = 0; j < half; ++j) at[(u / 2 + j) * R + r] = int32_t(one(u + j) | one(u + j + half) << kApart);
    }
  }
}

void dequant_linear_tiles_bf16(const DequantLinearTask& t, const DequantPlan& plan, int64_t begin, int64_t end,
                               char* memory) {
  each_tile(t, plan, begin, end, memory,
            [&](auto bits, const Run& run, float* zero, int64_t cols, const float* x, int64_t input, int64_t rows,
                float* y, int64_t y_row) __attribute__((always_inline)) {
              constexpr int b = decltype(bits)::value;
              if constexpr (b == 2 || b == 4) {
                int32_t* const pairs = reinterpret_cast<int32_t*>(zero + kTile);  // room for another table
                for (int64_t n = 0; n < kTile; ++n) pairs[n] = int32_t(zero[n]) * 0x10001;
                multiply_tile<b>(run, pairs, cols, reinterpret_cast<const int32_t*>(x), plan.inputs, input / 2, rows, y,
                                 y_row);
              }
            });
}

}  // namespace gradops::GRADOPS_ISA
