// attention_tiles.h: how the tiles of attention lie in memory.
//
// Tiles of scores are transposed, keys x queries, with queries along the vectors. So a row's maximum and sums are plain
// vectors, and products find their factors where they are: S^T = K Q^T with Q^T packed once for a block of queries;
// o += P V and dq += dS K read P^T and dS^T by columns; dv += P^T g and dk += dS^T Q by rows.
// Packed queries carry scale * log2(e), so that e^S is 2^x, in every pass alike: the backward ones see bit for bit the
// scores that the forward one summed. For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/scratch.h"
#include "common/widen.h"
#include "curvature/scaled_dot_product_attention.h"
#include "curvature/tile_product.h"

namespace gradops {
namespace {

constexpr int64_t kKeysForward = 128, kKeysBackward = 64;  // of a tile
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
template <class T>
constexpr int64_t kQueries = attention_query_block(sizeof(T) == 8 ? Element::f64 : Element::f32);
template <class T>
constexpr int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls f(E()) with the type that stores numbers computed as T.
template <class T, class F>
inline void with_stored(Element e, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(T());
  } else if (e == Element::f32) {
    f(T());
  } else if (e == Element::bf16) {
    f(Bf16());
  } else {
    f(F16());
  }
}
template <class T>
bool is_own(Element e) {
  return e == (sizeof(T) == 8 ? Element::f64 : Element::f32);
}

// Hands out parts of a thread's scratch; the first time round, of nothing, only to count.
struct Parts {
  char* next;
  template <class T>
  void operator()(T*& p, int64_t numbers) {
    p = reinterpret_cast<T*>(next);
    next += (numbers * int64_t(sizeof(T)) + 127) / 64 * 64;  // a line apart: whole pages between tiles would collide
  }
};
template <class F>
void with_scratch(F& tiles) {
  Parts count{nullptr};
  tiles.place(count);
  Parts parts{thread_scratch(reinterpret_cast<int64_t>(count.next))};
  tiles.place(parts);
}

// Rows of numbers, each as wide as its columns rounded up to vectors. data null: not given.
template <class T>
struct Rows {
  const T* data;
  int64_t next;
};

// Rows of one head, where they lie if they can be read in vectors there, else widened and filled up in `copy`.
template <class T>
Rows<T> fetch(Element e, const HeadRows& x, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t cols, T* copy) {
  if (!x.data) return {nullptr, 0};
  const int64_t at = b * x.b + h * x.h + row * x.r, next = round_up<T>(cols);
  if (is_own<T>(e) && next == cols) return {static_cast<const T*>(x.data) + at, x.r};
  with_stored<T>(e, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(x.data) + at;
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) copy[r * next + c] = widen(from[r * x.r + c]);
      for (int64_t c = cols; c < next; ++c) copy[r * next + c] = 0;
    }
  });
  return {copy, next};
}

// to[c][r] = factor * x[r][c] for a block of queries, so rows of `to` are kQueries apart. Vectors that hold a row are
// written, with zeros for rows that are missing.
template <class T>
void turn(const Rows<T>& x, int64_t rows, int64_t cols, T factor, T* to) {
  constexpr int W = kLanes<T>;
  Vec<T> block[W];
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < cols; c += W) {
      for (int k = 0; k < W; ++k) block[k] = r + k < rows ? load_anywhere(x.data + (r + k) * x.next + c) : Vec<T>{};
      transpose<T>(block);
      for (int k = 0; k < W; ++k) store_anywhere<T>(to + (c + k) * kQueries<T> + r, factor * block[k]);
    }
}

// sums[r] (+)= a[r] . b[r]
template <class T>
void dot_rows(const Rows<T>& a, const Rows<T>& b, int64_t rows, int64_t cols, T* sums, bool add) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    Vec<T> part[W] = {};
    for (int k = 0; k < W && r + k < rows; ++k)
      for (int64_t c = 0; c < cols; c += W)
        part[k] += load_anywhere(a.data + (r + k) * a.next + c) * load_anywhere(b.data + (r + k) * b.next + c);
    transpose<T>(part);
    Vec<T> sum = add ? load_anywhere(sums + r) : Vec<T>{};
    for (int k = 0; k < W; ++k) sum += part[k];
    store_anywhere<T>(sums + r, sum);
  }
}

