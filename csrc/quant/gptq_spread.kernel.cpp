// Loops, from the outside: items, kCols columns, kDepth terms, tiles of kRows rows, panels of kWidth columns. The part
// of u in work is packed in panels and stays in L2, the tile's part of e in L1, sums in registers.
#include "quant/gptq_spread.h"

#include "common/simd.h"

namespace gradops {
namespace {

// Sums in registers: a tile of rows and vectors, with room for one row of u beside it.
constexpr int kRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 4 : 2;
constexpr int kVectors = kVectorBytes == 64 ? 2 : kVectorBytes == 32 ? 3 : 4;
template <class T>
constexpr int kWidth = kVectors * kLanes<T>;
template <class T>
constexpr int64_t kDepth = 2048 / int64_t(sizeof(T));
constexpr int64_t kRun = 64;  // terms summed in a row: what a sum loses grows with its length
constexpr int64_t kCols = kVectorBytes == 32 ? 120 : 128;
static_assert(kCols % kWidth<float> == 0 && kCols % kWidth<double> == 0);

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// u, depth x cols, to panels; columns beyond the last are zero.
template <class T>
void pack_right(const T* u, int64_t row, int64_t col, int64_t depth, int64_t cols, T* to) {
  constexpr int W = kLanes<T>, P = kWidth<T>;
  for (int64_t c = 0; c < cols; c += P, to += depth * P)
    for (int64_t i = 0; i < P; i += W) {
      const T* from = u + (c + i) * col;
      const int64_t count = cols - c - i;
      int64_t k = 0;
      if (count >= W && col == 1) {
        for (; k < depth; ++k) vec_at(to + k * P + i) = load_anywhere(from + k * row);
      } else if (count >= W && row == 1) {
        for (Vec<T> block[W]; k + W <= depth; k += W) {
          for (int r = 0; r < W; ++r) block[r] = load_anywhere(from + r * col + k);
          transpose<T>(block);
          for (int r = 0; r < W; ++r) vec_at(to + (k + r) * P + i) = block[r];
        }
      }
      for (; k < depth; ++k)
        for (int64_t r = 0; r < W; ++r) to[k * P + i + r] = r < count ? from[r * col + k * row] : T(0);
    }
}

template <class T>
struct Target {  // w, where a tile of it begins
  T* w;
  int64_t row;
  const T* base;  // or null
  int64_t base_row;
  bool add, fresh;
  Target at(int64_t r, int64_t c) const {
    return {w + r * row + c, row, base ? base + r * base_row + c : nullptr, base_row, add, fresh};
  }
  template <class X>
  [[gnu::always_inline]] X after(X before, X sum) const {
    return add ? before + sum : before - sum;
  }
};

// R rows of w and a panel's columns.
template <class T, int R>
[[gnu::noinline]] void tile(const T* e, int64_t e_row, const T* u, int64_t depth, int64_t cols, const Target<T>& t) {
  constexpr int W = kLanes<T>;
  alignas(kVectorBytes) T total[R][kVectors * W] = {};  // in memory: registers hold the sum of one run
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kVectors; ++c) __builtin_prefetch(t.w + r * t.row + c * W, 1);
  for (int64_t k = 0; k < depth;) {
    Vec<T> sum[R][kVectors] = {};
    const int64_t end = least(k + kRun, depth);
#pragma GCC unroll 4
    for (; k < end; ++k, u += kWidth<T>) {
      Vec<T> row[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) row[c] = vec_at(u + c * W);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec<T> factor = e[r * e_row + k] - Vec<T>{};
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) sum[r][c] += factor * row[c];
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) vec_at(total[r] + c * W) += sum[r][c];
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const Target<T> here = t.at(r, c * W);
      const int64_t left = cols - c * W;
      if (left >= W) {
        Vec<T> now = here.after(t.fresh ? Vec<T>{} : load_anywhere(here.w), vec_at(total[r] + c * W));
        if (t.base) now += load_anywhere(here.base);
        store_anywhere(here.w, now);
      } else {
        for (int64_t i = 0; i < left; ++i) {
          const T now = here.after(t.fresh ? T(0) : here.w[i], total[r][c * W + i]);
          here.w[i] = t.base ? now + here.base[i] : now;
        }
      }
    }
}

template <class T>
struct Pass {  // some rows of one item, some columns, some terms
  Target<T> to;
  const T* e;
  int64_t e_row;
  const T* u;  // packed, depth x cols
  int64_t rows, cols, depth;

  template <int R>
  void tiles(int64_t& row) const {
    for (; row + R <= rows; row += R)
      for (int64_t c = 0; c < cols; c += kWidth<T>)
        tile<T, R>(e + row * e_row, e_row, u + c * depth, depth, cols - c, to.at(row, c));
  }
  void run() const {
    int64_t row = 0;
    tiles<kRows>(row);
    if constexpr (kRows > 8) tiles<8>(row);
    if constexpr (kRows > 4) tiles<4>(row);
    if constexpr (kRows > 2) tiles<2>(row);
    tiles<1>(row);
  }
};

template <class T>
struct Engine {
  static int64_t right_size(const SpreadTask& t) {
    const int64_t cols = least(t.cols, kCols), padded = (cols + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
    return padded * least(t.depth, kDepth<T>);
  }
  static int64_t scratch_bytes(const SpreadTask& t) { return int64_t(sizeof(T)) * right_size(t); }
  static void run(const SpreadTask& t, int64_t begin, int64_t end, char* scratch) {
    T* const right = reinterpret_cast<T*>(scratch);
    const int64_t tiles = (t.rows + kRows - 1) / kRows;
    for (int64_t item = begin / tiles; item * tiles < end; ++item) {
      const int64_t first = (begin > item * tiles ? begin - item * tiles : 0) * kRows;
      const int64_t last = least((end - item * tiles) * kRows, t.rows);
      const T* base = t.base ? static_cast<const T*>(t.base) + item * t.base_batch : nullptr;
      const Target<T> all{static_cast<T*>(t.w) + item * t.w_batch, t.w_row, base, t.base_row, t.add, t.fresh};
      const T* e = static_cast<const T*>(t.e) + item * t.e_batch + first * t.e_row;
      const T* u = static_cast<const T*>(t.u) + item * t.u_batch;
      for (int64_t c = 0; c < t.cols; c += kCols)
        for (int64_t k = 0; k == 0 || k < t.depth; k += kDepth<T>) {
          const int64_t cols = least(t.cols - c, kCols), depth = least(t.depth - k, kDepth<T>);
          pack_right(u + k * t.u_row + c * t.u_col, t.u_row, t.u_col, depth, cols, right);
          Target<T> to = all.at(first, c);
          to.fresh = t.fresh && k == 0;
          if (k + depth < t.depth) to.base = nullptr;
          Pass<T>{to, e + k, t.e_row, right, last - first, cols, depth}.run();
        }
    }
  }
  static constexpr SpreadEngine engine{kRows, scratch_bytes, run};
};

}  // namespace

const SpreadEngine& GRADOPS_ISA::gptq_spread_engine(bool wide) {
  return wide ? Engine<double>::engine : Engine<float>::engine;
}

}  // namespace gradops
