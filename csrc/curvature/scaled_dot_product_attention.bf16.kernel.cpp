// Attention in blocks of 32 x 32 bf16 (common/bf16_blocks.h). Tiles of S, P and dS are transposed, 32 keys x 32
// queries: the numbers of each query (maximum, sum, lse, D) are then vectors, and no product needs a transpose of a
// tile:
//   S' = k q'    o' += v' P'    dP' = v g'    dv += P' g    dk += dS' q    dq' += k' dS'
// with R(P'), R(dS') as left operands and V(P'), V(dS') as right ones, straight from the sums.
#include <math.h>

#include "common/bf16_multiply.h"
#include "common/exp_log.h"
#include "common/simd.h"
#include "curvature/scaled_dot_product_attention_bf16.h"

namespace gradops {
namespace {

constexpr int64_t kSide = 32, kFloats = kSide * kSide;  // of a block of sums: 16 even and 16 odd queries for each key
constexpr int64_t kForwardQueries = 8, kForwardKeys = 8, kBackwardQueries = 4, kBackwardKeys = 8;  // blocks of a chunk
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t blocks_of(int64_t rows) { return ceil_div(rows, kSide); }
inline int64_t column_blocks(int64_t columns) { return most(blocks_of(columns), 1); }
inline uint32_t first_bits(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

// 2^x to 1e-7, and 1 for 0.
inline __m512 exp2_of(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 1);  // x - floor(x), 0 for infinities
  __m512 p = _mm512_set1_ps(0x1.e97508p-10f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.277852p-7f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c91ce6p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebdb56p-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e4bap-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1));
  return _mm512_scalef_ps(p, x);
}

// One number for each query of a block: the even ones and the odd ones.
struct Queries {
  __m512 even, odd;
};
inline Queries load_queries(const float* p) { return {_mm512_load_ps(p), _mm512_load_ps(p + 16)}; }
inline void store_queries(float* p, const Queries& x) { _mm512_store_ps(p, x.even), _mm512_store_ps(p + 16, x.odd); }
inline int64_t place(int64_t query) { return query / 2 + query % 2 * 16; }  // of a query in load_queries

// Takes pieces of memory, each aligned to a cache line.
struct Arena {
  char* at;
  char* bytes(int64_t n) { return at += n, at - n; }
  char* blocks(int64_t n) { return bytes(n * kPart); }
  float* floats(int64_t n) { return reinterpret_cast<float*>(bytes(4 * n)); }
};

// --- packing -------------------------------------------------------------------------------------
// R form of the block at `row` and `column` of rows x columns.
inline void pack_block(const HeadRows& x, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t column,
                       int64_t columns, char* out) {
  const char* from = static_cast<const char*>(x.data) + 2 * (b * x.b + h * x.h + row * x.r + column);
  const uint32_t mask = first_bits(columns - column);
  for (int64_t r = 0; r < kSide; ++r)
    store(out + 64 * r, row + r < rows ? _mm512_maskz_loadu_epi16(mask, from + 2 * r * x.r) : _mm512_setzero_si512());
}
inline void to_vnni(const char* r, char* v) {
  for (long u = 0; u < kPairs; ++u) rows_to_vnni<1>(r, v, u);
}
inline void to_vnni_of_transpose(const char* r, char* v) {
  for (long u = 0; u < kQuarters<1>; ++u) rows_to_vnni_of_transpose(r, v, u);
}
inline void to_rows_of_transpose(const char* v, char* r) {
  for (long u = 0; u < kQuarters<1>; ++u) vnni_to_rows_of_transpose(v, r, u);
}
// V form of the transpose of a block of sums times `scale`, as rows of `columns` numbers at `to`.
template <class Scale>
inline void write_transposed(const float* sums, const Scale& scale, char* spare, char* to, int64_t rows,
                             int64_t columns, int64_t row_bytes) {
  char* const v = spare + kPart;
  for (int64_t r = 0; r < kSide; r += 2, sums += 2 * kSide) {
    const Queries a = scale(load_queries(sums)), b = scale(load_queries(sums + kSide));
    store(v + 32 * r, round_to_bf16(a.even, b.even));
    store(v + 32 * r + kTile, round_to_bf16(a.odd, b.odd));
  }
  to_rows_of_transpose(v, spare);
  for (int64_t r = 0; r < rows; ++r)
    _mm512_mask_storeu_epi16(to + r * row_bytes, first_bits(columns), load(spare + 64 * r));
}

// --- masks ---------------------------------------------------------------------------------------
struct Place {  // of a tile
  int64_t b, h, query, key;
};

// The mask of a tile as numbers to add, V form of the transpose. spare: a block.
inline void pack_mask(const AttentionTask& t, const Place& p, char* spare, char* out) {
  const AttentionMask& m = t.mask;
  const int64_t size = m.boolean ? 1 : 2, keys = least(t.keys - p.key, kSide);
  const char* from = static_cast<const char*>(m.data) + size * (p.b * m.b + p.h * m.h + p.query * m.q + p.key * m.k);
  for (int64_t r = 0; r < kSide; ++r, from += size * m.q) {
    alignas(64) uint16_t gathered[kSide];
    const char* row = from;
    if (p.query + r >= t.queries) {
      store(spare + 64 * r, _mm512_setzero_si512());
      continue;
    }
    if (m.k != 1) {
      for (int64_t k = 0; k < keys; ++k)
        if (m.boolean)
          reinterpret_cast<char*>(gathered)[k] = row[k * m.k];
        else
          gathered[k] = reinterpret_cast<const uint16_t*>(row)[k * m.k];
      row = reinterpret_cast<const char*>(gathered);
    }
    if (m.boolean) {
      const __m256i seen = _mm256_maskz_loadu_epi8(first_bits(keys), row);
      store(spare + 64 * r, _mm512_maskz_set1_epi16(_mm256_testn_epi8_mask(seen, seen), short(0xFF80)));  // -infinity
    } else {
      store(spare + 64 * r, _mm512_maskz_loadu_epi16(first_bits(keys), row));
    }
  }
  to_vnni_of_transpose(spare, out);
}

// Of a tile of S, still without the scale: whatever hides keys is done now, and the scale with it. Returns the factor
// that is left to do. spare: two blocks.
inline float finish_scores(const AttentionTask& t, const Place& p, float scale, char* spare, float* s) {
  const bool edge = t.causal && p.key + kSide - 1 > p.query;
  if (!t.mask.data && !edge && p.key + kSide <= t.keys) return scale;
  char* const bias = spare + kPart;
  if (t.mask.data) pack_mask(t, p, spare, bias);
  const __m512 factor = _mm512_set1_ps(scale), log2e = _mm512_set1_ps(kLog2e), hidden = _mm512_set1_ps(-INFINITY);
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  for (int64_t r = 0; r < kSide; ++r, s += kSide) {
    Queries x = load_queries(s);
    x.even = _mm512_mul_ps(x.even, factor), x.odd = _mm512_mul_ps(x.odd, factor);
    if (t.mask.data) {
      const __m512i e = load(bias + 32 * (r & ~1)), o = load(bias + 32 * (r & ~1) + kTile);
      x.even = _mm512_fmadd_ps(r & 1 ? odd_float(e) : even_float(e), log2e, x.even);
      x.odd = _mm512_fmadd_ps(r & 1 ? odd_float(o) : even_float(o), log2e, x.odd);
    }
    if (edge) {
      const int64_t d = p.key + r - p.query;  // query j of the block sees this key if j >= d
      const int first = int(least(most(d, -1), kSide));
      x.even = _mm512_mask_mov_ps(x.even, _mm512_cmplt_epi32_mask(even, _mm512_set1_epi32(first)), hidden);
      x.odd = _mm512_mask_mov_ps(x.odd, _mm512_cmplt_epi32_mask(even, _mm512_set1_epi32(first - 1)), hidden);
    }
    if (p.key + r >= t.keys) x = {hidden, hidden};
    store_queries(s, x);
  }
  return 1;
}

// Blocks of keys that some query of the block sees.
inline int64_t seen_blocks(const AttentionTask& t, int64_t query) {
  return t.causal ? least(blocks_of(t.keys), query / kSide + 1) : blocks_of(t.keys);
}
inline float scale_of(const AttentionTask& t) { return float(t.scale * 1.44269504088896340736); }  // S in powers of 2

inline void product(const char* left, const char* right, int64_t n, float* out) {
  multiply<1>(left, right, n, out, 0, [](long) {});
}
// to = keep to + left right. spare: a block of sums.
inline void add_product(const char* left, const char* right, int64_t n, const Queries& keep, float* spare, float* to) {
  product(left, right, n, spare);
  for (int64_t i = 0; i < kFloats; i += kSide) {
    const Queries x = load_queries(to + i), y = load_queries(spare + i);
    store_queries(to + i, {_mm512_fmadd_ps(x.even, keep.even, y.even), _mm512_fmadd_ps(x.odd, keep.odd, y.odd)});
  }
}
inline void clear(float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) _mm512_store_ps(p + i, _mm512_setzero_ps());
}

