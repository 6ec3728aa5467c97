// The gradient of attention of bf16, in blocks: see attention_blocks.h.
#include "curvature/attention_blocks.h"

namespace gradops {
namespace {

constexpr int64_t kQueries = 4, kKeys = 8;  // blocks of a chunk

// The chunks of keys are dealt out to two parts with sums of dq of their own, added up afterwards. A unit is one part
// of one key head, its sums in the workspace; or if there are key heads enough to keep threads busy, both parts, its
// sums in the thread's scratch: no memory that is fresh in every call. The bits are the same.
constexpr int64_t kParts = 2, kManyHeads = 16;

struct Backward {
  int64_t D, V, B;  // blocks along d, dv and the queries
  char *k, *v, *kt, *q, *qt, *g, *gt, *p, *ds, *dst, *spare;
  float *s, *dp, *sums, *dk, *dv, *dq, *more, *lse, *dots;
  int64_t size;
  Backward(const AttentionTask& t, char* scratch)
      : D(column_blocks(t.d)), V(column_blocks(t.dv)), B(blocks_of(t.queries)) {
    constexpr int64_t K = kKeys, Q = kQueries;
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
    dq = a.floats(joined(t) ? group(t) * head_floats(t) : 0);  // of all the heads that read the key head
    more = a.floats(joined(t) && parts(t) > 1 ? group(t) * head_floats(t) : 0);  // of parts but the first
    lse = a.floats(Q * kSide), dots = a.floats(Q * kSide);
    size = a.at - scratch;
  }
  static int64_t chunks(const AttentionTask& t) { return ceil_div(t.keys, kKeys * kSide); }
  static int64_t parts(const AttentionTask& t) { return most(least(chunks(t), kParts), 1); }
  static bool joined(const AttentionTask& t) { return t.batch * t.key_heads >= kManyHeads; }
  static int64_t units(const AttentionTask& t) { return t.batch * t.key_heads * (joined(t) ? 1 : parts(t)); }
  static int64_t scratch(const AttentionTask& t) { return Backward(t, nullptr).size; }
  static int64_t group(const AttentionTask& t) { return t.heads / most(t.key_heads, 1); }
  static int64_t head_floats(const AttentionTask& t) {
    return t.dq ? blocks_of(t.queries) * column_blocks(t.d) * kFloats : 0;
  }
  static int64_t workspace(const AttentionTask& t) {
    return joined(t) ? 0 : parts(t) * t.batch * t.heads * head_floats(t) * int64_t(sizeof(float)) + 64;
  }
  static float* sums_of(const AttentionTask& t, char* workspace, int64_t head, int64_t part) {
    float* const aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t(63));
    return aligned + (part * t.batch * t.heads + head) * head_floats(t);
  }
  static void add(const float* x, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += 16)
      _mm512_store_ps(to + i, _mm512_add_ps(_mm512_load_ps(to + i), _mm512_load_ps(x + i)));
  }

