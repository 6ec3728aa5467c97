#include "curvature/scaled_dot_product_attention.h"

#include "common/exp_log.h"
#include "curvature/attention_tiles.h"

namespace gradops::GRADOPS_ISA {
namespace {

// Packed queries carry scale * log2(e), so that e^S is 2^x, in every pass alike: the backward ones see bit for bit the
// scores that the forward one summed.
constexpr int64_t kKeysForward = 128, kKeysBackward = 64;  // of a tile

// A block of queries of one head.
struct Block {
  int64_t b, h, kh, q0, queries, row;  // row: of all batches' and heads' rows, the first
  Block(const AttentionTask& t, int64_t head, int64_t q0, int64_t block)
      : b(head / t.heads),
        h(head % t.heads),
        kh(h / (t.heads / t.key_heads)),
        q0(q0),
        queries(least(block, t.queries - q0)),
        row(head * t.queries + q0) {}
};
template <class T>
Block zigzagged(const AttentionTask& t, int64_t task) {
  const int64_t blocks = (t.queries + kQueries<T> - 1) / kQueries<T>;
  return Block(t, task / blocks, zigzag(task % blocks, blocks) * kQueries<T>, kQueries<T>);
}

// The two factors that scores are made of, and their changes, for a tile of keys.
template <class T>
struct KeyTile {
  Rows<T> k, v, k_dot, v_dot;
};
template <class T, bool kDot>
struct KeyCopies {
  T *k, *v, *k_dot, *v_dot;
  void place(Parts& part, const AttentionTask& t, int64_t keys) {
    if (is_own<T>(t.element) && t.d == round_up<T>(t.d) && t.dv == round_up<T>(t.dv)) keys = 0;  // all read in place
    part(k, keys * round_up<T>(t.d)), part(v, keys * round_up<T>(t.dv));
    if (kDot) part(k_dot, keys * round_up<T>(t.d)), part(v_dot, keys * round_up<T>(t.dv));
  }
  KeyTile<T> operator()(const AttentionTask& t, const Block& at, int64_t k0, int64_t keys) const {
    KeyTile<T> tile{};
    tile.k = fetch(t.element, t.k, at.b, at.kh, k0, keys, t.d, k);
    tile.v = fetch(t.element, t.v, at.b, at.kh, k0, keys, t.dv, v);
    if (kDot) {
      tile.k_dot = fetch(t.element, t.k_dot, at.b, at.kh, k0, keys, t.d, k_dot);
      tile.v_dot = fetch(t.element, t.v_dot, at.b, at.kh, k0, keys, t.dv, v_dot);
    }
    return tile;
  }
};

// o and lse; with kDot also o_dot and mu.
template <class T, bool kDot>
struct Forward {
  static constexpr int64_t Q = kQueries<T>;
  static constexpr int W = kLanes<T>, N = Q / W;
  const AttentionTask& t;
  T *rows, *q, *q_dot, *o, *o_dot, *p, *w, *mask, *line, *shrink;  // w: P S., then scaled
  KeyCopies<T, kDot> copies;

  explicit Forward(const AttentionTask& t) : t(t) {}
  void place(Parts& part) {
    const int64_t d = round_up<T>(t.d), dv = round_up<T>(t.dv), tile = kKeysForward * Q;
    part(rows, Q * d), part(q, Q * d), part(o, Q * dv), part(p, tile), part(shrink, Q);
    part(mask, t.mask.data ? tile : 0), part(line, t.mask.data ? tile : 0);
    part(q_dot, kDot ? Q * d : 0), part(o_dot, kDot ? Q * dv : 0), part(w, kDot ? tile : 0);
    copies.place(part, t, kKeysForward);
  }

