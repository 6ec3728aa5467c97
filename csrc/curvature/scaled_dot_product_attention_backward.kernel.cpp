#include "curvature/attention_tiles.h"

namespace gradops::GRADOPS_ISA {
namespace {

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
      for (int64_t j = 0; j < n; j += W) store_anywhere<T>(D_dot + j, Vec<T>{});
      if (g_dot_in.data) dot_rows(g_dot_in, o_in, at.queries, t.dv, D_dot, true);
      dot_rows(g_in, result(t.o_dot), at.queries, t.dv, D_dot, true);
    }
    const bool scores = s.dq || s.dk || s.dq_dot || s.dk_dot;  // else only dv is wanted
    const int64_t head = (at.b * t.key_heads + at.kh) * t.keys;
    each_key_tile<T>(
        t.causal, at.q0, at.queries, from, to, kKeysBackward, [&](int64_t k0, int64_t keys, int64_t skip, bool edge) {
          if (t.mask.data && !take_mask<T>(t, at.b, at.h, at.q0, at.queries, k0, keys, line, mask)) return;
          const KeyTile<T> tile = copies(t, at, k0, keys);
          const auto times_queries = [&](const Rows<T>& left, const T* right) -> Product<T> {
            return {left.data, left.next, 1, right ? right + skip : nullptr, Q};
          };
          const T *q_dot_t = q_dot_in.data ? q_dot : nullptr, *g_dot_t = g_dot_in.data ? g_dot : nullptr;
          multiply(keys, n - skip, t.d, times_queries(tile.k, q), p + skip, Q, false);
          if (scores) multiply(keys, n - skip, t.dv, times_queries(tile.v, g), ds + skip, Q, false);
          if constexpr (kDot) {
            multiply(keys, n - skip, t.d, times_queries(tile.k, q_dot_t), times_queries(tile.k_dot, q), p_dot + skip, Q,
                     false);
            if (scores)
              multiply(keys, n - skip, t.dv, times_queries(tile.v, g_dot_t), times_queries(tile.v_dot, g),
                       ds_dot + skip, Q, false);
          }
          for (int64_t i = 0; i < keys; ++i)
            for (int64_t j = skip; j < n; j += W) {
              const int64_t ij = i * Q + j;
              Vec<T> x = load_anywhere(p + ij);
              if (t.mask.data) x += load_anywhere(mask + ij);
              if (edge) x = hide_future<T>(x, j, k0 - at.q0 + i);
              const Vec<T> e = exp2(x - load_anywhere(lse + j)),
                           a = (load_anywhere(ds + ij) - load_anywhere(D + j)) * scale;
              store_anywhere<T>(p + ij, e);
              store_anywhere<T>(ds + ij, e * a);
              if constexpr (kDot) {
                const Vec<T> e_dot = e * (load_anywhere(p_dot + ij) * T(kLn2) - load_anywhere(mu + j));
                store_anywhere<T>(p_dot + ij, e_dot);
                store_anywhere<T>(ds_dot + ij,
                                  e_dot * a + e * ((load_anywhere(ds_dot + ij) - load_anywhere(D_dot + j)) * scale));
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
              multiply(keys, dv, rows, by_key(p_dot, g_in), by_key(p, g_dot_in), row(s.dv_dot, head + k0, t.dv), dv,
                       true);
            if (s.dk_dot)
              multiply(keys, d, rows, by_key(ds_dot, q_in), by_key(ds, q_dot_in), row(s.dk_dot, head + k0, t.d), d,
                       true);
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

}  // namespace

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