// factor * x of a block's rows; 0 for missing rows, and for infinities: those of rows that see no key.
template <class T>
void take_rows(const T* x, int64_t rows, T factor, T* to) {
  for (int64_t r = 0; r < kQueries<T>; ++r) to[r] = r < rows && x[r] != -T(__builtin_inf()) ? factor * x[r] : T(0);
}

// log2(e) times the mask's tile, as tiles are; false if it hides every score. `line` has room for the tile, too.
template <class T>
bool take_mask(const AttentionTask& t, int64_t b, int64_t h, int64_t q0, int64_t queries, int64_t k0, int64_t keys,
               T* line, T* to) {
  const AttentionMask& m = t.mask;
  const int64_t at = b * m.b + h * m.h + q0 * m.q + k0 * m.k, next = round_up<T>(keys);
  constexpr T kHidden = -T(__builtin_inf());
  int seen = 0;
  const auto read = [&](const auto* from, const auto& value) {
    for (int64_t q = 0; q < queries; ++q) {
      T* const out = line + q * next;
      if (m.k == 1) {
#pragma omp simd reduction(| : seen)
        for (int64_t k = 0; k < keys; ++k) out[k] = value(from[q * m.q + k]), seen |= out[k] != kHidden;
      } else {
        for (int64_t k = 0; k < keys; ++k) out[k] = value(from[q * m.q + k * m.k]), seen |= out[k] != kHidden;
      }
      for (int64_t k = keys; k < next; ++k) out[k] = 0;
    }
  };
  if (m.boolean) {
    read(static_cast<const uint8_t*>(m.data) + at, [](uint8_t x) { return x ? T(0) : kHidden; });
  } else {
    with_stored<T>(t.element, [&](auto zero) {
      read(static_cast<const decltype(zero)*>(m.data) + at, [](auto x) { return T(kLog2e) * widen(x); });
    });
  }
  if (!seen) return false;
  turn<T>({line, next}, queries, keys, T(1), to);
  return true;
}

// f(first key, keys, skip, edge) for the tiles of keys [from, to) that a block of queries sees: its queries before
// `skip`, whole vectors, see none of them. On the diagonal, where tiles are narrow, `edge` is true.
constexpr int64_t kDiagonal = 16;  // keys of a tile there: at least a vector
template <class T, class F>
void each_key_tile(bool causal, int64_t q0, int64_t queries, int64_t from, int64_t to, int64_t step, const F& f) {
  const int64_t open = causal ? least(q0, to) : to;
  for (int64_t k = from; k < open; k += step) f(k, least(step, open - k), int64_t(0), false);
  if (!causal) return;
  const int64_t end = least(q0 + queries, to);
  for (int64_t k = q0 > from ? q0 : from; k < end; k += kDiagonal) f(k, least(kDiagonal, end - k), k - q0, true);
}

// Scores of queries `query` and on, counted from the block's first as the key is: hidden before the key.
template <class T>
[[gnu::always_inline]] inline Vec<T> hide_future(Vec<T> x, int64_t query, int64_t key) {
  Vec<T> number;
  for (int l = 0; l < kLanes<T>; ++l) number[l] = T(l);
  return number >= splat(T(key - query)) ? x : splat(-T(__builtin_inf()));
}

// A row of sums to numbers as they are stored.
template <class T>
void put_row(Element e, const T* row, int64_t cols, void* out, int64_t at) {
  with_stored<T>(e, [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(out) + at;
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) narrow(row[c], to[c]);
  });
}

// Every run of blocks, in this order, holds rows that see many keys and rows that see few.
inline int64_t zigzag(int64_t i, int64_t blocks) { return i & 1 ? blocks - 1 - i / 2 : i / 2; }

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

template <class K, class F>
void run(K kernel, int64_t begin, int64_t end, const F& one) {
  with_scratch(kernel);
  flushing_denormals([&] {
    for (int64_t task = begin; task < end; ++task) one(kernel, task);
  });
}

}  // namespace
}  // namespace gradops