// --- forward -------------------------------------------------------------------------------------
struct Forward {
  int64_t D, V;  // blocks along d and dv
  char *q, *k, *v, *p, *spare;
  float *s, *o, *sums, *top, *sum;
  int64_t size;
  Forward(const AttentionTask& t, char* scratch) : D(column_blocks(t.d)), V(column_blocks(t.dv)) {
    Arena a{scratch};
    q = a.blocks(kForwardQueries * D);  // V(q'), per query block
    k = a.blocks(kForwardKeys * D);     // R(k), per key block
    v = a.blocks(kForwardKeys * V);     // R(v'), per block of dv
    p = a.blocks(kForwardKeys);         // V(P')
    spare = a.blocks(2);
    s = a.floats(kForwardKeys * kFloats);         // S'
    o = a.floats(kForwardQueries * V * kFloats);  // o', per query block
    sums = a.floats(kFloats);
    top = a.floats(kForwardQueries * kSide), sum = a.floats(kForwardQueries * kSide);
    size = a.at - scratch;
  }
  static int64_t chunks(const AttentionTask& t) { return ceil_div(t.queries, kForwardQueries * kSide); }
  static int64_t units(const AttentionTask& t) { return t.batch * t.heads * chunks(t); }
  static int64_t scratch(const AttentionTask& t) { return Forward(t, nullptr).size; }

