// A code of b bits, k places above bit 0 of a word, becomes a float without a conversion: under the exponent of
// 2^(23 - b k) the bits of the word that hold it are worth exactly the code, and 2^(23 - b k) + zero is taken away,
// exactly. So a weight costs an and, an or and a subtraction, and for each row of x a multiplication and addition.
#include "quant/dequant_linear.h"

#include "common/simd.h"
#include "common/widen.h"
#include "quant/bit_stream.h"

namespace gradops::GRADOPS_ISA {
namespace {

using F = Vec<float>;
using U = Vec<uint32_t>;
constexpr int kLane = kLanes<float>;
constexpr int64_t kTile = kDequantColumns, kStripFloats = 64 * 1024;  // of sums: they stay in the L2 cache
constexpr int kMostUnitWords = int(kDequantTerms / 4);                // words of a run, down a column

// Rows of x whose sums are in registers together; the rows that are left are padded to a power of two.
constexpr int kRows = kVectorRegisters == 32 ? 8 : 4;
int64_t padded_rows(int64_t rows) {
  const int64_t rest = rows % kRows;
  return rows - rest + (rest > 4 ? 8 : rest > 2 ? 4 : rest);
}

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

struct Run {  // a run of inputs, in the columns of a tile
  const uint32_t* words;
  int64_t stride, units;
  const float *zero, *scale;  // of one group: kWindow x kTile, with kMagic added, and kTile. Of many: groups x kTile
  const int32_t* group;       // of many
};

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

// Codes n * kLane and on of a stream of bits.
template <int b, int... L>
[[gnu::always_inline]] inline F unpacked(const uint32_t* words, int n, std::integer_sequence<int, L...>) {
  const int first = n * kLane * b;
  const U bit = U{uint32_t(L * b)...} + uint32_t(first % 32), word = bit / 32, shift = bit % 32;
  const U from = load_anywhere(words + first / 32);
  U code = __builtin_shuffle(from, word) >> shift;
  if (32 % b) code |= __builtin_shuffle(from, word + 1) << 1 << (31 - shift);
  return __builtin_convertvector(Vec<int32_t>(code & ((1u << b) - 1)), F);
}

// These know nothing of the width of codes, and so are compiled once.
void widen_scales(const PackedWeight& w, int64_t group, int64_t col, int64_t cols, float* scale) {
  with_type(w.scale_type, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(w.scales) + group * w.out + col;
    for (int64_t c = 0; c < cols; ++c) scale[c] = float(widen(from[c]));
  });
  for (int64_t c = cols; c < kTile; ++c) scale[c] = 0;
}
void add_bias(Element type, const void* bias, int64_t first, int64_t cols, float* y) {
  with_type(type, [&](auto zero) {
    const auto* b = static_cast<const decltype(zero)*>(bias) + first;
    for (int64_t c = 0; c < cols; ++c) y[c] += float(widen(b[c]));
  });
}
void narrow_row(Element type, const float* from, int64_t cols, void* to, int64_t at) {
  with_type(type, [&](auto zero) {
    auto* y = static_cast<decltype(zero)*>(to) + at;
    for (int64_t c = 0; c < cols; ++c) narrow(from[c], y[c]);
  });
}

// Zero points and scales of one group, for the columns of a tile; beyond the last column, scales of 0.
template <int b>
void constants(const PackedWeight& w, int64_t group, int64_t col, float* zero, float* scale) {
  const int64_t cols = w.out - col < kTile ? w.out - col : kTile, packed = (w.out * b + 31) / 32;
  const int64_t first = col * b / 32, left = packed - first;
  uint32_t words[kTile * b / 32 + kLane] = {};
  for (int64_t i = 0; i < kTile * b / 32 && i < left; ++i) words[i] = w.zeros[group * packed + first + i];
#pragma GCC unroll 32
  for (int n = 0; n < kTile / kLane; ++n)
    vec_at(zero + n * kLane) = unpacked<b>(words, n, std::make_integer_sequence<int, kLane>()) + float(w.zero_offset);
  widen_scales(w, group, col, cols, scale);
}

struct Scratch {
  float *zero, *scale, *y;
  uint32_t* words;
  Scratch(char* memory, int64_t tables)
      : zero(reinterpret_cast<float*>(memory)),
        scale(zero + tables * kTile),
        y(scale + tables * kTile + kMostUnitWords * kTile),
        words(reinterpret_cast<uint32_t*>(scale + tables * kTile)) {}
};
int64_t tables_of(const PackedWeight& w) { return w.groups > 4 ? w.groups : 4; }

// The words of a run in the columns of a tile: where they are, or if some do not exist, a copy with zeros.
template <int b>
void locate(const PackedWeight& w, int64_t unit, int64_t units, int64_t col, uint32_t* copy, Run& run) {
  run.words = w.words + unit * unit_words(b) * w.out + col;
  run.stride = w.out;
  run.units = units;
  const int64_t all = (w.in * b + 31) / 32, first = unit * unit_words(b);
  if (w.out - col >= kTile && first + units * unit_words(b) <= all) return;
  for (int64_t i = 0; i < units * unit_words(b); ++i)
    for (int64_t c = 0; c < kTile; ++c)
      copy[i * kTile + c] = first + i < all && col + c < w.out ? run.words[i * w.out + c] : 0;
  run.words = copy;
  run.stride = kTile;
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
  const PackedWeight& w = t.w;
  const Scratch scratch(memory, tables_of(w));
  const int64_t tiles = (w.out + kTile - 1) / kTile;
  with_bits(w.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value;
    for (int64_t next; begin < end; begin = next) {
      // A strip of columns, whose words are read along the rows. Tables of all groups are made for a tile only.
      const int64_t block = begin / tiles, row = block * kDequantRows;
      const int64_t rows = t.rows - row < kDequantRows ? t.rows - row : kDequantRows;
      const int64_t most = plan.mixed ? 1 : kStripFloats / (padded_rows(rows) * kTile);
      next = begin + (most < 1 ? 1 : most);
      if (next > end) next = end;
      if (next > (block + 1) * tiles) next = (block + 1) * tiles;
      const int64_t first = begin % tiles * kTile, width = (next - begin) * kTile;
      for (int64_t i = 0; i < padded_rows(rows) * width; i += kLane) vec_at(scratch.y + i) = F{};
      if (plan.mixed)
        for (int64_t g = 0; g < w.groups; ++g)
          constants<b>(w, g, first, scratch.zero + g * kTile, scratch.scale + g * kTile);
      for (int64_t i = 0; i < plan.count; ++i) {
        const InputRun& run = plan.runs[i];
        const int64_t input = run.unit * unit_inputs(b);
        for (int64_t c = 0; c < width; c += kTile) {
          const int64_t cols = w.out - first - c < kTile ? w.out - first - c : kTile;
          Run part{nullptr, 0, 0, scratch.zero, scratch.scale, plan.group + input};
          locate<b>(w, run.unit, run.units, first + c, scratch.words, part);
          const float* x = plan.x + row * plan.inputs;
          if (plan.mixed) {
            multiply_tile<b, true>(part, cols, x, plan.inputs, input, rows, scratch.y + c, width);
          } else {
            constants<b>(w, run.group, first + c, scratch.zero, scratch.scale);
            for (int k = kWindow<b> - 1; k >= 0; --k)
              for (int64_t n = 0; n < kTile; ++n) scratch.zero[k * kTile + n] = scratch.zero[n] + kMagic<b>(k);
            multiply_tile<b, false>(part, cols, x, plan.inputs, input, rows, scratch.y + c, width);
          }
        }
      }
      const int64_t cols = w.out - first < width ? w.out - first : width;
      for (int64_t r = 0; r < rows; ++r) {
        float* y = scratch.y + r * width;
        if (t.bias) add_bias(t.bias_type, t.bias, first, cols, y);
        narrow_row(t.type, y, cols, t.y, (row + r) * w.out + first);
      }
    }
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
