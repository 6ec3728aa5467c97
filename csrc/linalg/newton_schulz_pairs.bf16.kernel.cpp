// Newton-Schulz with products of bf16 where vectors multiply them, not tiles.
//
// Y = X^T (X itself if it is tall or square) has l rows and s columns, both padded to whole 32s. It is kept in float
// and, rounded, in pairs (common/bf16_pairs.h). The products
//   A = Y^T Y,   A A  (A is symmetric)
// have both operands in this form, so nothing is transposed but the upper half of the two results, which is mirrored
// from the lower one in squares of 16. Only
//   Y <- a Y + Y B
// needs Y by rows: they are made from the pairs in the scratch memory of the thread.
//
// The diagonals of A and B stay float, outside: with A = D + A~, A^2 = A~^2 + D A~ + A~ D + D^2 and
// Y B = Y B~ + Y diag(B). Where singular values are alike, A and B are little else, and bf16 would hold them with
// errors larger than all of A~; it halves the error of X elsewhere. Nor do the products start with an error of rounding
// more than the input had: it is scaled by a power of two, and the first polynomial by the rest.
#include "common/bf16_pairs.h"
#include "common/simd.h"
#include "linalg/bf16_pack.h"
#include "linalg/newton_schulz.h"

#if defined(GRADOPS_LEVEL_v4_bf16)  // the other levels have a tile unit

namespace gradops {
namespace {

constexpr long kChunk = 8;        // groups per pass: 16 KB of the right operand stay in L1
constexpr long kUnit = 64;        // rows of a result computed together
constexpr long kStrip = 64 * 64;  // bytes of kUnit rows of 32 bf16

struct Workspace {
  long l, s;
  bool wide;
  Panels y, y_pairs, a, b;
  float* a_diagonal;
  float *of_exact, *of_rounded;  // see Polynomial
  double* squares;               // sums of squares of 32 rows of the input each
  char* end;