  // P' of a query block and the keys of the chunk, and its sums. Returns how much what was summed before shrinks.
  Queries softmax(const float* factor, int64_t keys, int64_t i) {
    const Queries before = load_queries(top + i * kSide);
    Queries m[2] = {before, before};
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t r = 0; r < kSide; ++r) {
        const float* x = s + j * kFloats + r * kSide;
        const __m512 f = _mm512_set1_ps(factor[j]);
        m[r & 1].even = _mm512_max_ps(m[r & 1].even, _mm512_mul_ps(f, _mm512_load_ps(x)));
        m[r & 1].odd = _mm512_max_ps(m[r & 1].odd, _mm512_mul_ps(f, _mm512_load_ps(x + 16)));
      }
    const Queries now{_mm512_max_ps(m[0].even, m[1].even), _mm512_max_ps(m[0].odd, m[1].odd)};
    const auto finite = [](__m512 x) GRADOPS_INLINE {  // of queries that have not seen a key, anything but -infinity
      return _mm512_max_ps(x, _mm512_set1_ps(-0x1p126f));
    };
    const Queries at{finite(now.even), finite(now.odd)};
    const Queries shrink{exp2_of(_mm512_sub_ps(before.even, at.even)), exp2_of(_mm512_sub_ps(before.odd, at.odd))};
    store_queries(top + i * kSide, now);
    Queries total = load_queries(sum + i * kSide);
    total.even = _mm512_mul_ps(total.even, shrink.even), total.odd = _mm512_mul_ps(total.odd, shrink.odd);
    for (int64_t j = 0; j < keys; ++j) {
      const __m512 f = _mm512_set1_ps(factor[j]);
      for (int64_t r = 0; r < kSide; r += 2) {
        const float* x = s + j * kFloats + r * kSide;
        const auto power = [=](const float* x, __m512 m)
                               GRADOPS_INLINE { return exp2_of(_mm512_fmsub_ps(f, _mm512_load_ps(x), m)); };
        const __m512 e0 = power(x, at.even), o0 = power(x + 16, at.odd);
        const __m512 e1 = power(x + 32, at.even), o1 = power(x + 48, at.odd);
        total.even = _mm512_add_ps(total.even, _mm512_add_ps(e0, e1));
        total.odd = _mm512_add_ps(total.odd, _mm512_add_ps(o0, o1));
        store(p + j * kPart + 32 * r, round_to_bf16(e0, e1));
        store(p + j * kPart + 32 * r + kTile, round_to_bf16(o0, o1));
      }
    }
    store_queries(sum + i * kSide, total);
    return shrink;
  }

  void write(const AttentionTask& t, int64_t head, int64_t query, int64_t i) {
    float *l = sum + i * kSide, *m = top + i * kSide;
    alignas(64) float inverse[kSide];
#pragma omp simd
    for (int64_t r = 0; r < kSide; ++r) {
      inverse[r] = l[r] == 0 ? 0 : 1 / l[r];
      m[r] = m[r] * kLn2 + log_of(l[r]);
    }
    const int64_t rows = least(t.queries - query, kSide), row = head * t.queries + query;
    for (int64_t r = 0; r < rows; ++r) static_cast<float*>(t.lse)[row + r] = m[place(r)];
    const Queries by = load_queries(inverse);
    const auto scale = [by](const Queries& x) GRADOPS_INLINE {
      return Queries{_mm512_mul_ps(x.even, by.even), _mm512_mul_ps(x.odd, by.odd)};
    };
    for (int64_t j = 0; j < V; ++j)
      write_transposed(o + (i * V + j) * kFloats, scale, spare, static_cast<char*>(t.o) + 2 * (row * t.dv + j * kSide),
                       rows, t.dv - j * kSide, 2 * t.dv);
  }

  void chunk(const AttentionTask& t, int64_t b, int64_t h, int64_t query) {
    const int64_t n = least(blocks_of(t.queries - query), kForwardQueries), hk = h / (t.heads / t.key_heads);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < D; ++j) {
        pack_block(t.q, b, h, query + i * kSide, t.queries, j * kSide, t.d, spare);
        to_vnni_of_transpose(spare, q + (i * D + j) * kPart);
      }
    clear(o, n * V * kFloats), clear(sum, n * kSide);
    for (int64_t i = 0; i < n * kSide; i += 16) _mm512_store_ps(top + i, _mm512_set1_ps(-INFINITY));
    const int64_t end = seen_blocks(t, query + (n - 1) * kSide);
    for (int64_t first = 0; first < end; first += kForwardKeys) {
      const int64_t keys = least(end - first, kForwardKeys);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t key = (first + j) * kSide;
        for (int64_t c = 0; c < D; ++c) pack_block(t.k, b, hk, key, t.keys, c * kSide, t.d, k + (j * D + c) * kPart);
        for (int64_t c = 0; c < V; ++c) {
          pack_block(t.v, b, hk, key, t.keys, c * kSide, t.dv, spare);
          transpose_block<1>(spare, spare + kPart, v + (c * kForwardKeys + j) * kPart);
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = query + i * kSide, seen = least(seen_blocks(t, at) - first, keys);
        if (seen <= 0) continue;
        float factor[kForwardKeys];
        for (int64_t j = 0; j < seen; ++j) {
          product(k + j * D * kPart, q + i * D * kPart, D, s + j * kFloats);
          factor[j] = finish_scores(t, {b, h, at, (first + j) * kSide}, scale_of(t), spare, s + j * kFloats);
        }
        const Queries shrink = softmax(factor, seen, i);
        for (int64_t c = 0; c < V; ++c)
          add_product(v + c * kForwardKeys * kPart, p, seen, shrink, sums, o + (i * V + c) * kFloats);
      }
    }
    for (int64_t i = 0; i < n; ++i) write(t, b * t.heads + h, query + i * kSide, i);
  }

  static void run(const AttentionTask& t, char*, char* scratch, int64_t begin, int64_t end) {
    flushing_denormals([&] {
      tile_configure();
      Forward f(t, scratch);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t head = unit / chunks(t), i = unit % chunks(t);
        const int64_t at = i & 1 ? chunks(t) - 1 - i / 2 : i / 2;  // long and short ones take turns
        f.chunk(t, head / t.heads, head % t.heads, at * kForwardQueries * kSide);
      }
      tile_release();
    });
  }
};

