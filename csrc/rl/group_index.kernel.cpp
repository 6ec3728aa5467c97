// What group_index reads of all keys before it knows how they lie.
#include "rl/group_index.h"

#include "common/simd.h"

namespace gradops::GRADOPS_ISA {
namespace {
constexpr int W = kLanes<int64_t>;
typedef long long Keys __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));

// Bit k: lane k is all ones.
inline unsigned lane_bits(Keys mask) {
#if defined(__AVX512DQ__)
  return __builtin_ia32_cvtq2mask512(mask);
#elif defined(__AVX2__)
  return unsigned(__builtin_ia32_movmskpd256(__builtin_bit_cast(Vec<double>, mask)));
#elif defined(__SSE2__)
  return unsigned(__builtin_ia32_movmskpd(__builtin_bit_cast(Vec<double>, mask)));
#else
  unsigned bits = 0;
  for (int k = 0; k < W; ++k) bits |= unsigned(mask[k] & 1) << k;
  return bits;
#endif
}

// Writes the places whose bit is set, one after another and then what it likes, W in all; returns how many are set.
// No branch: where groups begin cannot be foreseen.
inline int put(Vec<int64_t> places, unsigned bits, int64_t* to) {
#if defined(__AVX512F__)
  typedef long long Places __attribute__((vector_size(64)));
  *reinterpret_cast<Keys*>(to) = __builtin_ia32_compressdi512_mask((Places)places, Places{}, bits);
#else
  for (int k = 0, at = 0; k < W; ++k) to[at] = places[k], at += bits >> k & 1;
#endif
  return __builtin_popcount(bits);
}
}  // namespace

KeyRange key_range(const int64_t* keys, int64_t n) {
  KeyRange r{keys[0], keys[0]};
  for (int64_t i = 0; i < n; ++i) {
    r.low = keys[i] < r.low ? keys[i] : r.low;
    r.high = keys[i] > r.high ? keys[i] : r.high;
  }
  return r;
}

int64_t key_runs(const int64_t* keys, int64_t n, int64_t* offsets) {
  int64_t groups = 1, i = 1;
  Vec<int64_t> places;
  for (int k = 0; k < W; ++k) places[k] = k;
  offsets[0] = 0;
  for (; i + W <= n; i += W) {
    const Keys before = *reinterpret_cast<const Keys*>(keys + i - 1), now = *reinterpret_cast<const Keys*>(keys + i);
    if (lane_bits(now < before)) return -1;
    groups += put(places + i, lane_bits(now != before), offsets + groups);
  }
  for (; i < n; ++i) {
    if (keys[i] < keys[i - 1]) return -1;
    offsets[groups] = i;
    groups += keys[i] != keys[i - 1];
  }
  offsets[groups] = n;
  return groups;
}

}  // namespace gradops::GRADOPS_ISA