  void block(const Block& at) {
    const int64_t n = round_up<T>(at.queries), dv = round_up<T>(t.dv);
    const T factor = T(t.scale * kLog2e);
    turn<T>(fetch(t.element, t.q, at.b, at.h, at.q0, at.queries, t.d, rows), at.queries, t.d, factor, q);
    const bool turned = kDot && t.q_dot.data;
    if (turned)
      turn<T>(fetch(t.element, t.q_dot, at.b, at.h, at.q0, at.queries, t.d, rows), at.queries, t.d, factor, q_dot);
    Vec<T> top[N], sum[N] = {}, mu[N] = {};
    for (int j = 0; j < N; ++j) top[j] = splat(-T(__builtin_inf()));
    bool first = true;
    each_key_tile<T>(
        t.causal, at.q0, at.queries, 0, t.keys, kKeysForward, [&](int64_t k0, int64_t keys, int64_t skip, bool edge) {
          if (t.mask.data && !take_mask<T>(t, at.b, at.h, at.q0, at.queries, k0, keys, line, mask)) return;
          const KeyTile<T> tile = copies(t, at, k0, keys);
          const Product<T> scores{tile.k.data, tile.k.next, 1, q + skip, Q};
          multiply(keys, n - skip, t.d, scores, p + skip, Q, false);
          if constexpr (kDot)
            multiply(keys, n - skip, t.d, {tile.k.data, tile.k.next, 1, turned ? q_dot + skip : nullptr, Q},
                     {tile.k_dot.data, tile.k_dot.next, 1, q + skip, Q}, w + skip, Q, false);
          bool moved = false;
          for (int64_t j = skip; j < n; j += W) {
            Vec<T> high = top[j / W], part{}, part_dot{};
            for (int64_t i = 0; i < keys; ++i) {
              T* const at_ij = p + i * Q + j;
              Vec<T> x = load(at_ij);
              if (t.mask.data) x += load(mask + i * Q + j);
              if (edge) x = hide_future<T>(x, j, k0 - at.q0 + i);
              if (edge || t.mask.data) store<T>(at_ij, x);
              high = high > x ? high : x;
            }
            const Vec<T> base = high == -T(__builtin_inf()) ? Vec<T>{} : high;  // a row that sees no key so far
            for (int64_t i = 0; i < keys; ++i) {
              T* const at_ij = p + i * Q + j;
              const Vec<T> e = exp2(load(at_ij) - base);
              store<T>(at_ij, e);
              part += e;
              if constexpr (kDot) {
                const Vec<T> e_dot = e * load(w + i * Q + j) * T(kLn2);
                store<T>(w + i * Q + j, e_dot);
                part_dot += e_dot;
              }
            }
            const Vec<T> c = exp2(top[j / W] - base);
            for (int l = 0; l < W; ++l) moved |= c[l] != T(1);
            store<T>(shrink + j, c);
            sum[j / W] = sum[j / W] * c + part;
            mu[j / W] = mu[j / W] * c + part_dot;
            top[j / W] = high;
          }
          if (!first && moved)
            for (int64_t i = skip; i < at.queries; ++i)
              for (int64_t c = 0; c < dv; c += W) {
                store<T>(o + i * dv + c, load(o + i * dv + c) * shrink[i]);
                if (kDot) store<T>(o_dot + i * dv + c, load(o_dot + i * dv + c) * shrink[i]);
              }
          const int64_t rows = at.queries - skip;
          multiply(rows, dv, keys, {p + skip, 1, Q, tile.v.data, tile.v.next}, o + skip * dv, dv, !first);
          if constexpr (kDot)
            multiply(rows, dv, keys, {w + skip, 1, Q, tile.v.data, tile.v.next},
                     {p + skip, 1, Q, tile.v_dot.data, tile.v_dot.next}, o_dot + skip * dv, dv, !first);
          first = false;
        });
    finish(at, first, top, sum, mu);
  }

