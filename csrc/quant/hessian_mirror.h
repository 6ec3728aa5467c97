// hessian_mirror.h: copies what is below the diagonal of a row-major matrix above it.
// For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/simd.h"

namespace gradops {
namespace {

// Rows i to i1 and columns j to j1, so far as they are below the diagonal, to rows j and columns i.
template <class A>
inline void mirror_block(A* h, int64_t n, int64_t i, int64_t i1, int64_t j, int64_t j1) {
  constexpr int W = kLanes<A>;
  Vec<A> block[W];
  for (int64_t r = i; r < i1; r += W)
    for (int64_t c = j; c < j1; c += W) {
      if (r + W <= i1 && c + W <= j1 && r > c) {
        for (int k = 0; k < W; ++k) block[k] = load_anywhere(h + (r + k) * n + c);
        transpose<A>(block);
        for (int k = 0; k < W; ++k) store_anywhere(h + (c + k) * n + r, block[k]);
      } else {
        for (int64_t a = r; a < r + W && a < i1; ++a)
          for (int64_t b = c; b < c + W && b < j1 && b < a; ++b) h[b * n + a] = h[a * n + b];
      }
    }
}

}  // namespace
}  // namespace gradops
