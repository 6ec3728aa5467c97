// Products in float or double. Tokens are taken in chunks; a chunk is packed into panels
// (common/simd_gemm.h), which are at once the left and the right operand, and h is visited once per
// chunk. A unit of the multiplication is a square of kSide panels: its sums stay in L2.
#include "quant/hessian_update.h"

#include "common/simd_gemm.h"
#include "common/widen.h"
#include "quant/hessian_mirror.h"

namespace gradops {
namespace {

constexpr int64_t kChunk = 2048;   // tokens
constexpr int64_t kPackRows = 16;  // tokens packed by one unit
constexpr int64_t kSide = 8;       // panels
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Chunk {
  int64_t first, tokens, panels;
  T *right, *left;
  Chunk(const ProductTask& t, char* workspace, int64_t chunk)
      : first(chunk * kChunk),
        tokens(t.tokens - first < kChunk ? t.tokens - first : kChunk),
        panels(ceil_div(t.n, kPanel<T>)),
        right(reinterpret_cast<T*>(workspace)),
        left(t.symmetric() ? right : right + panels * tokens * kPanel<T>) {}
  int64_t at(int64_t panel, int64_t token) const { return (panel * tokens + token) * kPanel<T>; }
};

template <class T, class In>
void pack(const ProductTask& t, const Chunk<T>& c, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t k0 = begin * kPackRows; k0 < end * kPackRows && k0 < c.tokens; k0 += kPackRows) {
    const int64_t k1 = k0 + kPackRows < c.tokens ? k0 + kPackRows : c.tokens;
    for (int64_t p = 0; p < c.panels; ++p) {
      const int64_t count = t.n - p * P < P ? t.n - p * P : P;
      for (int64_t k = k0; k < k1; ++k) {
        const int64_t offset = t.row(c.first + k) * t.n + p * P;
        const In* x = reinterpret_cast<const In*>(t.symmetric() ? t.x : t.x_q) + offset;
        T* to = c.right + c.at(p, k);
        if (count == P) {
#pragma omp simd
          for (int64_t i = 0; i < P; ++i) to[i] = widen(x[i]);
        } else {
          for (int64_t i = 0; i < P; ++i) to[i] = i < count ? T(widen(x[i])) : T(0);
        }
        if (t.symmetric()) continue;
        const In* full = reinterpret_cast<const In*>(t.x) + offset;
        T* difference = c.left + c.at(p, k);
        if (count == P) {
#pragma omp simd
          for (int64_t i = 0; i < P; ++i) difference[i] = T(widen(full[i])) - T(widen(x[i]));
        } else {
          for (int64_t i = 0; i < P; ++i) difference[i] = i < count ? T(widen(full[i])) - T(widen(x[i])) : T(0);
        }
      }
    }
  }
}

// f(bi, bj) for squares begin to end: all, or those on and below the diagonal.
template <class F>
void each_square(int64_t side, bool lower, int64_t begin, int64_t end, const F& f) {
  int64_t unit = 0;
  for (int64_t bi = 0; bi < side; ++bi)
    for (int64_t bj = 0; bj < (lower ? bi + 1 : side); ++bj, ++unit)
      if (unit >= begin && unit < end) f(bi, bj);
}

// to += left^T right over `depth` tokens, a tile of kTileRows x kPanel.
template <class T, class A>
[[gnu::always_inline]] inline void add_tile(const T* left, const T* right, int64_t depth, bool fresh, A* to) {
  constexpr int P = kPanel<T>, R = kTileRows;
  if constexpr (sizeof(T) == sizeof(A)) {
    tile<T, Left::by_columns, R, kTileVectors>(left, 0, right, depth, T(fresh ? 0 : 1), fresh ? nullptr : to, T(1), to);
  } else {
    alignas(kVectorBytes) T sums[R * P];
    tile<T, Left::by_columns, R, kTileVectors>(left, 0, right, depth, T(0), nullptr, T(1), sums);
#pragma omp simd
    for (int i = 0; i < R * P; ++i) to[i] = (fresh ? A(0) : to[i]) + A(sums[i]);
  }
}

template <class T, class A>
void multiply(const ProductTask& t, const Chunk<T>& c, A* sums, A beta, A scale, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  A* const h = reinterpret_cast<A*>(t.h);
  each_square(ceil_div(c.panels, kSide), t.symmetric(), begin, end, [&](int64_t bi, int64_t bj) {
    const int64_t p0 = bi * kSide, p1 = p0 + kSide < c.panels ? p0 + kSide : c.panels;
    const int64_t q0 = bj * kSide, q1 = q0 + kSide < c.panels ? q0 + kSide : c.panels;
    const auto at = [=](int64_t p, int64_t q) { return sums + ((q - q0) * kSide + (p - p0)) * P * P; };
    for (int64_t k = 0; k < c.tokens; k += kDepth<T>) {
      const int64_t depth = c.tokens - k < kDepth<T> ? c.tokens - k : kDepth<T>;
      for (int64_t q = q0; q < q1; ++q)
        for (int64_t p = t.symmetric() && q > p0 ? q : p0; p < p1; ++p)
          for (int64_t r = 0; r < P; r += kTileRows)
            add_tile(c.left + c.at(p, k) + r, c.right + c.at(q, k), depth, k == 0, at(p, q) + r * P);
    }
    for (int64_t p = p0; p < p1; ++p)
      for (int64_t r = 0; r < P && p * P + r < t.n; ++r)
        for (int64_t q = q0; q < q1 && !(t.symmetric() && q > p); ++q) {
          const int64_t count = t.n - q * P < P ? t.n - q * P : P;
          A* to = h + (p * P + r) * t.n + q * P;
          const A* from = at(p, q) + r * P;
          if (count == P) {
#pragma omp simd
            for (int64_t i = 0; i < P; ++i) to[i] = beta * to[i] + scale * from[i];
          } else {
            for (int64_t i = 0; i < count; ++i) to[i] = beta * to[i] + scale * from[i];
          }
        }
    if (t.symmetric() && c.first + c.tokens == t.tokens)
      mirror_block(h, t.n, p0 * P, p1 * P < t.n ? p1 * P : t.n, q0 * P, q1 * P < t.n ? q1 * P : t.n);
  });
}

// Phases: pack and multiply per chunk.
int64_t chunks(const ProductTask& t) { return ceil_div(t.tokens, kChunk); }
int phases(const ProductTask& t) { return int(2 * chunks(t)); }

template <class T, class A>
struct Engine {
  static int64_t workspace_bytes(const ProductTask& t) {
    const int64_t tokens = t.tokens < kChunk ? t.tokens : kChunk;
    return (t.symmetric() ? 1 : 2) * ceil_div(t.n, kPanel<T>) * kPanel<T> * tokens * int64_t(sizeof(T));
  }
  static int64_t scratch_bytes(const ProductTask&) {
    return kSide * kPanel<T> * kSide * kPanel<T> * int64_t(sizeof(A));
  }
  static int64_t units(const ProductTask& t, int phase) {
    const Chunk<T> c(t, nullptr, phase / 2);
    if (phase % 2 == 0) return ceil_div(c.tokens, kPackRows);
    const int64_t side = ceil_div(c.panels, kSide);
    return t.symmetric() ? side * (side + 1) / 2 : side * side;
  }
  static void run(const ProductTask& t, char* workspace, char* scratch, int phase, int64_t begin, int64_t end) {
    const Chunk<T> c(t, workspace, phase / 2);
    if (phase % 2 == 0) {
      with_type(t.element, [&](auto type) {
        if constexpr (sizeof(type) <= sizeof(T)) pack<T, decltype(type)>(t, c, begin, end);
      });
    } else {
      flushing_denormals([&] {
        multiply(t, c, reinterpret_cast<A*>(scratch), phase == 1 ? A(t.beta) : A(1), A(t.scale), begin, end);
      });
    }
  }
  static constexpr ProductEngine engine{workspace_bytes, scratch_bytes, phases, units, run};
};

}  // namespace

const ProductEngine& GRADOPS_ISA::hessian_update_full(Element element, Element h_element) {
  if (element == Element::f64) return Engine<double, double>::engine;
  return h_element == Element::f64 ? Engine<float, double>::engine : Engine<float, float>::engine;
}

}  // namespace gradops