// --- backward ------------------------------------------------------------------------------------
// A unit is all the chunks of keys of one key head, or where there are few heads a part of them; such parts have sums
// of dq of their own in the workspace, added up afterwards.
struct Backward {
  int64_t D, V, B;  // blocks along d, dv and the queries
  char *k, *v, *kt, *q, *qt, *g, *gt, *p, *ds, *dst, *spare;
  float *s, *dp, *sums, *dk, *dv, *dq, *lse, *dots;
  int64_t size;
  Backward(const AttentionTask& t, char* scratch)
      : D(column_blocks(t.d)), V(column_blocks(t.dv)), B(blocks_of(t.queries)) {
    constexpr int64_t K = kBackwardKeys, Q = kBackwardQueries;
    Arena a{scratch};
    k = a.blocks(K * D), v = a.blocks(K * V);    // R(k), R(v), per key block
    kt = a.blocks(K * D);                        // R(k'), per block of d
    qt = a.blocks(Q * D), gt = a.blocks(Q * V);  // V(q'), V(g'), per query block
    q = a.blocks(Q * D), g = a.blocks(Q * V);    // V(q), V(g), per block of d or dv
    p = a.blocks(K * Q), ds = a.blocks(K * Q);   // R(P'), R(dS'), per key block
    dst = a.blocks(K * Q);                       // V(dS'), per query block
    spare = a.blocks(2);
    s = a.floats(kFloats), dp = a.floats(kFloats), sums = a.floats(kFloats);
    dk = a.floats(K * D * kFloats), dv = a.floats(K * V * kFloats);
    dq = a.floats(parts(t) == 1 ? group(t) * head_floats(t) : 0);
    lse = a.floats(Q * kSide), dots = a.floats(Q * kSide);
    size = a.at - scratch;
  }
  static int64_t chunks(const AttentionTask& t) { return ceil_div(t.keys, kBackwardKeys * kSide); }
  static int64_t parts(const AttentionTask& t) {
    return most(least(chunks(t), ceil_div(8, most(t.batch * t.key_heads, 1))), 1);
  }
  static int64_t units(const AttentionTask& t) { return t.batch * t.key_heads * parts(t); }
  static int64_t scratch(const AttentionTask& t) { return Backward(t, nullptr).size; }
  static int64_t head_floats(const AttentionTask& t) {
    return t.dq ? blocks_of(t.queries) * column_blocks(t.d) * kFloats : 0;
  }
  static int64_t group(const AttentionTask& t) { return t.heads / most(t.key_heads, 1); }
  static int64_t workspace(const AttentionTask& t) {
    return parts(t) == 1 ? 0 : t.batch * t.heads * parts(t) * head_floats(t) * int64_t(sizeof(float)) + 64;
  }
  static float* part_of(const AttentionTask& t, char* workspace, int64_t head, int64_t part) {
    float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t(63));
    return aligned + (head * parts(t) + part) * head_floats(t);
  }

  void pack_queries(const AttentionTask& t, int64_t b, int64_t h, int64_t query, int64_t n) {
    constexpr int64_t Q = kBackwardQueries;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = query + i * kSide, rows = least(t.queries - at, kSide),
                    row = (b * t.heads + h) * t.queries + at;
      for (int64_t j = 0; j < D; ++j) {
        pack_block(t.q, b, h, at, t.queries, j * kSide, t.d, spare);
        to_vnni_of_transpose(spare, qt + (i * D + j) * kPart);
        to_vnni(spare, q + (j * Q + i) * kPart);
      }
      __m512 dot[kSide] = {};
      for (int64_t j = 0; j < V; ++j) {
        pack_block(t.g, b, h, at, t.queries, j * kSide, t.dv, spare);
        to_vnni_of_transpose(spare, gt + (i * V + j) * kPart);
        to_vnni(spare, g + (j * Q + i) * kPart);
        const char* o = static_cast<const char*>(t.o) + 2 * (row * t.dv + j * kSide);
        for (int64_t r = 0; r < rows; ++r) {
          const __m512i x = _mm512_maskz_loadu_epi16(first_bits(t.dv - j * kSide), o + 2 * r * t.dv);
          dot[r] = _mm512_dpbf16_ps(dot[r], (__m512bh)load(spare + 64 * r), (__m512bh)x);
        }
      }
      for (int64_t r = 0; r < kSide; ++r) {  // queries that see nothing, or are not there: P = 0
        const float l = r < rows ? static_cast<const float*>(t.lse)[row + r] * kLog2e : -INFINITY;
        lse[i * kSide + place(r)] = l == -INFINITY ? INFINITY : l;
        dots[i * kSide + place(r)] = _mm512_reduce_add_ps(dot[r]);
      }
    }
  }

  // P' and dS' of key block j and query block i of the chunks.
  void tile(const AttentionTask& t, const Place& at, int64_t j, int64_t i) {
    product(k + j * D * kPart, qt + i * D * kPart, D, s);
    product(v + j * V * kPart, gt + i * V * kPart, V, dp);
    const __m512 f = _mm512_set1_ps(finish_scores(t, at, scale_of(t), spare, s));
    const Queries l = load_queries(lse + i * kSide), d = load_queries(dots + i * kSide);
    char *const to_p = p + (j * kBackwardQueries + i) * kPart, *const to_ds = ds + (j * kBackwardQueries + i) * kPart;
    char* const to_dst = dst + (i * kBackwardKeys + j) * kPart;
    const auto row = [=, this](int64_t r) GRADOPS_INLINE {
      const Queries x = load_queries(s + r * kSide), y = load_queries(dp + r * kSide);
      const __m512 e = exp2_of(_mm512_fmsub_ps(f, x.even, l.even)), o = exp2_of(_mm512_fmsub_ps(f, x.odd, l.odd));
      store(to_p + 64 * r, round_to_bf16(e, o));
      const Row<1> change{{round_to_bf16(_mm512_mul_ps(e, _mm512_sub_ps(y.even, d.even)),
                                         _mm512_mul_ps(o, _mm512_sub_ps(y.odd, d.odd)))}};
      store_row(to_ds + 64 * r, change);
      return change;
    };
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const Row<1> r0 = row(2 * pair), r1 = row(2 * pair + 1);
      rows_to_vnni<1>(r0, r1, to_dst, pair);
    }
  }

  // All queries of a head against the keys of the chunk.
  void head(const AttentionTask& t, int64_t b, int64_t h, int64_t key, int64_t keys, float* dq) {
    constexpr int64_t K = kBackwardKeys, Q = kBackwardQueries;
    const Queries keep{_mm512_set1_ps(1), _mm512_set1_ps(1)};
    const int64_t start = t.causal ? key / kSide : 0;  // of the query blocks that see a key of the chunk
    for (int64_t first = start; first < B; first += Q) {
      const int64_t n = least(B - first, Q);
      pack_queries(t, b, h, first * kSide, n);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t i0 = t.causal ? most(key / kSide + j - first, 0) : 0;
        if (i0 >= n) continue;
        for (int64_t i = i0; i < n; ++i) tile(t, {b, h, (first + i) * kSide, key + j * kSide}, j, i);
        for (int64_t c = 0; t.dv_ && c < V; ++c)
          add_product(p + (j * Q + i0) * kPart, g + (c * Q + i0) * kPart, n - i0, keep, sums,
                      dv + (j * V + c) * kFloats);
        for (int64_t c = 0; t.dk && c < D; ++c)
          add_product(ds + (j * Q + i0) * kPart, q + (c * Q + i0) * kPart, n - i0, keep, sums,
                      dk + (j * D + c) * kFloats);
      }
      for (int64_t i = 0; t.dq && i < n; ++i) {
        const int64_t seen = least(seen_blocks(t, (first + i) * kSide) - key / kSide, keys);
        for (int64_t c = 0; c < D; ++c)
          add_product(kt + c * K * kPart, dst + i * K * kPart, seen, keep, sums, dq + ((first + i) * D + c) * kFloats);
      }
    }
  }

  void write(void* to, const float* from, int64_t n, float scale, int64_t row, int64_t rows, int64_t columns) {
    const __m512 by = _mm512_set1_ps(scale);
    char* const out = static_cast<char*>(to) + 2 * row * columns;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) {
        const Queries x = load_queries(from + (r / kSide * n + c) * kFloats + r % kSide * kSide);
        _mm512_mask_storeu_epi16(out + 2 * (r * columns + c * kSide), first_bits(columns - c * kSide),
                                 round_to_bf16(_mm512_mul_ps(x.even, by), _mm512_mul_ps(x.odd, by)));
      }
  }

  void part(const AttentionTask& t, char* workspace, int64_t b, int64_t hk, int64_t part) {
    const int64_t first = hk * group(t), head_of_all = b * t.heads + first;
    const auto sums_of = [=, &t, this](int64_t i) {
      return parts(t) == 1 ? dq + i * head_floats(t) : part_of(t, workspace, head_of_all + i, part);
    };
    for (int64_t i = 0; i < group(t); ++i) clear(sums_of(i), head_floats(t));
    for (int64_t chunk = 0; chunk < chunks(t); ++chunk) {
      const int64_t turn = chunk % (2 * parts(t));  // forth and back: with `causal` later ones are shorter
      if ((turn < parts(t) ? turn : 2 * parts(t) - 1 - turn) != part) continue;
      const int64_t key = chunk * kBackwardKeys * kSide, keys = least(blocks_of(t.keys - key), kBackwardKeys);
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t c = 0; c < D; ++c) {
          char* const rows = k + (j * D + c) * kPart;
          pack_block(t.k, b, hk, key + j * kSide, t.keys, c * kSide, t.d, rows);
          transpose_block<1>(rows, spare, kt + (c * kBackwardKeys + j) * kPart);
        }
        for (int64_t c = 0; c < V; ++c)
          pack_block(t.v, b, hk, key + j * kSide, t.keys, c * kSide, t.dv, v + (j * V + c) * kPart);
      }
      clear(dk, keys * D * kFloats), clear(dv, keys * V * kFloats);
      for (int64_t i = 0; i < group(t); ++i) head(t, b, first + i, key, keys, sums_of(i));
      const int64_t row = (b * t.key_heads + hk) * t.keys + key, rows = least(t.keys - key, keys * kSide);
      if (t.dk) write(t.dk, dk, D, float(t.scale), row, rows, t.d);
      if (t.dv_) write(t.dv_, dv, V, 1, row, rows, t.dv);
    }
    if (t.dq && parts(t) == 1)
      for (int64_t i = 0; i < group(t); ++i) write_dq(t, head_of_all + i, sums_of(i), spare);
  }

  static void run(const AttentionTask& t, char* workspace, char* scratch, int64_t begin, int64_t end) {
    flushing_denormals([&] {
      tile_configure();
      Backward f(t, scratch);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t head = unit / parts(t);
        f.part(t, workspace, head / t.key_heads, head % t.key_heads, unit % parts(t));
      }
      tile_release();
    });
  }

  static void write_dq(const AttentionTask& t, int64_t head, const float* sums, char* spare) {
    const int64_t D = column_blocks(t.d);
    const __m512 by = _mm512_set1_ps(float(t.scale));
    const auto scale = [by](const Queries& x) GRADOPS_INLINE {
      return Queries{_mm512_mul_ps(x.even, by), _mm512_mul_ps(x.odd, by)};
    };
    for (int64_t query = 0; query < t.queries; query += kSide)
      for (int64_t j = 0; j < D; ++j)
        write_transposed(sums + (query / kSide * D + j) * kFloats, scale, spare,
                         static_cast<char*>(t.dq) + 2 * ((head * t.queries + query) * t.d + j * kSide),
                         least(t.queries - query, kSide), t.d - j * kSide, 2 * t.d);
  }

  // Heads whose parts are to be added up.
  static int64_t finish_units(const AttentionTask& t) { return t.dq && parts(t) > 1 ? t.batch * t.heads : 0; }
  static int64_t finish_scratch(const AttentionTask&) { return 2 * kPart; }
  static void finish(const AttentionTask& t, char* workspace, char* scratch, int64_t begin, int64_t end) {
    flushing_denormals([&] {
      for (int64_t head = begin; head < end; ++head) {
        float* const sum = part_of(t, workspace, head, 0);
        for (int64_t part = 1; part < parts(t); ++part) {
          const float* const more = part_of(t, workspace, head, part);
          for (int64_t i = 0; i < head_floats(t); i += 16)
            _mm512_store_ps(sum + i, _mm512_add_ps(_mm512_load_ps(sum + i), _mm512_load_ps(more + i)));
        }
        write_dq(t, head, sum, scratch);
      }
    });
  }
};

constexpr AttentionEngine engine{{Forward::units, Forward::scratch, Forward::run},
                                 {Backward::units, Backward::scratch, Backward::run},
                                 {Backward::finish_units, Backward::finish_scratch, Backward::finish},
                                 Backward::workspace};

}  // namespace

const AttentionEngine& GRADOPS_ISA::attention_bf16() { return engine; }

}  // namespace gradops
