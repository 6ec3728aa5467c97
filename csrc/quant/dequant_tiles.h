// dequant_tiles.h: what the kernels of dequant_linear share, whatever they multiply with. For *.kernel.cpp only:
// everything is local to the file that includes it.
#pragma once
#include "common/simd.h"
#include "common/widen.h"
#include "quant/bit_stream.h"
#include "quant/dequant_linear.h"

namespace gradops {
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

struct Run {  // a run of inputs, in the columns of a tile
  const uint32_t* words;
  int64_t stride, units;
  const float *zero, *scale;  // of one group: see who reads them, and kTile. Of many: groups x kTile
  const int32_t* group;       // of many
};

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

// multiply(bits, run, zero, cols, x, input, rows, y, y_row): y += x w in the first `cols` columns of a tile, for all
// rows of a block. It may write to `zero`.
template <class Multiply>
void each_tile(const DequantLinearTask& t, const DequantPlan& plan, int64_t begin, int64_t end, char* memory,
               const Multiply& multiply) {
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
          if (!plan.mixed) constants<b>(w, run.group, first + c, scratch.zero, scratch.scale);
          multiply(bits, part, scratch.zero, cols, x, input, rows, scratch.y + c, width);
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

}  // namespace
}  // namespace gradops