  Workspace(const NewtonSchulzTask& t, char* memory) : wide(t.rows < t.cols) {
    l = ((wide ? t.cols : t.rows) + 31) / 32 * 32, s = ((wide ? t.rows : t.cols) + 31) / 32 * 32;
    y = {memory, l};
    y_pairs = {y.end(s), l / 2};
    a = {y_pairs.end(s), s / 2};
    b = {a.end(s), s / 2};
    a_diagonal = reinterpret_cast<float*>(b.end(s)), of_exact = a_diagonal + s, of_rounded = of_exact + s;
    squares = reinterpret_cast<double*>(of_rounded + s);
    end = reinterpret_cast<char*>(squares + (t.rows + 31) / 32);
  }
  Scale scale(const NewtonSchulzTask& t) const {
    double sum = 0;
    for (long r = 0; r < (t.rows + 31) / 32; ++r) sum += squares[r];
    return Scale(sum, t.normalize);
  }
};

// Memory of the running thread.
struct Scratch {
  float* sums;       // kUnit x 32: between passes; a tile of the input or the result
  char* strip;       // rows of bf16: of 16 rows of a symmetric result, or of kUnit rows of Y
  float* diagonals;  // two copies of the diagonal of A
  char* end;
  Scratch(const Workspace& w, char* memory) {
    sums = reinterpret_cast<float*>(memory);
    strip = memory + kUnit * kRow;
    diagonals = reinterpret_cast<float*>(strip + w.s / 32 * kStrip);
    end = reinterpret_cast<char*>(diagonals + 2 * w.s);
  }
};

// Panels of the first `blocks` blocks of rows that reach the diagonal.
constexpr long lower_panels(long blocks) { return kUnit / 32 * blocks * (blocks + 1) / 2; }

// The symmetric f(m^T m), off its diagonal, in pairs. Units: kUnit rows of a panel, with numbers on or below the
// diagonal. f has
//   operator()(i, j, sums): finishes rows from i on, columns from j on, in place
//   diagonal(i, mask, sums): takes the diagonal: numbers i + lane of 16 from i on
template <class F>
void symmetric(Panels m, Panels out, Scratch scratch, long begin, long end, F f) {
  const long groups = m.rows / kGroup, strips = out.rows / 8;
  for (long unit = begin; unit < end; ++unit) {
    long block = 0;
    while (lower_panels(block + 1) <= unit) ++block;
    const long p = unit - lower_panels(block), top = kUnit / 16 * block;
    for (long g = 0; g < groups; g += kChunk) {
      const bool ends = g + kChunk >= groups;
      const long count = ends ? groups - g : kChunk;
      for (long i = top > 2 * p ? top : 2 * p; i < top + kUnit / 16 && i < strips; ++i) {
        const char* right = m.at(g * kGroup, 32 * p);
        float* kept = scratch.sums + (i - top) * 16 * 32;
        // Rounds, stores and, below the diagonal, keeps rows for the mirror image.
        const auto finish = [&]<int R, int C>(__m512(&sums)[R][C], long row) GRADOPS_INLINE {
          f(16 * i + row, 32 * p, sums);
          if (C == 1 || i == 2 * p + 1) {
            __m512 diagonal = _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
              const __mmask16 here = __mmask16(1u << (row + r));
              diagonal = _mm512_mask_mov_ps(diagonal, here, sums[r][C - 1]);
              sums[r][C - 1] = _mm512_mask_mov_ps(sums[r][C - 1], here, _mm512_setzero_ps());
            }
            f.diagonal(16 * i, __mmask16(((1u << R) - 1) << row), diagonal);
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; r += 2) {
            const __m512i r0 = rounded(sums[r][0], sums[r][C - 1]), r1 = rounded(sums[r + 1][0], sums[r + 1][C - 1]);
            const TwoRows pairs = pairs_of(r0, r1);
            char* to = out.at((16 * i + row + r) / 2, 32 * p);
            store(to, pairs.first);
            if (C == 2) {
              store(to + 64, pairs.second);
              store(scratch.strip + (row + r) * 64, r0);
              store(scratch.strip + (row + r + 1) * 64, r1);
            }
          }
        };
        if (i == 2 * p) {
          tile<ByColumns, 16, 1>(m.at(g * kGroup, 16 * i), kGroup * kRow, right, count, g == 0, ends, kept,
                                 [&](auto& sums) GRADOPS_INLINE { finish(sums, 0); });
          continue;
        }
        for (long row = 0; row < 16; row += 8)
          tile<ByColumns, 8, 2>(m.at(g * kGroup, 16 * i + row), kGroup * kRow, right, count, g == 0, ends,
                                kept + 32 * row, [&](auto& sums) GRADOPS_INLINE { finish(sums, row); });
        if (ends)
          for (long h = 0; h < 2 && 2 * p + h < i; ++h) transpose16<64, kRow>(scratch.strip, out.at(16 * p, 16 * i), h);
      }
    }
  }
}

// A = Y^T Y.
struct Gram {
  float* to;
  template <int R, int C>
  GRADOPS_INLINE void operator()(long, long, __m512 (&)[R][C]) const {}
  GRADOPS_INLINE void diagonal(long i, __mmask16 mask, __m512 sums) const { _mm512_mask_store_ps(to + i, mask, sums); }
};

// B = b A + c A A, and what multiplies Y beside B~: Y = Z + E, where Z is rounded, becomes
//   Z (a I + B) + E W,   W = diagonal of a I + 2 b A + 3 c A A
// W is the mean derivative of the step: with one singular value x, p(x) = a x + b x^3 + c x^5, it is p'(x) for half of
// the directions that E can have, and p(x) / x for the others. E left out (W = 0), small singular values get errors of
// rounding that later steps make large; carried along (W = a I + B), large ones, where A is that of Z.
// Of c times the diagonal of A there is a copy, and one with b added: products would wait for the multiplications, not
// for additions.
struct Polynomial {
  Panels a;
  const float* a_diagonal;
  float *of_exact, *of_rounded;  // W and diag(a I + B) - W: the factors of Y and Z
  const float* columns;          // c D
  const float* rows;             // c D + b
  __m512 lead, b, c;

