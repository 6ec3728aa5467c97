// Products of bf16 with sums in float, in blocks of 32 x 32 (common/bf16_blocks.h), for bf16 input, and
// for f32 and f16 input and differences as the sum of two bf16.
//
// X is packed in V form (the right operand), straight from its rows, a chunk of tokens at a time; h is
// visited once per chunk. The left operand, R form of X^T, is made from it for a group of kGroup blocks
// of features, in the scratch memory of the thread, and stays in L2 while right panels pass by. What
// becomes of a finished block's sums runs during the products of the next one.
#include "quant/hessian_update.h"

#include "common/bf16_multiply.h"
#include "common/element.h"
#include "quant/hessian_mirror.h"

namespace gradops {
namespace {

constexpr long kGroup = 2 * kPanelsBeyondL2;  // panels of 64 KB or 128 KB
inline long least(long a, long b) { return a < b ? a : b; }

// L and R: parts of the left and of the right operand. A is the type of h.
template <int L, int R, class A>
struct Layout {
  static constexpr bool kAlike = L == R;
  static constexpr long kChunk = 2048 / L;  // tokens
  // Blocks along the tokens that are summed in float, before they are added to the slices before.
  static constexpr long kSlice = sizeof(A) == 8 ? 8 : 32;
  long first, tokens, S, P;  // of the chunk: its tokens; blocks along features and along tokens
  char *right, *left;        // V form: panel i, block p
  Layout(const ProductTask& t, char* workspace, long chunk)
      : first(chunk * kChunk),
        tokens(least(t.tokens - first, kChunk)),
        S((t.n + 31) / 32),
        P((tokens + 31) / 32),
        right(workspace),
        left(t.symmetric() ? right : right + S * P * R * kPart) {}
  long bytes() const { return (left - right) + S * P * L * kPart; }
  char* right_at(long i) const { return right + i * P * R * kPart; }
  char* left_at(long i, long p) const { return left + (i * P + p) * L * kPart; }
};

template <class A>
struct Scratch {
  float* sums[2];
  A* total;
  char* panels;
  explicit Scratch(char* memory) {
    sums[0] = reinterpret_cast<float*>(memory), sums[1] = sums[0] + 32 * 32;
    total = reinterpret_cast<A*>(sums[1] + 32 * 32);
    panels = reinterpret_cast<char*>(total + 32 * 32);
  }
};

// --- packing -------------------------------------------------------------------------------------

inline uint32_t first_bits(long count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// 32 features of a row, the even and the odd ones; those at and after `count` are zero.
template <Element E>
inline void load_row32(const char* p, long count, __m512& even, __m512& odd) {
  const uint32_t m = first_bits(count);
  if constexpr (E == Element::bf16) {
    const __m512i r = _mm512_maskz_loadu_epi16(m, p);
    even = even_float(r), odd = odd_float(r);
  } else {
    __m512 low, high;
    if constexpr (E == Element::f16) {
      low = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(m), p));
      high = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(m >> 16), p + 32));
    } else {
      low = _mm512_maskz_loadu_ps(__mmask16(m), p);
      high = _mm512_maskz_loadu_ps(__mmask16(m >> 16), p + 64);
    }
    const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    even = _mm512_permutex2var_ps(low, evens, high);
    odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), high);
  }
}

template <int N, Element E>
inline Row<N> pack_row(const char* x, const char* minus, long count) {
  if constexpr (N == 1 && E == Element::bf16) {
    Row<N> r;
    r.part[0] = _mm512_maskz_loadu_epi16(first_bits(count), x);
    return r;
  }
  __m512 even, odd, e, o;
  load_row32<E>(x, count, even, odd);
  if (minus) {
    load_row32<E>(minus, count, e, o);
    even = _mm512_sub_ps(even, e), odd = _mm512_sub_ps(odd, o);
  }
  return to_row<N>(even, odd);
}

// Blocks `begin` to `end` along the tokens, of every panel: V form of x - minus.
template <int N, Element E>
void pack(const ProductTask& t, long first, long tokens, const char* x, const char* minus, char* v, long P, long begin,
          long end) {
  const long size = element_size(E);
  for (long p = begin; p < end; ++p) {
    const long rows = least(tokens - 32 * p, 32);
    long offset[32];
    for (long k = 0; k < rows; ++k) offset[k] = t.row(first + 32 * p + k) * t.n * size;
    for (long f = 0; f < t.n; f += 32)
      for (long pair = 0; pair < kPairs; ++pair) {
        const auto row = [=, &offset](long k) GRADOPS_INLINE {
          if (k >= rows) return to_row<N>(_mm512_setzero_ps(), _mm512_setzero_ps());
          const long at = offset[k] + f * size;
          _mm_prefetch(x + at + 512, _MM_HINT_T1);  // a line of every row at a time
          return pack_row<N, E>(x + at, minus ? minus + at : nullptr, t.n - f);
        };
        rows_to_vnni<N>(row(2 * pair), row(2 * pair + 1), v + (f / 32 * P + p) * N * kPart, pair);
      }
  }
}