  void finish(const Block& at, bool none, const Vec<T>* top, const Vec<T>* sum, const Vec<T>* mu) {
    const int64_t dv = round_up<T>(t.dv);
    for (int64_t i = 0; i < at.queries; ++i) {
      const T z = sum[i / W][i % W], inverse = z == 0 ? T(0) : T(1) / z, m = mu[i / W][i % W] * inverse;
      static_cast<T*>(t.lse)[at.row + i] = top[i / W][i % W] * T(kLn2) + log_of(z);
      if (kDot) static_cast<T*>(t.mu)[at.row + i] = m;
      for (int64_t c = 0; c < dv; c += W) {
        const Vec<T> x = none ? Vec<T>{} : load(o + i * dv + c) * inverse;
        store<T>(o + i * dv + c, x);
        if (kDot) store<T>(o_dot + i * dv + c, none ? Vec<T>{} : load(o_dot + i * dv + c) * inverse - m * x);
      }
      put_row(t.element, o + i * dv, t.dv, t.o, (at.row + i) * t.dv);
      if (kDot) put_row(t.element, o_dot + i * dv, t.dv, t.o_dot, (at.row + i) * t.dv);
    }
  }
};

// o_dot and mu, given o and lse.
template <class T>
struct Jvp {
  static constexpr int64_t Q = kQueries<T>;
  static constexpr int W = kLanes<T>, N = Q / W;
  const AttentionTask& t;
  T *rows, *q, *q_dot, *o_dot, *lse, *p, *w, *mask, *line;
  KeyCopies<T, true> copies;

  explicit Jvp(const AttentionTask& t) : t(t) {}
  void place(Parts& part) {
    const int64_t d = round_up<T>(t.d), dv = round_up<T>(t.dv), tile = kKeysForward * Q;
    part(rows, Q * (d > dv ? d : dv)), part(q, Q * d), part(q_dot, Q * d), part(o_dot, Q * dv);
    part(lse, Q), part(p, tile), part(w, tile), part(mask, t.mask.data ? tile : 0), part(line, t.mask.data ? tile : 0);
    copies.place(part, t, kKeysForward);
  }

  void block(const Block& at) {
    const int64_t n = round_up<T>(at.queries), dv = round_up<T>(t.dv);
    const T factor = T(t.scale * kLog2e);
    turn<T>(fetch(t.element, t.q, at.b, at.h, at.q0, at.queries, t.d, rows), at.queries, t.d, factor, q);
    const bool turned = t.q_dot.data, scores_move = turned || t.k_dot.data;
    if (turned)
      turn<T>(fetch(t.element, t.q_dot, at.b, at.h, at.q0, at.queries, t.d, rows), at.queries, t.d, factor, q_dot);
    take_rows<T>(static_cast<const T*>(t.lse) + at.row, at.queries, T(kLog2e), lse);
    for (int64_t i = 0; i < at.queries * dv; i += W) store<T>(o_dot + i, Vec<T>{});
    Vec<T> mu[N] = {};
    each_key_tile<T>(
        t.causal, at.q0, at.queries, 0, t.keys, kKeysForward, [&](int64_t k0, int64_t keys, int64_t skip, bool edge) {
          if (t.mask.data && !take_mask<T>(t, at.b, at.h, at.q0, at.queries, k0, keys, line, mask)) return;
          const KeyTile<T> tile = copies(t, at, k0, keys);
          multiply(keys, n - skip, t.d, {tile.k.data, tile.k.next, 1, q + skip, Q}, p + skip, Q, false);
          if (scores_move)
            multiply(keys, n - skip, t.d, {tile.k.data, tile.k.next, 1, turned ? q_dot + skip : nullptr, Q},
                     {tile.k_dot.data, tile.k_dot.next, 1, q + skip, Q}, w + skip, Q, false);
          for (int64_t i = 0; i < keys; ++i)
            for (int64_t j = skip; j < n; j += W) {
              Vec<T> x = load(p + i * Q + j);
              if (t.mask.data) x += load(mask + i * Q + j);
              if (edge) x = hide_future<T>(x, j, k0 - at.q0 + i);
              const Vec<T> e = exp2(x - load(lse + j));
              store<T>(p + i * Q + j, e);
              if (scores_move) {
                const Vec<T> e_dot = e * load(w + i * Q + j) * T(kLn2);
                store<T>(w + i * Q + j, e_dot);
                mu[j / W] += e_dot;
              }
            }
          multiply(at.queries - skip, dv, keys, {w + skip, 1, Q, scores_move ? tile.v.data : nullptr, tile.v.next},
                   {p + skip, 1, Q, tile.v_dot.data, tile.v_dot.next}, o_dot + skip * dv, dv, true);
        });
    HeadRows result{t.o, t.heads * t.queries * t.dv, t.queries * t.dv, t.dv};
    const Rows<T> o = fetch(t.element, result, at.b, at.h, at.q0, at.queries, t.dv, rows);
    for (int64_t i = 0; i < at.queries; ++i) {
      const T m = mu[i / W][i % W];
      static_cast<T*>(t.mu)[at.row + i] = m;
      for (int64_t c = 0; c < dv; c += W)
        store<T>(o_dot + i * dv + c, load(o_dot + i * dv + c) - m * load(o.data + i * o.next + c));
      put_row(t.element, o_dot + i * dv, t.dv, t.o_dot, (at.row + i) * t.dv);
    }
  }
};

// Adds to the sums of gradients what a block of queries and a range of keys give; with kDot also to their changes.
template <class T, bool kDot>
struct Backward {
  static constexpr int64_t Q = kQueries<T>;
  static constexpr int W = kLanes<T>;
  const AttentionTask& t;
  const AttentionSums& s;
  T *q_rows, *g_rows, *q_dot_rows, *g_dot_rows, *o_rows;  // copies, where they cannot be read in place
  T *q, *g, *q_dot, *g_dot, *lse, *mu, *D, *D_dot, *p, *ds, *p_dot, *ds_dot, *mask, *line;
  KeyCopies<T, kDot> copies;

