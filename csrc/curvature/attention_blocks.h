// attention_blocks.h: tiles of attention as blocks of 32 x 32 bf16 (common/bf16_blocks.h).
//
// Tiles of S, P and dS are transposed, 32 keys x 32 queries: the numbers of each query (maximum, sum, lse, D) are then
// vectors, and no product needs a transpose of a tile:
//   S' = k q'    o' += v' P'    dP' = v g'    dv += P' g    dk += dS' q    dq' += k' dS'
// with R(P'), R(dS') as left operands and V(P'), V(dS') as right ones, straight from the sums.
// For *.bf16.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include <math.h>

#include "common/bf16_multiply.h"
#include "common/simd.h"
#include "curvature/attention_bf16.h"

namespace gradops {
namespace {

constexpr int64_t kSide = 32, kFloats = kSide * kSide;  // of a block of sums: 16 even and 16 odd queries for each key
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

}  // namespace
}  // namespace gradops