  Polynomial(const Workspace& w, const Scratch& scratch, float a, float b, float c)
      : a(w.a),
        a_diagonal(w.a_diagonal),
        of_exact(w.of_exact),
        of_rounded(w.of_rounded),
        columns(scratch.diagonals),
        rows(columns + w.s),
        lead(_mm512_set1_ps(a)),
        b(_mm512_set1_ps(b)),
        c(_mm512_set1_ps(c)) {
    for (long i = 0; i < w.s; i += 16) {
      const __m512 column = _mm512_mul_ps(this->c, _mm512_load_ps(a_diagonal + i));
      _mm512_store_ps(scratch.diagonals + i, column);
      _mm512_store_ps(scratch.diagonals + w.s + i, _mm512_add_ps(column, this->b));
    }
  }
  template <int R, int C>
  GRADOPS_INLINE void operator()(long i, long j, __m512 (&sums)[R][C]) const {
    __m512 column[C];
#pragma GCC unroll 2
    for (int k = 0; k < C; ++k) column[k] = _mm512_load_ps(columns + j + 16 * k);
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 2) {
      const __m512 row0 = _mm512_set1_ps(rows[i + r]), row1 = _mm512_set1_ps(rows[i + r + 1]);
#pragma GCC unroll 2
      for (int k = 0; k < C; ++k) {
        const __m512i pairs = load(a.at((i + r) / 2, j + 16 * k));
        const __m512 a0 = _mm512_mul_ps(_mm512_add_ps(row0, column[k]), even_float(pairs));
        const __m512 a1 = _mm512_mul_ps(_mm512_add_ps(row1, column[k]), odd_float(pairs));
        sums[r][k] = _mm512_fmadd_ps(c, sums[r][k], a0);
        sums[r + 1][k] = _mm512_fmadd_ps(c, sums[r + 1][k], a1);
      }
    }
  }
  GRADOPS_INLINE void diagonal(long i, __mmask16 mask, __m512 sums) const {  // sums: of c A~ A~
    const __m512 d = _mm512_load_ps(a_diagonal + i);
    const __m512 own = _mm512_fmadd_ps(_mm512_load_ps(rows + i), d, sums);  // of b A + c A A
    const __m512 less = _mm512_fmsub_ps(b, d, _mm512_add_ps(own, own));
    _mm512_mask_store_ps(of_exact + i, mask, _mm512_sub_ps(_mm512_add_ps(lead, own), less));
    _mm512_mask_store_ps(of_rounded + i, mask, less);
  }
};

struct Two {
  __m512 of[2];
};

// Y = a Y + Y B, as above. Units: kUnit rows. Here and above, structs come by value: what is
// stored could change one behind a reference, and loading it again costs 10 %.
void update(Workspace w, Scratch scratch, long begin, long end) {
  const long groups = w.s / 32;
  for (long unit = begin; unit < end; ++unit) {
    const long first = kUnit * unit, rows = w.l - first < kUnit ? w.l - first : kUnit;
    for (long q = 0; q < groups; ++q)
      for (long r = 0; r < rows; r += 2) {
        const char* from = w.y_pairs.at((first + r) / 2, 32 * q);
        const TwoRows two = rows_of(load(from), load(from + 64));
        store(scratch.strip + q * kStrip + r * 64, two.first);
        store(scratch.strip + q * kStrip + r * 64 + 64, two.second);
      }
    for (long p = 0; p < groups; ++p) {
      const auto two = [=](const float* of) GRADOPS_INLINE {
        return Two{_mm512_load_ps(of + 32 * p), _mm512_load_ps(of + 32 * p + 16)};
      };
      const Two exact = two(w.of_exact), rest = two(w.of_rounded);
      for (long g = 0; g < groups; g += kChunk) {
        const bool ends = g + kChunk >= groups;
        for (long r = 0; r < rows; r += 8) {
          float* y = w.y.floats(first + r, 32 * p);
          char* pairs = w.y_pairs.at((first + r) / 2, 32 * p);
          if (ends && groups >= kChunk)  // from beyond the second cache
            for (long line = 0; line < 16; ++line) _mm_prefetch(y + 16 * line, _MM_HINT_T0);
          const auto finish = [=](__m512(&sums)[8][2]) GRADOPS_INLINE {
#pragma GCC unroll 4
            for (int k = 0; k < 8; k += 2) {
#pragma GCC unroll 2
              for (int c = 0; c < 2; ++c) {
                const __m512i before = load(pairs + k * kRow / 2 + 64 * c);
                const auto row = [&](int i, __m512 z) GRADOPS_INLINE {
                  float* at = y + 32 * i + 16 * c;
                  sums[i][c] = _mm512_fmadd_ps(rest.of[c], z, sums[i][c]);
                  sums[i][c] = _mm512_fmadd_ps(exact.of[c], _mm512_load_ps(at), sums[i][c]);
                  _mm512_store_ps(at, sums[i][c]);
                };
                row(k, even_float(before)), row(k + 1, odd_float(before));
              }
              const TwoRows now = pairs_of(rounded(sums[k][0], sums[k][1]), rounded(sums[k + 1][0], sums[k + 1][1]));
              store(pairs + k * kRow / 2, now.first);
              store(pairs + k * kRow / 2 + 64, now.second);
            }
          };
          tile<ByRows, 8, 2>(scratch.strip + g * kStrip + r * 64, kStrip, w.b.at(g * kGroup, 32 * p),
                             ends ? groups - g : kChunk, g == 0, ends, scratch.sums + 32 * r, finish);
        }
      }
    }
  }
}

