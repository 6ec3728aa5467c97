// bf16_pack.h: row-major matrices of bf16 or float to and from blocks (bf16_blocks.h), and their norm.
#pragma once
#include <math.h>

#include "common/bf16_blocks.h"
#include "common/element.h"

namespace gradops {
namespace {

// Row-major; tiles of 32 x 32 from the upper left corner, the last ones in each direction may be partial.
struct Matrix {
  char* data;
  long rows, cols;
  long row_tiles() const { return (rows + 31) / 32; }
  long col_tiles() const { return (cols + 31) / 32; }
  template <Element E>
  char* at(long row, long col) const {
    return data + (row * cols + col) * element_size(E);
  }
};

inline uint32_t first(long count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// 32 consecutive elements; those at and after `count` are zero. Rows and columns may be permuted as
// long as pack and unpack agree: f32 takes halves in place of parities.
template <Element E>
inline void load_even_odd(const char* p, long count, __m512& even, __m512& odd) {
  const uint32_t m = first(count);
  if constexpr (E == Element::bf16) {
    const __m512i r = _mm512_maskz_loadu_epi16(m, p);
    even = even_float(r), odd = odd_float(r);
  } else {
    even = _mm512_maskz_loadu_ps(__mmask16(m), p);
    odd = _mm512_maskz_loadu_ps(__mmask16(m >> 16), p + 64);
  }
}

template <int N, Element E>
inline void as_parts(__m512& even, __m512& odd) {
  if (N == 2 || E == Element::bf16) return;
  const __m512i rounded = round_to_bf16(even, odd);
  even = even_float(rounded), odd = odd_float(rounded);
}

// Of 32 rows from `row` on: in float, row by row, when that can neither overflow nor underflow,
// otherwise in double, where squares of float and bf16 numbers always fit. Of the numbers as a block of N parts has
// them: what rounding does to the norm is then no error of the result.
template <int N, Element E>
double sum_of_squares(const Matrix& x, long row) {
  const long end = row + 32 < x.rows ? row + 32 : x.rows;
  __m512 even, odd;
  __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  for (long r = row; r < end; ++r) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0;
    for (long c = 0; c < x.cols; c += 32) {
      load_even_odd<E>(x.at<E>(r, c), x.cols - c, even, odd);
      as_parts<N, E>(even, odd);
      s0 = _mm512_fmadd_ps(even, even, s0), s1 = _mm512_fmadd_ps(odd, odd, s1);
    }
    s0 = _mm512_add_ps(s0, s1);
    sum[0] = _mm512_add_pd(sum[0], _mm512_cvtps_pd(_mm512_castps512_ps256(s0)));
    sum[1] = _mm512_add_pd(sum[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(s0, 1)));
  }
  const double total = _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1]));
  if (total > 1e-18 && total < 1e37) return total;
  const float power = total < 1 ? 0x1p64f : 0x1p-64f;  // neither overflow nor denormals when these are rounded
  sum[0] = _mm512_setzero_pd();
  const auto add = [&sum](__m256 h) GRADOPS_INLINE {
    const __m512d d = _mm512_cvtps_pd(h);
    sum[0] = _mm512_fmadd_pd(d, d, sum[0]);
  };
  for (long r = row; r < end; ++r)
    for (long c = 0; c < x.cols; c += 32) {
      load_even_odd<E>(x.at<E>(r, c), x.cols - c, even, odd);
      even = _mm512_mul_ps(even, _mm512_set1_ps(power)), odd = _mm512_mul_ps(odd, _mm512_set1_ps(power));
      as_parts<N, E>(even, odd);
      add(_mm512_castps512_ps256(even)), add(_mm512_extractf32x8_ps(even, 1));
      add(_mm512_castps512_ps256(odd)), add(_mm512_extractf32x8_ps(odd, 1));
    }
  return _mm512_reduce_add_pd(sum[0]) / (double(power) * power);
}

// 1 / norm as a power of two, which rounds nothing and is two factors since it may exceed float, and the rest.
struct Scale {
  __m512 first, second;
  double rest;  // in [0.5, 1)
  // squares: the sum over the matrix. The rest of a matrix of zeros is zero, of NaN or infinity NaN.
  Scale(double squares, bool normalize) {
    rest = !isfinite(squares) ? NAN : !normalize ? 1 : squares > 0 ? 1 / sqrt(squares) : 0;
    int e = 0;
    if (rest > 0) {  // frexp() and ldexp() without a call
      constexpr int64_t kExponent = 0x7FF0000000000000;
      const int64_t bits = __builtin_bit_cast(int64_t, rest);
      e = int(bits >> 52) - 1022;
      rest = __builtin_bit_cast(double, (bits & ~kExponent) | (int64_t(1022) << 52));
    }
    const auto power = [](int e) { return _mm512_castsi512_ps(_mm512_set1_epi32((127 + e) << 23)); };
    const int part = e > 100 ? 100 : e < -100 ? -100 : e;
    first = power(part), second = power(e - part);
  }
  __m512 operator()(__m512 x) const { return _mm512_mul_ps(_mm512_mul_ps(x, first), second); }
};

// Tile (i, p) of scale(x) -> r (R form).
template <int N, Element E>
inline void pack_tile(const Matrix& x, long i, long p, const Scale& scale, char* r) {
  const long rows = x.rows - 32 * i < 32 ? x.rows - 32 * i : 32;
  for (long k = 0; k < rows; ++k) {
    __m512 even, odd;
    load_even_odd<E>(x.at<E>(32 * i + k, 32 * p), x.cols - 32 * p, even, odd);
    store_row(r + 64 * k, to_row<N>(scale(even), scale(odd)));
  }
  for (long k = rows; k < 32; ++k) store_row(r + 64 * k, to_row<N>(_mm512_setzero_ps(), _mm512_setzero_ps()));
}

template <int N, Element E>
inline void unpack_tile(const char* r, const Matrix& y, long i, long p) {
  const long rows = y.rows - 32 * i < 32 ? y.rows - 32 * i : 32;
  const uint32_t m = first(y.cols - 32 * p);
  for (long k = 0; k < rows; ++k) {
    const Row<N> row = load_row<N>(r + 64 * k);
    char* at = y.at<E>(32 * i + k, 32 * p);
    if constexpr (E == Element::bf16) {
      _mm512_mask_storeu_epi16(at, m, row.part[0]);  // the high part is the sum, rounded
    } else {
      _mm512_mask_storeu_ps(at, __mmask16(m), even_float(row));
      _mm512_mask_storeu_ps(at + 64, __mmask16(m >> 16), odd_float(row));
    }
  }
}

}  // namespace
}  // namespace gradops
