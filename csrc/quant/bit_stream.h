// bit_stream.h: 32 codes, a byte each, to and from a run of 32 * b bits; see gptq_pack.h. Everything is local to the
// includer: CPU kernels and CUDA kernels share the lines.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace gradops {
namespace {

// The lowest `keep` bits of every `field` bits.
GRADOPS_SHARED constexpr uint64_t low_bits(int keep, int field) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += field) mask |= ((uint64_t(1) << keep) - 1) << at;
  return mask;
}

// Eight codes in eight bytes <-> 8 * b bits: halves, quarters and eighths move together, or apart.
template <int b>
GRADOPS_SHARED uint64_t squeeze(uint64_t x) {
  if constexpr (b == 8) return x;
  constexpr uint64_t kOne = low_bits(b % 8, 8), kTwo = low_bits(2 * b % 16, 16), kFour = low_bits(4 * b % 32, 32);
  x &= kOne;
  x = (x | x >> (8 - b)) & kTwo;
  x = (x | x >> (16 - 2 * b)) & kFour;
  return (x | x >> (32 - 4 * b)) & low_bits(8 * b % 64, 64);
}
template <int b>
GRADOPS_SHARED uint64_t spread_out(uint64_t x) {  // of x, the lowest 8 * b bits
  if constexpr (b == 8) return x;
  constexpr uint64_t kOne = low_bits(b % 8, 8), kTwo = low_bits(2 * b % 16, 16), kFour = low_bits(4 * b % 32, 32);
  x &= low_bits(8 * b % 64, 64);
  x = (x | x << (32 - 4 * b)) & kFour;
  x = (x | x << (16 - 2 * b)) & kTwo;
  return (x | x << (8 - b)) & kOne;
}

GRADOPS_SHARED uint64_t load_codes(const uint8_t* p, int64_t left) {  // of eight, those that exist
  uint64_t x = 0;
  for (int i = 0; i < 8 && i < left; ++i) x |= uint64_t(p[i]) << (8 * i);
  return x;
}

// 32 codes, of which `left` exist, to b words; and back.
template <int b>
GRADOPS_SHARED void pack_chunk(const uint8_t* codes, int64_t left, uint32_t* words) {
  for (int k = 0; k < b; ++k) words[k] = 0;
  for (int k = 0; k < 4; ++k) {
    const uint64_t x = squeeze<b>(load_codes(codes + 8 * k, left - 8 * k));
    const int at = 8 * b * k, word = at / 32, shift = at % 32;
    words[word] |= uint32_t(x << shift);
    if (shift + 8 * b > 32) words[word + 1] |= uint32_t(x >> (32 - shift));
  }
}
template <int b>
GRADOPS_SHARED void unpack_chunk(const uint32_t* words, int64_t left, uint8_t* codes) {
  for (int k = 0; k < 4; ++k) {
    const int at = 8 * b * k, word = at / 32, shift = at % 32;
    uint64_t x = words[word] >> shift;
    if (shift + 8 * b > 32) x |= uint64_t(words[word + 1]) << (32 - shift);
    x = spread_out<b>(x);
    for (int i = 0; i < 8 && 8 * k + i < left; ++i) codes[8 * k + i] = uint8_t(x >> (8 * i));
  }
}

// Calls f(int_constant) with bits as a constant.
template <int b>
struct Bits {
  static constexpr int value = b;
};
template <class F>
inline void with_bits(int bits, const F& f) {
  switch (bits) {
    case 2:
      return f(Bits<2>());
    case 3:
      return f(Bits<3>());
    case 4:
      return f(Bits<4>());
    default:
      return f(Bits<8>());
  }
}

}  // namespace
}  // namespace gradops
