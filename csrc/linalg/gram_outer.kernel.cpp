#include "linalg/gram_outer.h"

#include "common/simd_gemm.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int W = kLanes<double>, P = kPanel<double>;
constexpr int64_t kTokens = 128;  // packed together: a panel of them stays in L1

int64_t panels(int64_t cols) { return (cols + P - 1) / P; }

// out[c] = sum over the rows [row, row + tokens) of g (x + shift), for columns [0, cols), rounded up to whole vectors.
void rows_of(const Panels<double>& x, const Panels<double>& g, int64_t row, int64_t tokens, int64_t cols, double shift,
             double* out) {
  for (int64_t c = 0; c < cols; c += W) {
    Vec<double> sum{};
    const double *a = x.at(row, c), *b = g.at(row, c);
    for (int64_t t = 0; t < tokens; ++t, a += P, b += P) sum += vec_at(b) * (vec_at(a) + shift);
    vec_at(out + c) = sum;
  }
}

// Columns [col, col + to.cols) of rows [0, to.rows) of a matrix, widened; the last vectors are filled up with zeros.
// A panel at a time: side by side, the same row of all panels would have one place in the L1 cache.
template <class S>
void pack(const S* from, int64_t stride, int64_t col, const Panels<double>& to) {
  double* out = to.data;
  for (int64_t c = 0; c < to.cols; c += P) {
    const S* in = from + col + c;
    const int64_t count = to.cols - c;
    if (count >= P) {
      for (int64_t r = 0; r < to.rows; ++r, in += stride, out += P)
#pragma omp simd
        for (int e = 0; e < P; ++e) out[e] = widen(in[e]);
    } else {
      for (int64_t r = 0; r < to.rows; ++r, in += stride, out += P)
        for (int64_t e = 0; e < P; ++e) out[e] = e < count ? double(widen(in[e])) : 0.;
    }
  }
}

}  // namespace

void gram_outer_contract(const OuterPairs& t, const void* x_sums, void* g_sums, double* out) {
  const Panels<double> x{static_cast<double*>(const_cast<void*>(x_sums)), t.rows, t.cols},
      g{static_cast<double*>(g_sums), t.rows, t.cols};
  const double shift = t.bias ? 1 : 0;
  const int64_t width = t.cols / t.others;
  alignas(kVectorBytes) double sums[kGramGroup + P];
  for (int64_t a = 0; a < t.rows / t.tokens; ++a, out += width) {
    const int64_t first = a * t.tokens, upto = t.diagonal ? first : t.cols;
    rows_of(x, g, first, t.tokens, upto, shift, sums);
    for (int64_t b = 0; b < upto / t.others; ++b) {
      double sum = 0;
      for (int64_t s = 0; s < t.others; ++s) sum += sums[b * t.others + s];
      out[b] = sum;
    }
    if (!t.diagonal) continue;
    double below = 0, on = 0;  // nothing above the diagonal was computed
    for (int64_t i = first; i < first + t.tokens; ++i) {
      for (int64_t k = first; k < i; ++k) below += *g.at(i, k) * (*x.at(i, k) + shift);
      on += *g.at(i, i) * (*x.at(i, i) + shift);
    }
    out[a] = 2 * below + on;
  }
}

int64_t gram_outer_part_size(int64_t rows, int64_t cols, bool bias) {
  return (panels(cols) * rows + (bias ? panels(rows) : 0)) * P;
}
int64_t gram_outer_packed_size(int64_t rows, int64_t cols) { return (panels(rows) + panels(cols)) * P * kTokens; }

void gram_outer_part(const OuterLayer& t, int64_t sample, const OuterPart& at, double* packed, double* to) {
  const Panels<double> out{to, at.rows, at.cols};
  double* const sums = to + out.size();
  for (int64_t e = 0; e < gram_outer_part_size(at.rows, at.cols, at.bias); e += W) vec_at(to + e) = Vec<double>{};
  for (int64_t begin = 0; begin < t.tokens; begin += kTokens) {
    const int64_t tokens = t.tokens - begin < kTokens ? t.tokens - begin : kTokens, row = sample * t.tokens + begin;
    const Panels<double> g{packed, tokens, at.rows}, x{packed + g.size(), tokens, at.cols};
    with_type(t.g_element,
              [&](auto zero) { pack(static_cast<const decltype(zero)*>(t.g) + row * t.p, t.p, at.row, g); });
    with_type(t.x_element,
              [&](auto zero) { pack(static_cast<const decltype(zero)*>(t.x) + row * t.d, t.d, at.col, x); });
    for (int64_t r = 0; at.bias && r < at.rows; r += W) {
      Vec<double> sum{};
      const double* b = g.at(0, r);
      for (int64_t k = 0; k < tokens; ++k, b += P) sum += vec_at(b);
      vec_at(sums + r) += sum;
    }
    for (int64_t p = 0; p < x.panels(); ++p)
      for (int64_t i = 0; i < g.panels(); ++i)
        each_tile(at.rows - i * P < P ? at.rows - i * P : P, [&](int64_t r, auto rows) __attribute__((always_inline)) {
          double* sum = out.at(i * P + r, p * P);
          tile_of<double, Left::by_columns, rows>(x.vectors() - p * kTileVectors, g.at(0, i * P + r), 0, x.at(0, p * P),
                                                  tokens, 1., sum, 1., sum);
        });
  }
}

}  // namespace gradops::GRADOPS_ISA
