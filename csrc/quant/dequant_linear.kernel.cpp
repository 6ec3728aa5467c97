// A code of b bits, k places above bit 0 of a word, becomes a float without a conversion: under the exponent of
// 2^(23 - b k) the bits of the word that hold it are worth exactly the code, and 2^(23 - b k) + zero is taken away,
// exactly. So a weight costs an and, an or and a subtraction, and for each row of x a multiplication and addition.
#include "quant/dequant_tiles.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <int b>
constexpr int kWindow = b == 8 ? 2 : 4;  // codes that are read at their places, from bit 0 on
template <int b>
constexpr float kMagic(int k) {
  return float(1 << (23 - b * k));
}

// Of a unit, the words from the first bit of window j on.
template <int b>
[[gnu::always_inline]] inline U window(const uint32_t* words, int64_t stride, int j) {
  constexpr int bits = b * kWindow<b>;
  const int word = j * bits / 32, shift = j * bits % 32;
  U q = load_anywhere(words + word * stride) >> shift;
  if (shift + bits > 32) q |= load_anywhere(words + (word + 1) * stride) << (32 - shift);
  return q;
}
template <int b>
[[gnu::always_inline]] inline F number(U window, int k) {  // kMagic(k) + code k
  const uint32_t mask = ((1u << b) - 1) << (b * k), magic = uint32_t(127 + 23 - b * k) << 23;
  return F((window & mask) | magic);
}

// y[r] += x[r] times N vectors of columns, for R rows. Every sum has its one order, whatever R and N.
template <int b, int R, int N, bool kMixed>
[[gnu::noinline]] void multiply(const Run& run, const float* x, float* y, int64_t y_row) {
  constexpr int kCodes = int(unit_inputs(b)), kAhead = 8 / unit_words(b);
  F sum[R][N] = {};
  const uint32_t* words = run.words;
  const int32_t* group = run.group;
  for (int64_t u = 0; u < run.units; ++u, words += unit_words(b) * run.stride, x += R * kCodes) {
    if constexpr (R < 4) {  // rows are too far apart for the processor to guess; after the last, the next tile begins
      const int64_t ahead = u + kAhead < run.units ? kAhead : kAhead - run.units;
      const uint32_t* next = words + ahead * unit_words(b) * run.stride + (ahead == kAhead ? 0 : N * kLane);
      for (int w = 0; w < unit_words(b); ++w)
#pragma GCC unroll 8
        for (int n = 0; n < N * kLane / 16; ++n) __builtin_prefetch(next + w * run.stride + 16 * n);
    }
    const auto step = [&](int j) __attribute__((always_inline)) {
      U q[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) q[n] = window<b>(words + n * kLane, run.stride, j);
#pragma GCC unroll 4
      for (int k = 0; k < kWindow<b>; ++k) {
        const float *zero = run.zero + k * kTile, *scale = nullptr, *at = x + (j * kWindow<b> + k) * R;
        if constexpr (kMixed) {
          const int64_t g = group[j * kWindow<b> + k];
          zero = run.zero + g * kTile, scale = run.scale + g * kTile;
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          F value = number<b>(q[n], k);
          if constexpr (kMixed)
            value = (value - kMagic<b>(k) - vec_at(zero + n * kLane)) * vec_at(scale + n * kLane);
          else
            value -= vec_at(zero + n * kLane);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r][n] += value * at[r];
        }
      }
    };
    if constexpr (b == 3) {  // 32 codes are too many for one stretch of code
#pragma GCC unroll 1
      for (int j = 0; j < kCodes / kWindow<b>; ++j) step(j);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < kCodes / kWindow<b>; ++j) step(j);
    }
    if constexpr (kMixed) group += kCodes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      F& to = vec_at(y + r * y_row + n * kLane);
      if constexpr (kMixed)
        to += sum[r][n];
      else
        to += vec_at(run.scale + n * kLane) * sum[r][n];
    }
}