  Backward(const AttentionTask& t, const AttentionSums& s) : t(t), s(s) {}
  void place(Parts& part) {
    const int64_t d = round_up<T>(t.d), dv = round_up<T>(t.dv), tile = kKeysBackward * Q;
    part(q_rows, Q * d), part(g_rows, Q * dv), part(o_rows, Q * dv), part(q, Q * d), part(g, Q * dv);
    part(lse, Q), part(D, Q), part(p, tile), part(ds, tile);
    part(mask, t.mask.data ? tile : 0), part(line, t.mask.data ? tile : 0);
    if (kDot) {
      part(q_dot_rows, Q * d), part(g_dot_rows, Q * dv), part(q_dot, Q * d), part(g_dot, Q * dv);
      part(mu, Q), part(D_dot, Q), part(p_dot, tile), part(ds_dot, tile);
    }
    copies.place(part, t, kKeysBackward);
  }

  // Row i of the rows of a tensor of sums.
  static T* row(void* sums, int64_t i, int64_t cols) {
    return sums ? static_cast<T*>(sums) + i * round_up<T>(cols) : nullptr;
  }

  void block(const Block& at, int64_t from, int64_t to) {
    const int64_t n = round_up<T>(at.queries), d = round_up<T>(t.d), dv = round_up<T>(t.dv);
    const auto rows_of = [&](const HeadRows& x, int64_t cols, T* copy) {
      return fetch(t.element, x, at.b, at.h, at.q0, at.queries, cols, copy);
    };
    const auto result = [&](const void* x) {
      return rows_of({x, t.heads * t.queries * t.dv, t.queries * t.dv, t.dv}, t.dv, o_rows);
    };
    const T factor = T(t.scale * kLog2e), scale = T(t.scale);
    const Rows<T> q_in = rows_of(t.q, t.d, q_rows), g_in = rows_of(t.g, t.dv, g_rows);
    turn<T>(q_in, at.queries, t.d, factor, q);
    turn<T>(g_in, at.queries, t.dv, T(1), g);
    take_rows<T>(static_cast<const T*>(t.lse) + at.row, at.queries, T(kLog2e), lse);
    const Rows<T> o_in = result(t.o);
    dot_rows(g_in, o_in, at.queries, t.dv, D, false);
    Rows<T> q_dot_in{}, g_dot_in{};
    if constexpr (kDot) {
      q_dot_in = rows_of(t.q_dot, t.d, q_dot_rows), g_dot_in = rows_of(t.g_dot, t.dv, g_dot_rows);
      if (q_dot_in.data) turn<T>(q_dot_in, at.queries, t.d, factor, q_dot);
      if (g_dot_in.data) turn<T>(g_dot_in, at.queries, t.dv, T(1), g_dot);
      take_rows<T>(static_cast<const T*>(t.mu) + at.row, at.queries, T(1), mu);
      for (int64_t j = 0; j < n; j += W) store<T>(D_dot + j, Vec<T>{});
      if (g_dot_in.data) dot_rows(g_dot_in, o_in, at.queries, t.dv, D_dot, true);
      dot_rows(g_in, result(t.o_dot), at.queries, t.dv, D_dot, true);
    }
    const bool scores = s.dq || s.dk || s.dq_dot || s.dk_dot;  // else only dv is wanted
    const int64_t head = (at.b * t.key_heads + at.kh) * t.keys;
    each_key_tile<T>(t.causal, at.q0, at.queries, from, to, kKeysBackward,
                     [&](int64_t k0, int64_t keys, int64_t skip, bool edge) {
                       if (t.mask.data && !take_mask<T>(t, at.b, at.h, at.q0, at.queries, k0, keys, line, mask)) return;
                       const KeyTile<T> tile = copies(t, at, k0, keys);
                       const auto times_queries = [&](const Rows<T>& left, const T* right) -> Product<T> {
                         return {left.data, left.next, 1, right ? right + skip : nullptr, Q};
                       };
                       const T *q_dot_t = q_dot_in.data ? q_dot : nullptr, *g_dot_t = g_dot_in.data ? g_dot : nullptr;
                       multiply(keys, n - skip, t.d, times_queries(tile.k, q), p + skip, Q, false);
                       if (scores) multiply(keys, n - skip, t.dv, times_queries(tile.v, g), ds + skip, Q, false);
                       if constexpr (kDot) {
                         multiply(keys, n - skip, t.d, times_queries(tile.k, q_dot_t), times_queries(tile.k_dot, q),
                                  p_dot + skip, Q, false);
                         if (scores)
                           multiply(keys, n - skip, t.dv, times_queries(tile.v, g_dot_t), times_queries(tile.v_dot, g),
                                    ds_dot + skip, Q, false);
                       }
                       for (int64_t i = 0; i < keys; ++i)
                         for (int64_t j = skip; j < n; j += W) {
                           const int64_t ij = i * Q + j;
                           Vec<T> x = load(p + ij);
                           if (t.mask.data) x += load(mask + ij);
                           if (edge) x = hide_future<T>(x, j, k0 - at.q0 + i);
                           const Vec<T> e = exp2(x - load(lse + j)), a = (load(ds + ij) - load(D + j)) * scale;
                           store<T>(p + ij, e);
                           store<T>(ds + ij, e * a);
                           if constexpr (kDot) {
                             const Vec<T> e_dot = e * (load(p_dot + ij) * T(kLn2) - load(mu + j));
                             store<T>(p_dot + ij, e_dot);
                             store<T>(ds_dot + ij, e_dot * a + e * ((load(ds_dot + ij) - load(D_dot + j)) * scale));
                           }
                         }
                       // Tiles times rows of queries are sums over queries, for keys; tiles' transposes times rows of
                       // keys the other.
                       const int64_t rows = at.queries - skip;
                       const auto by_key = [&](const T* left, const Rows<T>& right) -> Product<T> {
                         return {left + skip, Q, 1, right.data ? right.data + skip * right.next : nullptr, right.next};
                       };
                       const auto by_query = [&](const T* left, const Rows<T>& right) -> Product<T> {
                         return {left + skip, 1, Q, right.data, right.next};
                       };
                       if (s.dv) multiply(keys, dv, rows, by_key(p, g_in), row(s.dv, head + k0, t.dv), dv, true);
                       if (s.dk) multiply(keys, d, rows, by_key(ds, q_in), row(s.dk, head + k0, t.d), d, true);
                       if (s.dq) multiply(rows, d, keys, by_query(ds, tile.k), row(s.dq, at.row + skip, t.d), d, true);
                       if constexpr (kDot) {
                         if (s.dv_dot)
                           multiply(keys, dv, rows, by_key(p_dot, g_in), by_key(p, g_dot_in),
                                    row(s.dv_dot, head + k0, t.dv), dv, true);
                         if (s.dk_dot)
                           multiply(keys, d, rows, by_key(ds_dot, q_in), by_key(ds, q_dot_in),
                                    row(s.dk_dot, head + k0, t.d), d, true);
                         if (s.dq_dot)
                           multiply(rows, d, keys, by_query(ds_dot, tile.k), by_query(ds, tile.k_dot),
                                    row(s.dq_dot, at.row + skip, t.d), d, true);
                       }
                     });
  }