// --- multiplication ------------------------------------------------------------------------------

// 32 sums of a row, in order.
inline void in_order(const float* row, __m512& low, __m512& high) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  const __m512 even = _mm512_load_ps(row), odd = _mm512_load_ps(row + 16);
  low = _mm512_permutex2var_ps(even, first, odd), high = _mm512_permutex2var_ps(even, second, odd);
}

// 16 numbers as A.
template <class A>
struct Sixteen;
template <>
struct Sixteen<float> {
  __m512 v;
  GRADOPS_INLINE explicit Sixteen(__m512 x) : v(x) {}
  GRADOPS_INLINE void add(const float* p) { v = _mm512_add_ps(v, _mm512_load_ps(p)); }
  GRADOPS_INLINE void put(float* p) const { _mm512_store_ps(p, v); }
  GRADOPS_INLINE void blend(float* to, __mmask16 m, float beta, float scale) const {
    const __m512 old = _mm512_mul_ps(_mm512_set1_ps(beta), _mm512_maskz_loadu_ps(m, to));
    _mm512_mask_storeu_ps(to, m, _mm512_fmadd_ps(_mm512_set1_ps(scale), v, old));
  }
};
template <>
struct Sixteen<double> {
  __m512d v[2];
  GRADOPS_INLINE explicit Sixteen(__m512 x)
      : v{_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))} {}
  GRADOPS_INLINE void add(const double* p) {
    for (int k = 0; k < 2; ++k) v[k] = _mm512_add_pd(v[k], _mm512_load_pd(p + 8 * k));
  }
  GRADOPS_INLINE void put(double* p) const {
    for (int k = 0; k < 2; ++k) _mm512_store_pd(p + 8 * k, v[k]);
  }
  GRADOPS_INLINE void blend(double* to, __mmask16 m, double beta, double scale) const {
    for (int k = 0; k < 2; ++k) {
      const __mmask8 part = __mmask8(m >> 8 * k);
      const __m512d old = _mm512_mul_pd(_mm512_set1_pd(beta), _mm512_maskz_loadu_pd(part, to + 8 * k));
      _mm512_mask_storeu_pd(to + 8 * k, part, _mm512_fmadd_pd(_mm512_set1_pd(scale), v[k], old));
    }
  }
};

// What becomes of the sums of a slice of a block: added to those of the slices before, and after the
// last of them to h. Unit u: rows 2 u and 2 u + 1; at the end, the quarters of the mirror image.
template <class A>
struct Finish {
  static constexpr long kUnits = kPairs + 4;
  const float* sums;
  A* total;  // 32 x 32, in order
  bool first, last, mirror;
  A* h;
  long n, i, j;
  A beta, scale;
  GRADOPS_INLINE inline void operator()(long u) const {
    if (u >= kPairs) {
      const long row = 32 * i + 16 * (u - kPairs >> 1), col = 32 * j + 16 * (u & 1);
      if (last && mirror) mirror_block(h, n, row, least(row + 16, n), col, least(col + 16, n));
      return;
    }
    const long rows = n - 32 * i, cols = n - 32 * j;
    for (long r = 2 * u; r < 2 * u + 2; ++r) {
      __m512 low, high;
      in_order(sums + 32 * r, low, high);
      Sixteen<A> v(low), w(high);
      if (!first) v.add(total + 32 * r), w.add(total + 32 * r + 16);
      if (!last) {
        v.put(total + 32 * r), w.put(total + 32 * r + 16);
      } else if (r < rows) {
        const uint32_t m = first_bits(cols);
        A* const to = h + (32 * i + r) * n + 32 * j;
        v.blend(to, __mmask16(m), beta, scale);
        if (cols > 16) w.blend(to + 16, __mmask16(m >> 16), beta, scale);
      }
    }
  }
};

// Rows 2 u and 2 u + 1 of block (i, j) on their way to L2: they are far apart, so the processor does not see them
// coming.
template <class A>
GRADOPS_INLINE inline void fetch_rows(const A* h, long n, long i, long j, long u) {
  const char* const at = reinterpret_cast<const char*>(h + (32 * i + 2 * u) * n + 32 * j);
  for (long b = 0; b < 32 * long(sizeof(A)); b += 64)
    _mm_prefetch(at + b, _MM_HINT_T1), _mm_prefetch(at + n * long(sizeof(A)) + b, _MM_HINT_T1);
}

// f(i, j), row panel and column panel, for units begin to end: groups of kGroup row panels; below and
// on the diagonal only if `lower`.
template <class F>
inline void each_block(long S, bool lower, long begin, long end, F f) {
  long unit = 0;
  for (long i0 = 0; i0 < S; i0 += kGroup) {
    const long i1 = least(i0 + kGroup, S);
    for (long j = 0; j < (lower ? i1 : S); ++j)
      for (long i = lower && j > i0 ? j : i0; i < i1; ++i, ++unit)
        if (unit >= begin && unit < end) f(i, j);
  }
}