// Tiles of 32 x 32 floats, rows kRow bytes apart.
inline void transpose_tile(const float* from, float* to) {
  for (long i = 0; i < 32; i += 16)
    for (long j = 0; j < 32; j += 16)
      for (long h = 0; h < 2; ++h)
        transpose16<kRow, kRow>(reinterpret_cast<const char*>(from + 32 * i + j),
                                reinterpret_cast<char*>(to + 32 * j + i), h);
}

// 32 consecutive elements; those at and after `count` are zero.
template <Element E>
inline void load_halves(const char* p, long count, __m512& low, __m512& high) {
  const uint32_t m = first(count);
  if constexpr (E == Element::bf16) {
    const auto wide = [](__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); };
    low = wide(_mm256_maskz_loadu_epi16(__mmask16(m), p));
    high = wide(_mm256_maskz_loadu_epi16(__mmask16(m >> 16), p + 32));
  } else {
    load_even_odd<E>(p, count, low, high);
  }
}

// Units: tiles of the input.
template <Element E>
void pack(const NewtonSchulzTask& t, const Workspace& w, const Scratch& s, long begin, long end) {
  const Matrix x{const_cast<char*>(static_cast<const char*>(t.in)), t.rows, t.cols};
  Scale scale = w.scale(t);
  if (t.steps->steps == 0) scale.second = _mm512_mul_ps(scale.second, _mm512_set1_ps(float(scale.rest)));
  for (long unit = begin; unit < end; ++unit) {
    const long i = unit / x.col_tiles() * 32, j = unit % x.col_tiles() * 32;
    float* y = w.wide ? w.y.floats(j, i) : w.y.floats(i, j);
    float* to = w.wide ? s.sums : y;
    for (long r = 0; r < 32; ++r) {
      __m512 low = _mm512_setzero_ps(), high = low;
      if (i + r < x.rows) load_halves<E>(x.at<E>(i + r, j), x.cols - j, low, high);
      _mm512_store_ps(to + 32 * r, scale(low)), _mm512_store_ps(to + 32 * r + 16, scale(high));
    }
    if (w.wide) transpose_tile(to, y);
    char* pairs = w.wide ? w.y_pairs.at(j / 2, i) : w.y_pairs.at(i / 2, j);
    for (long r = 0; r < 32; r += 2, y += 64, pairs += kRow) {
      const auto row = [=](long at) { return rounded(_mm512_load_ps(y + at), _mm512_load_ps(y + at + 16)); };
      const TwoRows two = pairs_of(row(0), row(32));
      store(pairs, two.first), store(pairs + 64, two.second);
    }
  }
}

template <Element E>
void unpack(const NewtonSchulzTask& t, const Workspace& w, const Scratch& s, long begin, long end) {
  const Matrix x{static_cast<char*>(t.out), t.rows, t.cols};
  for (long unit = begin; unit < end; ++unit) {
    const long i = unit / x.col_tiles() * 32, j = unit % x.col_tiles() * 32;
    const float* from = w.wide ? s.sums : w.y.floats(i, j);
    if (w.wide) transpose_tile(w.y.floats(j, i), s.sums);
    const uint32_t m = first(x.cols - j);
    for (long r = 0; r < 32 && i + r < x.rows; ++r) {
      const __m512 low = _mm512_load_ps(from + 32 * r), high = _mm512_load_ps(from + 32 * r + 16);
      char* at = x.at<E>(i + r, j);
      if constexpr (E == Element::bf16) {
        _mm512_mask_storeu_epi16(at, m, rounded(low, high));
      } else {
        _mm512_mask_storeu_ps(at, __mmask16(m), low);
        _mm512_mask_storeu_ps(at + 64, __mmask16(m >> 16), high);
      }
    }
  }
}

