#include "curvature/scaled_dot_product_attention.h"

#include "common/exp_log.h"
#include "curvature/attention_tiles.h"

namespace gradops::GRADOPS_ISA {
namespace {

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
          // Of members the compiler would think that every store may change them.
          T *const p = this->p, *const w = this->w, *const shrink = this->shrink;
          const T* const hidden = t.mask.data ? mask : nullptr;
          for (int64_t j = skip; j < n; j += W) {
            Vec<T> high = top[j / W], part{}, part_dot{};
            if (edge || hidden)
              for (int64_t i = 0; i < keys; ++i) {
                Vec<T> x = load_anywhere(p + i * Q + j);
                if (hidden) x += load_anywhere(hidden + i * Q + j);
                if (edge) x = hide_future<T>(x, j, k0 - at.q0 + i);
                store_anywhere<T>(p + i * Q + j, x);
              }
            for (int64_t i = 0; i < keys; ++i) {
              const Vec<T> x = load_anywhere(p + i * Q + j);
              high = high > x ? high : x;
            }
            const Vec<T> base = high == -T(__builtin_inf()) ? Vec<T>{} : high;  // a row that sees no key so far
            for (int64_t i = 0; i < keys; ++i) {
              const Vec<T> e = exp2(load_anywhere(p + i * Q + j) - base);
              store_anywhere<T>(p + i * Q + j, e);
              part += e;
              if constexpr (kDot) {
                const Vec<T> e_dot = e * load_anywhere(w + i * Q + j) * T(kLn2);
                store_anywhere<T>(w + i * Q + j, e_dot);
                part_dot += e_dot;
              }
            }
            const Vec<T> c = exp2(top[j / W] - base);
            store_anywhere<T>(shrink + j, c);
            sum[j / W] = sum[j / W] * c + part;
            mu[j / W] = mu[j / W] * c + part_dot;
            top[j / W] = high;
          }
          int moved = 0;
#pragma omp simd reduction(| : moved)
          for (int64_t i = skip; i < at.queries; ++i) moved |= shrink[i] != T(1);
          if (!first && moved)
            for (int64_t i = skip; i < at.queries; ++i)
              for (int64_t c = 0; c < dv; c += W) {
                store_anywhere<T>(o + i * dv + c, load_anywhere(o + i * dv + c) * shrink[i]);
                if (kDot) store_anywhere<T>(o_dot + i * dv + c, load_anywhere(o_dot + i * dv + c) * shrink[i]);
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
        const Vec<T> x = none ? Vec<T>{} : load_anywhere(o + i * dv + c) * inverse;
        store_anywhere<T>(o + i * dv + c, x);
        if (kDot)
          store_anywhere<T>(o_dot + i * dv + c, none ? Vec<T>{} : load_anywhere(o_dot + i * dv + c) * inverse - m * x);
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
    for (int64_t i = 0; i < at.queries * dv; i += W) store_anywhere<T>(o_dot + i, Vec<T>{});
    Vec<T> mu[N] = {};
    each_key_tile<T>(
        t.causal, at.q0, at.queries, 0, t.keys, kKeysForward, [&](int64_t k0, int64_t keys, int64_t skip, bool edge) {
          if (t.mask.data && !take_mask<T>(t, at.b, at.h, at.q0, at.queries, k0, keys, line, mask)) return;
          const KeyTile<T> tile = copies(t, at, k0, keys);
          multiply(keys, n - skip, t.d, {tile.k.data, tile.k.next, 1, q + skip, Q}, p + skip, Q, false);
          multiply(keys, n - skip, t.d, {tile.k.data, tile.k.next, 1, turned ? q_dot + skip : nullptr, Q},
                   {tile.k_dot.data, tile.k_dot.next, 1, q + skip, Q}, w + skip, Q, false);
          T *const p = this->p, *const w = this->w;
          const T *const lse = this->lse, *const hidden = t.mask.data ? mask : nullptr;
          for (int64_t j = skip; j < n; j += W) {
            Vec<T> part{};
            for (int64_t i = 0; i < keys; ++i) {
              Vec<T> x = load_anywhere(p + i * Q + j);
              if (hidden) x += load_anywhere(hidden + i * Q + j);
              if (edge) x = hide_future<T>(x, j, k0 - at.q0 + i);
              const Vec<T> e = exp2(x - load_anywhere(lse + j));
              store_anywhere<T>(p + i * Q + j, e);
              const Vec<T> e_dot = e * load_anywhere(w + i * Q + j) * T(kLn2);
              store_anywhere<T>(w + i * Q + j, e_dot);
              part += e_dot;
            }
            mu[j / W] += part;
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
        store_anywhere<T>(o_dot + i * dv + c,
                          load_anywhere(o_dot + i * dv + c) - m * load_anywhere(o.data + i * o.next + c));
      put_row(t.element, o_dot + i * dv, t.dv, t.o_dot, (at.row + i) * t.dv);
    }
  }
};

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

}  // namespace gradops::GRADOPS_ISA