template <int L, int R, class A>
void multiply_blocks(const ProductTask& t, const Layout<L, R, A>& c, char* memory, A beta, A scale, long begin,
                     long end) {
  const Scratch<A> s(memory);
  const long panel = c.P * L * kPart, plane = c.P * kPart;
  const bool mirror = t.symmetric() && c.first + c.tokens == t.tokens;
  A* const h = reinterpret_cast<A*>(t.h);
  Finish<A> before{};  // runs during the next slice's products
  long units = 0, now = 0, group = -1;
  unsigned ready = 0;  // which panels of the group
  each_block(c.S, t.symmetric(), begin, end, [&](long i, long j) GRADOPS_INLINE {
    if (i / kGroup != group) group = i / kGroup, ready = 0;
    char* const left = s.panels + i % kGroup * panel;
    // Where both operands have L parts, part beside part; else each part in a plane of its own.
    const auto left_at = [=](long p, long part) GRADOPS_INLINE {
      return left + (c.kAlike ? (p * L + part) * kPart : part * plane + p * kPart);
    };
    if (!(ready >> i % kGroup & 1)) {
      ready |= 1u << i % kGroup;
      for (long p = 0; p < c.P; ++p)
        for (long part = 0; part < L; ++part)
          for (long u = 0; u < kQuarters<1>; ++u)
            vnni_to_rows_of_transpose(c.left_at(i, p) + part * kPart, left_at(p, part), u);
    }
    const long steps = (c.P + c.kSlice - 1) / c.kSlice, slices = c.kAlike ? steps : L * steps;
    for (long k = 0; k < slices; ++k) {
      const long part = k / steps, p = k % steps * c.kSlice;
      const long fetched = kPairs * k / slices, fetch = kPairs * (k + 1) / slices - fetched;
      const auto work = [=](long u) GRADOPS_INLINE {
        if (u < units) return before(u);
        fetch_rows(h, t.n, i, j, fetched + u - units);
        if (mirror) fetch_rows(h, t.n, j, i, fetched + u - units);
      };
      multiply<R>(left_at(p, part), c.right_at(j) + p * R * kPart, least(c.kSlice, c.P - p), s.sums[now], units + fetch,
                  work);
      before = {s.sums[now], s.total, k == 0, k + 1 == slices, mirror, h, t.n, i, j, beta, scale};
      units = before.kUnits, now = 1 - now;
    }
  });
  for (long u = 0; u < units; ++u) before(u);
}

// Phases: pack and multiply per chunk.
template <int L, int R, Element E, class A>
struct Engine {
  using Chunk = Layout<L, R, A>;
  static long chunks(const ProductTask& t) { return (t.tokens + Chunk::kChunk - 1) / Chunk::kChunk; }
  static int phases(const ProductTask& t) { return int(2 * chunks(t)); }
  static int64_t workspace_bytes(const ProductTask& t) { return Chunk(t, nullptr, 0).bytes(); }
  static int64_t scratch_bytes(const ProductTask& t) {
    return Scratch<A>(nullptr).panels - (char*)nullptr + kGroup * Chunk(t, nullptr, 0).P * L * kPart;
  }
  static int64_t units(const ProductTask& t, int phase) {
    const Chunk c(t, nullptr, phase / 2);
    return phase % 2 == 0 ? c.P : t.symmetric() ? c.S * (c.S + 1) / 2 : c.S * c.S;
  }
  static void run(const ProductTask& t, char* workspace, char* scratch, int phase, int64_t begin, int64_t end) {
    const Chunk c(t, workspace, phase / 2);
    flushing_denormals([&] {
      if (phase % 2 == 0) {
        pack<R, E>(t, c.first, c.tokens, t.symmetric() ? t.x : t.x_q, nullptr, c.right, c.P, begin, end);
        if (!t.symmetric()) pack<L, E>(t, c.first, c.tokens, t.x, t.x_q, c.left, c.P, begin, end);
      } else {
        tile_configure();
        multiply_blocks(t, c, scratch, phase == 1 ? A(t.beta) : A(1), A(t.scale), begin, end);
        tile_release();
      }
    });
  }
  static constexpr ProductEngine engine{workspace_bytes, scratch_bytes, phases, units, run};
};

template <class A>
const ProductEngine& pick(Element element, bool symmetric) {
  if (element == Element::f32) return Engine<2, 2, Element::f32, A>::engine;
  if (element == Element::f16) return Engine<2, 2, Element::f16, A>::engine;
  if (symmetric) return Engine<1, 1, Element::bf16, A>::engine;
  return Engine<2, 1, Element::bf16, A>::engine;
}

}  // namespace

const ProductEngine& GRADOPS_ISA::hessian_update_bf16(Element element, Element h_element, bool symmetric) {
  return h_element == Element::f64 ? pick<double>(element, symmetric) : pick<float>(element, symmetric);
}

}  // namespace gradops