// Phases: norm, pack, three per step, unpack.
constexpr int kNorm = 0, kPack = 1, kSteps = 2;
int phases(const NewtonSchulzTask& t) { return kSteps + 3 * t.steps->steps + 1; }

int64_t units(const NewtonSchulzTask& t, const Workspace& w, int phase) {
  if (phase == kNorm) return (t.rows + 31) / 32;
  if (phase == kPack || phase == phases(t) - 1) return w.l / 32 * (w.s / 32);
  if ((phase - kSteps) % 3 == 2) return (w.l + kUnit - 1) / kUnit;
  const long blocks = w.s / kUnit, rest = w.s % kUnit / 32;  // of the last block, panels on the diagonal
  return lower_panels(blocks) + (rest ? blocks * (kUnit / 32) + rest : 0);
}

void run_step(const NewtonSchulzTask& t, const Workspace& w, const Scratch& s, int phase, long begin, long end) {
  switch ((phase - kSteps) % 3) {
    case 0:
      return symmetric(w.y_pairs, w.a, s, begin, end, Gram{w.a_diagonal});
    case 1: {
      const int step = (phase - kSteps) / 3;
      const double scale = step == 0 ? w.scale(t).rest : 1, square = scale * scale;
      const float a = float(t.steps->a[step] * scale), b = float(t.steps->b[step] * (scale * square)),
                  c = float(t.steps->c[step] * (scale * square * square));
      return symmetric(w.a, w.b, s, begin, end, Polynomial(w, s, a, b, c));
    }
    default:
      return update(w, s, begin, end);
  }
}

template <Element E>
void run_outside_steps(const NewtonSchulzTask& t, const Workspace& w, const Scratch& s, int phase, long begin,
                       long end) {
  if (phase == kNorm) {
    const Matrix x{const_cast<char*>(static_cast<const char*>(t.in)), t.rows, t.cols};
    for (long r = begin; r < end; ++r) w.squares[r] = sum_of_squares<2, E>(x, 32 * r);
  } else if (phase == kPack) {
    pack<E>(t, w, s, begin, end);
  } else {
    unpack<E>(t, w, s, begin, end);
  }
}

template <Element E>
struct Engine {
  static int64_t workspace_bytes(const NewtonSchulzTask& t) { return Workspace(t, nullptr).end - (char*)nullptr; }
  static int64_t scratch_bytes(const NewtonSchulzTask& t) {
    return Scratch(Workspace(t, nullptr), nullptr).end - (char*)nullptr;
  }
  static int64_t units_of(const NewtonSchulzTask& t, int phase) { return units(t, Workspace(t, nullptr), phase); }
  static void run(const NewtonSchulzTask& t, char* workspace, char* scratch, int phase, int64_t begin, int64_t end) {
    const Workspace w(t, workspace);
    const Scratch s(w, scratch);
    if (phase < kSteps || phase == phases(t) - 1) return run_outside_steps<E>(t, w, s, phase, begin, end);
    flushing_denormals([&] { run_step(t, w, s, phase, begin, end); });
  }
  static void run_all(const NewtonSchulzTask& t, char* workspace, char* scratch) {
    const Workspace w(t, workspace);
    const Scratch s(w, scratch);
    const int last = phases(t) - 1;
    for (int phase = kNorm; phase < kSteps; ++phase) run_outside_steps<E>(t, w, s, phase, 0, units(t, w, phase));
    flushing_denormals([&] {
      for (int phase = kSteps; phase < last; ++phase) run_step(t, w, s, phase, 0, units(t, w, phase));
    });
    run_outside_steps<E>(t, w, s, last, 0, units(t, w, last));
  }
  static constexpr NewtonSchulzEngine engine{workspace_bytes, phases, units_of, run, scratch_bytes, run_all};
};

}  // namespace

const NewtonSchulzEngine& GRADOPS_ISA::newton_schulz_pairs(Element element) {
  return element == Element::bf16 ? Engine<Element::bf16>::engine : Engine<Element::f32>::engine;
}

}  // namespace gradops
#endif
