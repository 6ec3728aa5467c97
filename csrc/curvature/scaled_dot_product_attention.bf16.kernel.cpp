// o and lse of bf16, in blocks: see attention_blocks.h.
#include "common/exp_log.h"
#include "curvature/attention_blocks.h"

namespace gradops {
namespace {

constexpr int64_t kQueries = 8, kKeys = 8;  // blocks of a chunk

struct Forward {
  int64_t D, V;  // blocks along d and dv
  char *q, *k, *v, *p, *spare;
  float *s, *o, *sums, *top, *sum;
  int64_t size;
  Forward(const AttentionTask& t, char* scratch) : D(column_blocks(t.d)), V(column_blocks(t.dv)) {
    Arena a{scratch};
    q = a.blocks(kQueries * D);  // V(q'), per query block
    k = a.blocks(kKeys * D);     // R(k), per key block
    v = a.blocks(kKeys * V);     // R(v'), per block of dv
    p = a.blocks(kKeys);         // V(P')
    spare = a.blocks(2);
    s = a.floats(kKeys * kFloats);         // S'
    o = a.floats(kQueries * V * kFloats);  // o', per query block
    sums = a.floats(kFloats);
    top = a.floats(kQueries * kSide), sum = a.floats(kQueries * kSide);
    size = a.at - scratch;
  }
  static int64_t chunks(const AttentionTask& t) { return ceil_div(t.queries, kQueries * kSide); }
  static int64_t units(const AttentionTask& t) { return t.batch * t.heads * chunks(t); }
  static int64_t scratch(const AttentionTask& t) { return Forward(t, nullptr).size; }

  // P' of a query block and the keys of the chunk, and its sums. Returns how much what was summed before shrinks.
  Queries softmax(const float* factor, int64_t keys, int64_t i) {
    const Queries before = load_queries(top + i * kSide);
    Queries m[2] = {before, before};
    for (int64_t j = 0; j < keys; ++j) {
      const __m512 f = _mm512_set1_ps(factor[j]);
      for (int64_t r = 0; r < kSide; ++r) {
        float* const x = s + j * kFloats + r * kSide;
        const Queries raw = load_queries(x), y{_mm512_mul_ps(f, raw.even), _mm512_mul_ps(f, raw.odd)};
        store_queries(x, y);  // rounded: the largest less the maximum is 0 however large they are
        m[r & 1] = {_mm512_max_ps(m[r & 1].even, y.even), _mm512_max_ps(m[r & 1].odd, y.odd)};
      }
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
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t r = 0; r < kSide; r += 2) {
        const float* const x = s + j * kFloats + r * kSide;
        const Queries x0 = load_queries(x), x1 = load_queries(x + kSide);
        const __m512 e0 = exp2_of(_mm512_sub_ps(x0.even, at.even)), o0 = exp2_of(_mm512_sub_ps(x0.odd, at.odd));
        const __m512 e1 = exp2_of(_mm512_sub_ps(x1.even, at.even)), o1 = exp2_of(_mm512_sub_ps(x1.odd, at.odd));
        total.even = _mm512_add_ps(total.even, _mm512_add_ps(e0, e1));
        total.odd = _mm512_add_ps(total.odd, _mm512_add_ps(o0, o1));
        store(p + j * kPart + 32 * r, round_to_bf16(e0, e1));
        store(p + j * kPart + 32 * r + kTile, round_to_bf16(o0, o1));
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
    const int64_t n = least(blocks_of(t.queries - query), kQueries), hk = h / (t.heads / t.key_heads);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < D; ++j) {
        pack_block(t.q, b, h, query + i * kSide, t.queries, j * kSide, t.d, spare);
        to_vnni_of_transpose(spare, q + (i * D + j) * kPart);
      }
    clear(o, n * V * kFloats), clear(sum, n * kSide);
    for (int64_t i = 0; i < n * kSide; i += 16) _mm512_store_ps(top + i, _mm512_set1_ps(-INFINITY));
    const int64_t end = seen_blocks(t, query + (n - 1) * kSide);
    for (int64_t first = 0; first < end; first += kKeys) {
      const int64_t keys = least(end - first, kKeys);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t key = (first + j) * kSide;
        for (int64_t c = 0; c < D; ++c) pack_block(t.k, b, hk, key, t.keys, c * kSide, t.d, k + (j * D + c) * kPart);
        for (int64_t c = 0; c < V; ++c) {
          pack_block(t.v, b, hk, key, t.keys, c * kSide, t.dv, spare);
          transpose_block<1>(spare, spare + kPart, v + (c * kKeys + j) * kPart);
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = query + i * kSide, seen = least(seen_blocks(t, at) - first, keys);
        if (seen <= 0) continue;
        float factor[kKeys];
        for (int64_t j = 0; j < seen; ++j) {
          product(k + j * D * kPart, q + i * D * kPart, D, s + j * kFloats);
          factor[j] = finish_scores(t, {b, h, at, (first + j) * kSide}, scale_of(t), spare, s + j * kFloats);
        }
        const Queries shrink = softmax(factor, seen, i);
        for (int64_t c = 0; c < V; ++c)
          add_product(v + c * kKeys * kPart, p, seen, shrink, sums, o + (i * V + c) * kFloats);
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
        f.chunk(t, head / t.heads, head % t.heads, at * kQueries * kSide);
      }
      tile_release();
    });
  }
};

constexpr AttentionPass pass{Forward::units, Forward::scratch, Forward::run};

}  // namespace

const AttentionPass& GRADOPS_ISA::attention_forward_bf16() { return pass; }

}  // namespace gradops