  void range(const AttentionRound& r, int64_t task) {
    const int64_t key_head = task / r.count, i = r.first + task % r.count, j = (i + r.shift) % r.wrap;
    if (j * r.rows >= t.keys) return;
    const int64_t group = t.heads / t.key_heads, end = least((i + 1) * r.rows, t.queries);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
      for (int64_t q0 = i * r.rows; q0 < end; q0 += Q)
        block(Block(t, h, q0, Q), j * r.rows, least((j + 1) * r.rows, t.keys));
  }
};

template <class K, class F>
void run(K kernel, int64_t begin, int64_t end, const F& one) {
  with_scratch(kernel);
  flushing_denormals([&] {
    for (int64_t task = begin; task < end; ++task) one(kernel, task);
  });
}
template <class T>
void forward(const AttentionTask& t, int64_t begin, int64_t end) {
  const auto one = [&](auto& kernel, int64_t task) { kernel.block(zigzagged<T>(t, task)); };
  if (t.o_dot)
    run(Forward<T, true>(t), begin, end, one);
  else
    run(Forward<T, false>(t), begin, end, one);
}

}  // namespace

void attention_forward_blocks(const AttentionTask& t, int64_t begin, int64_t end) {
  if (t.element == Element::f64)
    forward<double>(t, begin, end);
  else
    forward<float>(t, begin, end);
}

void attention_jvp_blocks(const AttentionTask& t, int64_t begin, int64_t end) {
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    run(Jvp<T>(t), begin, end, [&](Jvp<T>& kernel, int64_t task) { kernel.block(zigzagged<T>(t, task)); });
  };
  if (t.element == Element::f64)
    with(0.);
  else
    with(0.f);
}

void attention_backward_ranges(const AttentionTask& t, const AttentionSums& s, const AttentionRound& r, int64_t begin,
                               int64_t end) {
  const auto one = [&](auto& kernel, int64_t task) { kernel.range(r, task); };
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    if (s.dq_dot || s.dk_dot || s.dv_dot)
      run(Backward<T, true>(t, s), begin, end, one);
    else
      run(Backward<T, false>(t, s), begin, end, one);
  };
  if (t.element == Element::f64)
    with(0.);
  else
    with(0.f);
}

void attention_narrow(Element e, const void* sums, void* out, int64_t columns, int64_t begin, int64_t end) {
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; ++i)
      put_row(e, static_cast<const T*>(sums) + i * round_up<T>(columns), columns, out, i * columns);
  };
  if (e == Element::f64)
    with(0.);
  else
    with(0.f);
}

int64_t attention_padded(Element e, int64_t columns) {
  return e == Element::f64 ? round_up<double>(columns) : round_up<float>(columns);
}

}  // namespace gradops::GRADOPS_ISA
