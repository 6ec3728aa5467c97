// rounding.h: numbers onto the grids that weights are stored in, in plain float arithmetic that both compilers
// vectorise or inline: CPU kernels and CUDA kernels round by the same lines. Everything is local to the includer.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace gradops {

// integer: codes 0 .. 2^bits - 1, value scale * (code - zero).
// The others are FP4 (E2M1): a code is a sign bit over an index into 0, .5, 1, 1.5, 2, 3, 4, 6.
// nvfp4: scales are E4M3 multiples of one number per matrix; mxfp4: scales are powers of two.
enum class Grid : int { integer, nvfp4, mxfp4 };
enum class ScaleType : int { f32, f16, bf16 };  // what scales of the integer grid are rounded to

struct GridTask {
  Grid grid;
  ScaleType scale_type;
  float most;      // the highest code of the integer grid
  bool symmetric;  // integer grid: zero stays in the middle
  bool one_sided;  // symmetric, but a group without negative numbers uses the half above zero only
  float mse;       // the exponent p of the error |w - q|^p that a search over 80 shrunk ranges minimises; 0: no search
};

namespace {

GRADOPS_SHARED float lesser(float a, float b) { return a < b ? a : b; }  // b where one is NaN
GRADOPS_SHARED float greater(float a, float b) { return a > b ? a : b; }
GRADOPS_SHARED float from_bits(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}
GRADOPS_SHARED uint32_t to_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
// To the nearest integer, ties to even, for |x| < 2^22; no instruction of its own at the lowest x86-64 level.
GRADOPS_SHARED float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
// x > 0 to `keep` bits of mantissa after the first, ties to even; no subnormals.
GRADOPS_SHARED float keep_bits(float x, int keep) {
  const int drop = 23 - keep;
  const uint32_t u = to_bits(x), half = (1u << (drop - 1)) - 1 + (u >> drop & 1);
  return from_bits((u + half) >> drop << drop);
}
// x >= 0 to a floating-point format; never zero, so that nothing is divided by it. NaN and infinity pass.
GRADOPS_SHARED float round_float(float x, int keep, float smallest_normal, float spacing, float highest) {
  const float fine = round_even(lesser(x, smallest_normal) / spacing) * spacing;
  const float coarse = lesser(keep_bits(x, keep), highest);
  const float y = x < smallest_normal ? greater(fine, spacing) : coarse;
  return x - x == 0.f ? y : x;
}

GRADOPS_SHARED float round_scale(float scale, const GridTask& t, float unit) {
  if (t.grid == Grid::nvfp4) return unit * round_float(scale / unit, 3, 0x1p-6f, 0x1p-9f, 448.f);
  if (t.grid == Grid::integer && t.scale_type == ScaleType::f16)
    return round_float(scale, 10, 0x1p-14f, 0x1p-24f, 65504.f);
  if (t.grid == Grid::integer && t.scale_type == ScaleType::bf16)
    return greater(scale, 0x1p-126f) == scale ? (scale - scale == 0.f ? keep_bits(scale, 7) : scale)
                                              : (scale != scale ? scale : 0x1p-126f);
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

struct Range {
  float scale, zero;
};
// The grid over [low, high], which contains 0.
GRADOPS_SHARED Range range_of(float low, float high, const GridTask& t, float unit) {
  if (t.grid != Grid::integer) {
    const float most = greater(high, -low);
    if (t.grid == Grid::nvfp4) return {round_scale(most / 6.f, t, unit), 0.f};
    // 2^(floor(log2(most)) - 2): the exponent bits, less two
    const float power = from_bits(to_bits(most) & 0x7f800000u) * 0.25f;
    return {most == 0.f ? 1.f : power < 0x1p-126f ? 0x1p-126f : power, 0.f};
  }
  const bool nothing = low == 0.f && high == 0.f;
  low = nothing ? -1.f : low;
  high = nothing ? 1.f : high;
  // The lowest number of a symmetric group lies halfway between two codes by definition: a scale that is this much
  // smaller takes it to the lowest code, whatever rounding has done to either. (Coarser scales decide by themselves.)
  const bool halfway = t.symmetric && low < 0.f && t.scale_type == ScaleType::f32;
  const float scale = round_scale((high - low) / t.most * (halfway ? 1.f - 0x1p-19f : 1.f), t, unit);
  const float at = round_even(lesser(greater(-low / scale, 0.f), t.most));
  return {scale, t.symmetric ? 0.5f * (t.most + 1.f) : at};
}
GRADOPS_SHARED void make_symmetric(float& low, float& high, const GridTask& t) {
  if (!t.symmetric) return;
  high = greater(high, -low);
  low = t.one_sided && low == 0.f ? 0.f : -high;
}

struct Rounded {
  float code, value;
};
template <bool kInteger>
GRADOPS_SHARED Rounded round_to_grid(float w, float scale, float zero, float most) {
  const float ratio = w / scale;
  if constexpr (kInteger) {
    const float near = round_even(greater(lesser(ratio, 512.f), -512.f));  // codes clip long before
    const float code = greater(lesser(near + zero, most), 0.f);
    return {code, scale * (code - zero)};
  } else {
    const float clipped = greater(lesser(ratio, 6.f), -6.f), size = clipped < 0.f ? -clipped : clipped;
    const float step = size < 2.f ? 0.5f : size < 4.f ? 1.f : 2.f;
    const float near = round_even(size / step) * step;
    const float index = near < 2.f ? 2.f * near : near < 4.f ? near + 2.f : 0.5f * near + 4.f;
    const bool negative = clipped < 0.f && near > 0.f;
    return {negative ? index + 8.f : index, scale * (negative ? -near : near)};
  }
}

constexpr int kShrinks = 80;  // ranges tried by the search: 1, 0.99, ..., 0.21 of the whole

}  // namespace
}  // namespace gradops
