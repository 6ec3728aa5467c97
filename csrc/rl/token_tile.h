// token_tile.h: sequences cut into tiles of tokens that stay in the L1 cache, and sums whose order depends on the place
// in the sequence only: masked tokens and what fills a tile up add zero, so a packed and a padded batch get the
// same bits. For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include <cstdint>

#include "common/simd.h"

namespace gradops {
namespace {

constexpr int kTile = 256, kStep = 16;  // a tile is filled up to a multiple of kStep

// Calls f(start, tokens, tokens filled up) for the tiles of a sequence.
template <class F>
[[gnu::always_inline]] inline void each_tile(int64_t length, const F& f) {
  for (int64_t at = 0; at < length; at += kTile) {
    const int n = int(length - at < kTile ? length - at : kTile);
    f(at, n, (n + kStep - 1) / kStep * kStep);
  }
}

// to[i] = f(i) for the tokens of a tile, and zero where one is masked (mask may be null) and behind the last.
template <class C, class F>
[[gnu::always_inline]] inline void gather(C* to, const uint8_t* mask, int n, const F& f) {
  if (mask) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const C x = f(i);
      to[i] = mask[i] ? x : C(0);
    }
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = f(i);
  }
  for (int i = n; i % kStep; ++i) to[i] = C(0);
}

// The sum of n numbers, n a multiple of kStep.
template <class C>
double tile_sum(const C* x, int n) {
  constexpr int kDoubles = kLanes<double>;
  typedef C Narrow __attribute__((vector_size(kDoubles * sizeof(C)), may_alias, aligned(alignof(C))));
  Vec<double> a = {}, b = {};
  for (int i = 0; i < n; i += 2 * kDoubles) {
    a += __builtin_convertvector(*reinterpret_cast<const Narrow*>(x + i), Vec<double>);
    b += __builtin_convertvector(*reinterpret_cast<const Narrow*>(x + i + kDoubles), Vec<double>);
  }
  a += b;
  double s = 0;
  for (int i = 0; i < kDoubles; ++i) s += a[i];
  return s;
}

// How many of a sequence's tokens are not masked.
inline int64_t count_tokens(const uint8_t* mask, int64_t length) {
  if (!mask) return length;
  int64_t n = 0;
#pragma omp simd reduction(+ : n)
  for (int64_t i = 0; i < length; ++i) n += mask[i] != 0;
  return n;
}

}  // namespace
}  // namespace gradops