// The first `cols` columns of a tile, all rows of a block.
template <int b, bool kMixed>
void multiply_tile(const Run& run, int64_t cols, const float* x, int64_t inputs, int64_t first, int64_t rows, float* y,
                   int64_t y_row) {
  const auto tile = [&](auto count, int64_t r) __attribute__((always_inline)) {
    constexpr int R = decltype(count)::value, kSums = kVectorRegisters / 2;
    constexpr int N = R == 1 ? kSums / 2 : kSums / R;  // the words of 8 vectors fill the registers
    for (int64_t c = 0; c < cols; c += N * kLane) {
      Run part = run;
      part.words += c, part.zero += c, part.scale += c;
      multiply<b, R, N, kMixed>(part, x + r * inputs + first * R, y + r * y_row + c, y_row);
    }
  };
  int64_t r = 0;
  for (; rows - r > kRows / 2; r += kRows) tile(Bits<kRows>(), r);
  const int64_t rest = rows - r;
  if (rest > 2)
    tile(Bits<4>(), r);
  else if (rest == 2)
    tile(Bits<2>(), r);
  else if (rest == 1)
    tile(Bits<1>(), r);
}

}  // namespace

int64_t dequant_scratch(const PackedWeight& w, int64_t rows) {
  const int64_t floats = (rows < kDequantRows ? padded_rows(rows) : kDequantRows) * kTile;
  return 4 * (kTile * (2 * tables_of(w) + kMostUnitWords) + (floats > kStripFloats ? floats : kStripFloats));
}

void dequant_arrange(const DequantLinearTask& t, int64_t begin, int64_t end, int64_t inputs, float* to) {
  with_type(t.type, [&](auto type) {
    using T = decltype(type);
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t rows = end - first < kRows ? end - first : kRows, R = padded_rows(rows);
      for (int64_t r = 0; r < R; ++r) {
        const T* x = static_cast<const T*>(t.x) + (first + r) * t.w.in;
        float* at = to + first * inputs + r;
        const int64_t from = r < rows ? t.w.in : 0;
        for (int64_t i = 0; i < from; ++i) at[i * R] = float(widen(x[i]));
        for (int64_t i = from; i < inputs; ++i) at[i * R] = 0;
      }
    }
  });
}

void dequant_linear_tiles(const DequantLinearTask& t, const DequantPlan& plan, int64_t begin, int64_t end,
                          char* memory) {
  each_tile(t, plan, begin, end, memory,
            [&](auto bits, const Run& run, float* zero, int64_t cols, const float* x, int64_t input, int64_t rows,
                float* y, int64_t y_row) __attribute__((always_inline)) {
              constexpr int b = decltype(bits)::value;
              if (plan.mixed) return multiply_tile<b, true>(run, cols, x, plan.inputs, input, rows, y, y_row);
              for (int k = kWindow<b> - 1; k >= 0; --k)
                for (int64_t n = 0; n < kTile; ++n) zero[k * kTile + n] = zero[n] + kMagic<b>(k);
              multiply_tile<b, false>(run, cols, x, plan.inputs, input, rows, y, y_row);
            });
}

void dequant_weight_tiles(const DequantWeightTask& t, const int32_t* group, int64_t begin, int64_t end, char* memory) {
  const PackedWeight& w = t.w;
  const Scratch scratch(memory, tables_of(w));
  with_bits(w.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value, kCodes = int(unit_inputs(b));
    for (; begin < end; ++begin) {
      const int64_t col = begin * kTile, cols = w.out - col < kTile ? w.out - col : kTile;
      for (int64_t g = 0; g < w.groups; ++g)
        constants<b>(w, g, col, scratch.zero + g * kTile, scratch.scale + g * kTile);
      for (int64_t unit = 0; unit * kCodes < w.in; ++unit) {
        Run run{};
        locate<b>(w, unit, 1, col, scratch.words, run);
        for (int64_t i = 0; i < kCodes && unit * kCodes + i < w.in; ++i) {
          const int64_t input = unit * kCodes + i, g = group[input];
          const int start = int(i) * b, word = start / 32, shift = start % 32;
          const uint32_t *low = run.words + word * run.stride, *high = shift + b > 32 ? low + run.stride : nullptr;
          const float *zero = scratch.zero + g * kTile, *scale = scratch.scale + g * kTile;
          for (int64_t c = 0; c < kTile; ++c) {
            uint32_t code = low[c] >> shift;
            if (high) code |= high[c] << (32 - shift);
            scratch.y[c] = scale[c] * (float(int32_t(code & ((1u << b) - 1))) - zero[c]);
          }
          narrow_row(t.type, scratch.y, cols, t.to, input * w.out + col);
        }
      }
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