  void pack_queries(const AttentionTask& t, int64_t b, int64_t h, int64_t query, int64_t n) {
    constexpr int64_t Q = kQueries;
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
    char *const to_p = p + (j * kQueries + i) * kPart, *const to_ds = ds + (j * kQueries + i) * kPart;
    char* const to_dst = dst + (i * kKeys + j) * kPart;
    // P is at most 1; of scores as large as 1e9 the rounding of lse could make it infinite.
    const auto power = [f](__m512 x, __m512 lse) GRADOPS_INLINE {
      return exp2_of(_mm512_min_ps(_mm512_setzero_ps(), _mm512_fmsub_ps(f, x, lse)));  // in this order NaN stays NaN
    };
    const auto row = [=, this](int64_t r) GRADOPS_INLINE {
      const Queries x = load_queries(s + r * kSide), y = load_queries(dp + r * kSide);
      const __m512 e = power(x.even, l.even), o = power(x.odd, l.odd);
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
    constexpr int64_t K = kKeys, Q = kQueries;
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

  // to: the sums of dq of the heads that read this one, one after the other.
  void part(const AttentionTask& t, int64_t b, int64_t hk, int64_t part, float* to) {
    clear(to, group(t) * head_floats(t));
    for (int64_t chunk = 0; chunk < chunks(t); ++chunk) {
      const int64_t turn = chunk % (2 * parts(t));  // forth and back: with `causal` later ones are shorter
      if ((turn < parts(t) ? turn : 2 * parts(t) - 1 - turn) != part) continue;
      const int64_t key = chunk * kKeys * kSide, keys = least(blocks_of(t.keys - key), kKeys);
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t c = 0; c < D; ++c) {
          char* const rows = k + (j * D + c) * kPart;
          pack_block(t.k, b, hk, key + j * kSide, t.keys, c * kSide, t.d, rows);
          transpose_block<1>(rows, spare, kt + (c * kKeys + j) * kPart);
        }
        for (int64_t c = 0; c < V; ++c)
          pack_block(t.v, b, hk, key + j * kSide, t.keys, c * kSide, t.dv, v + (j * V + c) * kPart);
      }
      clear(dk, keys * D * kFloats), clear(dv, keys * V * kFloats);
      for (int64_t i = 0; i < group(t); ++i) head(t, b, hk * group(t) + i, key, keys, to + i * head_floats(t));
      const int64_t row = (b * t.key_heads + hk) * t.keys + key, rows = least(t.keys - key, keys * kSide);
      if (t.dk) write(t.dk, dk, D, float(t.scale), row, rows, t.d);
      if (t.dv_) write(t.dv_, dv, V, 1, row, rows, t.dv);
    }
  }

  void all_parts(const AttentionTask& t, int64_t b, int64_t hk) {
    for (int64_t i = 0; i < parts(t); ++i) {
      part(t, b, hk, i, i ? more : dq);
      if (i) add(more, group(t) * head_floats(t), dq);
    }
    for (int64_t i = 0; t.dq && i < group(t); ++i)
      write_dq(t, b * t.heads + hk * group(t) + i, dq + i * head_floats(t), spare);
  }

  static void run(const AttentionTask& t, char* workspace, char* scratch, int64_t begin, int64_t end) {
    flushing_denormals([&] {
      tile_configure();
      Backward f(t, scratch);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t n = joined(t) ? 1 : parts(t), head = unit / n, b = head / t.key_heads, hk = head % t.key_heads;
        if (joined(t))
          f.all_parts(t, b, hk);
        else
          f.part(t, b, hk, unit % n, sums_of(t, workspace, b * t.heads + hk * group(t), unit % n));
      }
      tile_release();
    });
  }

  static void write_dq(const AttentionTask& t, int64_t head, const float* sums, char* spare) {
    const int64_t D = column_blocks(t.d);
    const __m512 by = _mm512_set1_ps(float(t.scale));
    const auto scale = [by](const Queries& x)
                           GRADOPS_INLINE { return Queries{_mm512_mul_ps(x.even, by), _mm512_mul_ps(x.odd, by)}; };
    for (int64_t query = 0; query < t.queries; query += kSide)
      for (int64_t j = 0; j < D; ++j)
        write_transposed(sums + (query / kSide * D + j) * kFloats, scale, spare,
                         static_cast<char*>(t.dq) + 2 * ((head * t.queries + query) * t.d + j * kSide),
                         least(t.queries - query, kSide), t.d - j * kSide, 2 * t.d);
  }

  // Heads whose parts are still to be added up.
  static int64_t finish_units(const AttentionTask& t) { return t.dq && !joined(t) ? t.batch * t.heads : 0; }
  static int64_t finish_scratch(const AttentionTask&) { return 2 * kPart; }
  static void finish(const AttentionTask& t, char* workspace, char* scratch, int64_t begin, int64_t end) {
    flushing_denormals([&] {
      for (int64_t head = begin; head < end; ++head) {
        float* const sum = sums_of(t, workspace, head, 0);
        for (int64_t part = 1; part < parts(t); ++part) add(sums_of(t, workspace, head, part), head_floats(t), sum);
        write_dq(t, head, sum, scratch);
      }
    });
  }
};

constexpr AttentionGradient gradient{{Backward::units, Backward::scratch, Backward::run},
                                     {Backward::finish_units, Backward::finish_scratch, Backward::finish},
                                     Backward::workspace};

}  // namespace

const AttentionGradient& GRADOPS_ISA::attention_backward_bf16() { return gradient; }

}  // namespace gradops
