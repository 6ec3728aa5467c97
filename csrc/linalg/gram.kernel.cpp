#include "linalg/gram.h"

#include "common/simd_gemm.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kChunk = 256;  // columns of J packed together: a panel of them stays in L1, a group in L2

template <class T>
int64_t space(int64_t rows, int64_t cols) {  // of Panels
  const int64_t panels = (cols + kPanel<T> - 1) / kPanel<T>;
  return panels * rows * kPanel<T>;
}

template <class S, int W>
struct RunOf {
  typedef S type __attribute__((vector_size(W * sizeof(S)), aligned(alignof(S)), may_alias));
};

// As many numbers as a vector of T has lanes, widened.
template <class T, class S>
[[gnu::always_inline]] inline Vec<T> widened(const S* from) {
  constexpr int W = kLanes<T>;
  if constexpr (sizeof(S) >= 4) {
    return __builtin_convertvector(*reinterpret_cast<const typename RunOf<S, W>::type*>(from), Vec<T>);
  } else {
    alignas(kVectorBytes) float x[W];
#pragma omp simd
    for (int l = 0; l < W; ++l) x[l] = widen(from[l]);
    return widened<T>(x);
  }
}

// Columns [begin, end) of rows [row, row + to.cols), widened, as rows of `to`; to.rows is a multiple of the lanes,
// and whatever lies outside the matrix is zero.
template <class S, class T>
void pack(const S* j, int64_t stride, int64_t row, int64_t begin, int64_t end, const Panels<T>& to) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < to.cols; c += W) {
    const S* from = j + (row + c) * stride + begin;
    const int64_t rows = to.cols - c, whole = rows < W ? 0 : (end - begin) / W * W;
    Vec<T> block[W];
    const auto put = [&](int64_t k) __attribute__((always_inline)) {
      transpose<T>(block);
      T* out = to.at(k, c);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) vec_at(out + r * kPanel<T>) = block[r];
    };
    for (int64_t k = 0; k < whole; k += W) {
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) block[r] = widened<T>(from + r * stride + k);
      put(k);
    }
    for (int64_t k = whole; k < to.rows; k += W) {
      alignas(kVectorBytes) T edge[W][W] = {};
      for (int r = 0; r < W && r < rows; ++r)
        for (int l = 0; l < W && l < end - begin - k; ++l) edge[r][l] = T(widen(from[r * stride + k + l]));
      for (int r = 0; r < W; ++r) block[r] = vec_at(edge[r]);
      put(k);
    }
  }
}

// sum += a^T b; of the columns right of the diagonal, if a is b, nothing is used.
template <class T>
void add(const Panels<T>& a, const Panels<T>& b, const Panels<T>& sum) {
  constexpr int W = kLanes<T>, P = kPanel<T>;
  const int64_t vectors = b.vectors();
  for (int64_t p = 0; p < b.panels(); ++p)
    for (int64_t i = a.data == b.data ? p : 0; i < a.panels(); ++i)
      each_tile(a.cols - i * P < P ? a.cols - i * P : P, [&](int64_t r, auto rows) __attribute__((always_inline)) {
        const int64_t row = i * P + r, last = a.data == b.data ? (row + rows - 1) / W + 1 : vectors;
        T* to = sum.at(row, p * P);
        tile_of<T, Left::by_columns, rows>((last < vectors ? last : vectors) - p * kTileVectors, a.at(0, row), 0,
                                           b.at(0, p * P), a.rows, T(1), to, T(1), to);
      });
}

template <class S, class T>
void sum_of(const GramPiece& t, T* sum, T* packed) {
  constexpr int W = kLanes<T>;
  const S* j = static_cast<const S*>(t.j);
  const Panels<T> out{sum, t.rows, t.others};
  if (!t.add)
    for (int64_t e = 0; e < out.size(); e += W) vec_at(sum + e) = Vec<T>{};
  for (int64_t begin = t.begin; begin < t.end; begin += kChunk) {
    const int64_t end = begin + kChunk < t.end ? begin + kChunk : t.end, depth = (end - begin + W - 1) / W * W;
    const Panels<T> a{packed, depth, t.rows}, b{t.row == t.other ? packed : packed + a.size(), depth, t.others};
    pack(j, t.cols, t.row, begin, end, a);
    if (a.data != b.data) pack(j, t.cols, t.other, begin, end, b);
    add(a, b, out);
  }
}

template <class T>
void write(const GramPiece& t, const void* sums, int64_t slices, int64_t stride, T* g, int64_t size) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.row + i, count = t.row == t.other ? i + 1 : t.others;
    for (int64_t k = 0; k < count; ++k) {
      T total = 0;
      for (int64_t s = 0; s < slices; ++s) {
        const Panels<T> part{reinterpret_cast<T*>(const_cast<char*>(static_cast<const char*>(sums)) + s * stride),
                             t.rows, t.others};
        total += *part.at(i, k);
      }
      g[row * size + t.other + k] = g[(t.other + k) * size + row] = total;
    }
  }
}

}  // namespace

GramSpace gram_space(int64_t rows, int64_t others, bool wide) {
  const auto of = [=](auto zero) {
    using T = decltype(zero);
    const int64_t bytes = sizeof(T);
    return GramSpace{space<T>(rows, others) * bytes, (space<T>(kChunk, rows) + space<T>(kChunk, others)) * bytes};
  };
  return wide ? of(0.) : of(0.f);
}

void gram_sum(const GramPiece& t, void* sum, void* packed) {
  with_type(t.element, [&](auto zero) {
    using S = decltype(zero);
    if (t.wide) return sum_of<S>(t, static_cast<double*>(sum), static_cast<double*>(packed));
    if constexpr (sizeof(S) < 8) sum_of<S>(t, static_cast<float*>(sum), static_cast<float*>(packed));
  });
}

void gram_write(const GramPiece& t, const void* sums, int64_t slices, int64_t stride, void* g, int64_t size) {
  t.wide ? write(t, sums, slices, stride, static_cast<double*>(g), size)
         : write(t, sums, slices, stride, static_cast<float*>(g), size);
}

}  // namespace gradops::GRADOPS_ISA
