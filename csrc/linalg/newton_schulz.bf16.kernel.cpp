// Newton-Schulz with products of bf16: X, A and B are kept as blocks of 32 x 32 (bf16_blocks.h), as
// N = 1 bf16 number per entry or as the sum of N = 2, and sums are float. The short side of the
// matrix is the Gram side.
//
// X is kept in R form only, in place; the V form of X^T (for the Gram matrix) and of X (for the
// update) are made panel by panel, in the scratch memory of the thread. The symmetric A is kept in
// both forms, B in R form; only their blocks on and below the diagonal are computed, the others are
// mirrored. The conversions of a finished block run during the products of the next one.
//
// The diagonals of A and B stay float, outside their blocks: with A = D + A~, A^2 = A~^2 + D A~ + A~ D + D^2 and
// B X = B~ X + diag(B) X. Where singular values are alike, A and B are little else, and bf16 would hold them with
// errors larger than all of A~; it halves the error of X elsewhere. Nor does X start with an error of rounding more
// than its numbers had: it is scaled by a power of two, and the first polynomial by the rest. With N = 1, X is kept in
// float as well, and what it loses as an operand is made up for as in newton_schulz_pairs.bf16.kernel.cpp, which takes
// the place of N = 1 where there is no tile unit.
#include "linalg/newton_schulz.h"

#include "common/bf16_multiply.h"
#include "linalg/bf16_pack.h"

namespace gradops {
namespace {

bool is_tall(const NewtonSchulzTask& t) { return t.rows > t.cols; }

template <int N>
struct Workspace {
  static constexpr long kBlock = N * kPart;
  long S, L;          // blocks along the short and along the long side
  char* x;            // S x L blocks, R form
  char* a_r;          // S x S, R form
  char* a_v;          // S x S, V form, column-major
  char* b;            // S x S, R form
  float* a_diagonal;  // of every block, even places, then odd ones
  float* b_diagonal;  // the same of a I + B; with N = 1, what of it goes with X in float
  float* b_rest;      // and with X as it is in blocks
  float* x_float;     // S x L blocks
  double* squares;    // sums of squares of 32 rows of the input each

  Workspace(const NewtonSchulzTask& t, char* memory) {
    const long R = (t.rows + 31) / 32, C = (t.cols + 31) / 32;
    S = is_tall(t) ? C : R, L = is_tall(t) ? R : C;
    x = memory;
    a_r = x + S * L * kBlock;
    a_v = a_r + S * S * kBlock;
    b = a_v + S * S * kBlock;
    a_diagonal = reinterpret_cast<float*>(b + S * S * kBlock), b_diagonal = a_diagonal + 32 * S;
    b_rest = b_diagonal + 32 * S, x_float = b_rest + 32 * S;
    squares = reinterpret_cast<double*>(x_float + (N == 1 ? S * L * 1024 : 0));
    end = reinterpret_cast<char*>(squares + R);
  }
  char* end;
  char* x_at(long i, long j) const { return x + (i * L + j) * kBlock; }
  char* a_r_at(long i, long j) const { return a_r + (i * S + j) * kBlock; }
  char* a_v_at(long i, long j) const { return a_v + (j * S + i) * kBlock; }
  float* x_float_at(long i, long j) const { return x_float + (i * L + j) * 1024; }
  char* b_at(long i, long j) const { return b + (i * S + j) * kBlock; }

  Scale scale(const NewtonSchulzTask& t) const {
    double sum = 0;
    for (long r = 0; r < (t.rows + 31) / 32; ++r) sum += squares[r];
    return Scale(sum, t.normalize);
  }

  // Panels per group: a row of left blocks is read once per group. One while everything fits in L2.
  long group() const { return kBlock * (S * L + 3 * S * S) > (2 << 20) ? kPanelsBeyondL2 : 1; }
};

// Memory of the running thread.
template <int N>
struct Scratch {
  float* sums[2];  // a block as float: the finished one and the next one
  char* tmp;       // 2 blocks
  char* panels;    // a group of panels of L blocks
  char* end;
  Scratch(const Workspace<N>& w, char* memory) {
    sums[0] = reinterpret_cast<float*>(memory), sums[1] = sums[0] + 32 * 32;
    tmp = memory + 2 * 32 * 32 * sizeof(float);
    panels = tmp + 2 * w.kBlock;
    end = panels + w.group() * w.L * w.kBlock;
  }
};

// Calls f(i, j) for units begin .. end - 1 of the blocks on and below the diagonal of an S x S
// matrix: groups of G columns, in each group row by row.
template <class F>
inline void lower_blocks(long S, long G, long begin, long end, F f) {
  long unit = 0;
  for (long j0 = 0; j0 < S; j0 += G)
    for (long i = j0; i < S; ++i)
      for (long j = j0; j < j0 + G && j <= i; ++j, ++unit)
        if (unit >= begin && unit < end) f(i, j);
}

// Of the even numbers of row 2 u of a block and the odd ones of row 2 u + 1, those that are not on a diagonal.
inline __mmask16 off_diagonal(const float* diagonal, long u) { return __mmask16(diagonal ? ~(1u << u) : ~0u); }

// The three products of a step. An epilogue is a lambda that holds its pointers by value: reloading
// them after each store would cost 15 %.

// A = X X^T, in both forms. Units: blocks on and below the diagonal.
template <int N>
void gram(const Workspace<N>& w, const Scratch<N>& s, long begin, long end) {
  const long L = w.L, G = w.group();
  long now = 0, units = 0, pi = 0, pj = 0, ready = -1;
  const auto epilogue = [=](long i, long j, const float* sums) GRADOPS_INLINE {
    char *r = w.a_r_at(i, j), *v = w.a_v_at(i, j), *r_mirror = w.a_r_at(j, i), *v_mirror = w.a_v_at(j, i);
    float* diagonal = i == j ? w.a_diagonal + 32 * i : nullptr;
    return [=](long u) GRADOPS_INLINE {
      if (u < kPairs) {
        const float* at = sums + 64 * u;
        if (diagonal) diagonal[u] = at[u], diagonal[16 + u] = at[48 + u];
        const __mmask16 off = off_diagonal(diagonal, u);
        const Row<N> r0 = to_row<N>(_mm512_maskz_load_ps(off, at), _mm512_load_ps(at + 16));
        const Row<N> r1 = to_row<N>(_mm512_load_ps(at + 32), _mm512_maskz_load_ps(off, at + 48));
        store_row(r + 128 * u, r0);
        store_row(r + 128 * u + 64, r1);
        rows_to_vnni<N>(r0, r1, v, u);
      } else if (u < kPairs + kQuarters<N>) {
        vnni_to_rows_of_transpose(v, r_mirror, u - kPairs);
      } else {
        rows_to_vnni_of_transpose(r, v_mirror, u - kPairs - kQuarters<N>);
      }
    };
  };
  unsigned packed = 0;  // which panels of group `ready`
  lower_blocks(w.S, G, begin, end, [&](long i, long j) GRADOPS_INLINE {
    if (j / G != ready) ready = j / G, packed = 0;
    char* panel = s.panels + j % G * L * w.kBlock;
    if (!(packed >> j % G & 1)) {
      packed |= 1u << j % G;
      for (long p = 0; p < L; ++p)
        for (long u = 0; u < kQuarters<N>; ++u) rows_to_vnni_of_transpose(w.x_at(j, p), panel + p * w.kBlock, u);
    }
    multiply<N>(w.x_at(i, 0), panel, L, s.sums[now], units, epilogue(pi, pj, s.sums[1 - now]));
    pi = i, pj = j, now = 1 - now;
    units = i == j ? kPairs : kPairs + 2 * kQuarters<N>;
  });
  const auto last = epilogue(pi, pj, s.sums[1 - now]);
  for (long u = 0; u < units; ++u) last(u);
}

// B = b A + c A A, in R form, and the diagonal of lead I + B. Units as above.
template <int N>
void polynomial(const Workspace<N>& w, const Scratch<N>& s, float lead, float b, float c, long begin, long end) {
  const __m512 vc = _mm512_set1_ps(c);
  long now = 0, units = 0, pi = 0, pj = 0;
  const auto epilogue = [=, v = s.tmp](long i, long j, const float* sums) GRADOPS_INLINE {
    const char* a = w.a_r_at(i, j);
    char *r = w.b_at(i, j), *r_mirror = w.b_at(j, i);
    const float *rows = w.a_diagonal + 32 * i, *columns = w.a_diagonal + 32 * j;
    float *diagonal = i == j ? w.b_diagonal + 32 * i : nullptr, *rest = w.b_rest + 32 * i;
    return [=](long u) GRADOPS_INLINE {
      const auto row = [=](const char* at, const float* aa, float d, __mmask16 even, __mmask16 odd) GRADOPS_INLINE {
        const Row<N> x = load_row<N>(at);
        const __m512 own = _mm512_set1_ps(b + c * d);
        const __m512 e = _mm512_fmadd_ps(vc, _mm512_load_ps(columns), own);
        const __m512 o = _mm512_fmadd_ps(vc, _mm512_load_ps(columns + 16), own);
        return to_row<N>(_mm512_fmadd_ps(vc, _mm512_maskz_load_ps(even, aa), _mm512_mul_ps(e, even_float(x))),
                         _mm512_fmadd_ps(vc, _mm512_maskz_load_ps(odd, aa + 16), _mm512_mul_ps(o, odd_float(x))));
      };
      if (u < kPairs) {
        const float *aa = sums + 64 * u, d0 = rows[u], d1 = rows[16 + u];
        const __mmask16 off = off_diagonal(diagonal, u), all = __mmask16(~0u);
        if (diagonal) {
          const auto set = [=](long at, float aa, float d) GRADOPS_INLINE {
            const float own = c * aa + (b + c * d) * d;
            diagonal[at] = lead + own;
            if (N == 1) rest[at] = b * d - 2 * own, diagonal[at] -= rest[at];
          };
          set(u, aa[u], d0), set(16 + u, aa[48 + u], d1);
        }
        const Row<N> r0 = row(a + 128 * u, aa, d0, off, all), r1 = row(a + 128 * u + 64, aa + 32, d1, all, off);
        store_row(r + 128 * u, r0);
        store_row(r + 128 * u + 64, r1);
        rows_to_vnni<N>(r0, r1, v, u);
      } else {
        vnni_to_rows_of_transpose(v, r_mirror, u - kPairs);
      }
    };
  };
  lower_blocks(w.S, w.group(), begin, end, [&](long i, long j) GRADOPS_INLINE {
    multiply<N>(w.a_r_at(i, 0), w.a_v_at(0, j), w.S, s.sums[now], units, epilogue(pi, pj, s.sums[1 - now]));
    pi = i, pj = j, now = 1 - now;
    units = i == j ? kPairs : kPairs + kQuarters<N>;
  });
  const auto last = epilogue(pi, pj, s.sums[1 - now]);
  for (long u = 0; u < units; ++u) last(u);
}

// X = a X + B X, in place, where the diagonal of B has a. Units: columns of blocks.
template <int N>
void update(const Workspace<N>& w, const Scratch<N>& s, long begin, long end) {
  const long S = w.S, G = w.group();
  long now = 0, units = 0;
  long bi = 0, bj = 0;
  const auto epilogue = [=](long i, long j, const float* sums) GRADOPS_INLINE {
    char* x = w.x_at(i, j);
    float* y = w.x_float_at(i, j);
    const float *diagonal = w.b_diagonal + 32 * i, *rest = w.b_rest + 32 * i;
    return [=](long u) GRADOPS_INLINE {
      const auto row = [=](long r, long at) GRADOPS_INLINE {
        const Row<N> v = load_row<N>(x + 64 * r);
        const __m512 own = _mm512_set1_ps(diagonal[at]);
        __m512 even = _mm512_load_ps(sums + 32 * r), odd = _mm512_load_ps(sums + 32 * r + 16);
        if constexpr (N == 1) {
          const __m512 less = _mm512_set1_ps(rest[at]);
          even = _mm512_fmadd_ps(less, even_float(v), even), odd = _mm512_fmadd_ps(less, odd_float(v), odd);
          even = _mm512_fmadd_ps(own, _mm512_load_ps(y + 32 * r), even);
          odd = _mm512_fmadd_ps(own, _mm512_load_ps(y + 32 * r + 16), odd);
          _mm512_store_ps(y + 32 * r, even), _mm512_store_ps(y + 32 * r + 16, odd);
        } else {
          even = _mm512_fmadd_ps(own, even_float(v), even), odd = _mm512_fmadd_ps(own, odd_float(v), odd);
        }
        store_row(x + 64 * r, to_row<N>(even, odd));
      };
      row(2 * u, u), row(2 * u + 1, 16 + u);
    };
  };
  for (long q0 = begin; q0 < end; q0 += G) {
    const long q1 = q0 + G < end ? q0 + G : end;
    const auto panel = [=](long q) GRADOPS_INLINE { return s.panels + (q - q0) * S * w.kBlock; };
    for (long p = 0; p < S; ++p)
      for (long q = q0; q < q1; ++q)
        for (long u = 0; u < kPairs; ++u) rows_to_vnni<N>(w.x_at(p, q), panel(q) + p * w.kBlock, u);
    for (long i = 0; i < S; ++i)
      for (long q = q0; q < q1; ++q) {
        multiply<N>(w.b_at(i, 0), panel(q), S, s.sums[now], units, epilogue(bi, bj, s.sums[1 - now]));
        bi = i, bj = q, units = kPairs, now = 1 - now;
      }
  }
  const auto last = epilogue(bi, bj, s.sums[1 - now]);
  for (long u = 0; u < units; ++u) last(u);
}

// Phases: norm, pack, three per step, unpack.
constexpr int kNorm = 0, kPack = 1, kSteps = 2;
int phases(const NewtonSchulzTask& t) { return kSteps + 3 * t.steps->steps + 1; }

int64_t units(const NewtonSchulzTask& t, int phase) {
  const long R = (t.rows + 31) / 32, C = (t.cols + 31) / 32, S = R < C ? R : C, L = R < C ? C : R;
  if (phase == kNorm) return R;
  if (phase == kPack || phase == phases(t) - 1) return R * C;
  return (phase - kSteps) % 3 == 2 ? L : S * (S + 1) / 2;
}

// During the steps denormals are zero: the products take them so anyway, and in the conversions each
// would cost a microcode assist (10 times slower). Not while packing: tiny inputs count there.
unsigned enter_steps() {
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlushToZero | kDenormalsAreZero);
  tile_configure();
  return before;
}
void leave_steps(unsigned before) {
  tile_release();
  _mm_setcsr(before);
}

template <int N>
void run_step(const NewtonSchulzTask& t, char* workspace, char* scratch, int phase, long begin, long end) {
  const Workspace<N> w(t, workspace);
  const Scratch<N> s(w, scratch);
  const int step = (phase - kSteps) / 3;
  const double scale = step == 0 ? w.scale(t).rest : 1, square = scale * scale;
  const float a = float(t.steps->a[step] * scale), b = float(t.steps->b[step] * (scale * square)),
              c = float(t.steps->c[step] * (scale * square * square));
  switch ((phase - kSteps) % 3) {
    case 0:
      return gram(w, s, begin, end);
    case 1:
      return polynomial(w, s, a, b, c, begin, end);
    default:
      return update(w, s, begin, end);
  }
}

template <int N, Element E>
void pack(const NewtonSchulzTask& t, const Workspace<N>& w, const Scratch<N>& s, long begin, long end) {
  const Matrix x{const_cast<char*>(static_cast<const char*>(t.in)), t.rows, t.cols};
  Scale scale = w.scale(t);
  if (t.steps->steps == 0) scale.second = _mm512_mul_ps(scale.second, _mm512_set1_ps(float(scale.rest)));
  for (long unit = begin; unit < end; ++unit) {
    const long i = unit / x.col_tiles(), p = unit % x.col_tiles();
    if (is_tall(t)) {
      pack_tile<N, E>(x, i, p, scale, s.tmp);
      transpose_block<N>(s.tmp, s.tmp + w.kBlock, w.x_at(p, i));
    } else {
      pack_tile<N, E>(x, i, p, scale, w.x_at(i, p));
    }
    const char* from = is_tall(t) ? w.x_at(p, i) : w.x_at(i, p);
    float* to = is_tall(t) ? w.x_float_at(p, i) : w.x_float_at(i, p);
    for (long r = 0; N == 1 && r < 32; ++r) {
      const Row<N> v = load_row<N>(from + 64 * r);
      _mm512_store_ps(to + 32 * r, even_float(v)), _mm512_store_ps(to + 32 * r + 16, odd_float(v));
    }
  }
}

template <int N, Element E>
void unpack(const NewtonSchulzTask& t, const Workspace<N>& w, const Scratch<N>& s, long begin, long end) {
  const Matrix y{static_cast<char*>(t.out), t.rows, t.cols};
  for (long unit = begin; unit < end; ++unit) {
    const long i = unit / y.col_tiles(), p = unit % y.col_tiles();
    if (is_tall(t)) {
      transpose_block<N>(w.x_at(p, i), s.tmp + w.kBlock, s.tmp);
      unpack_tile<N, E>(s.tmp, y, i, p);
    } else {
      unpack_tile<N, E>(w.x_at(i, p), y, i, p);
    }
  }
}

template <int N, Element E>
void run_outside_steps(const NewtonSchulzTask& t, char* workspace, char* scratch, int phase, long begin, long end) {
  const Workspace<N> w(t, workspace);
  const Scratch<N> s(w, scratch);
  if (phase == kNorm) {
    const Matrix x{const_cast<char*>(static_cast<const char*>(t.in)), t.rows, t.cols};
    for (long r = begin; r < end; ++r) w.squares[r] = sum_of_squares<N, E>(x, 32 * r);
  } else if (phase == kPack) {
    pack<N, E>(t, w, s, begin, end);
  } else {
    unpack<N, E>(t, w, s, begin, end);
  }
}

template <int N, Element E>
struct Engine {
  static int64_t workspace_bytes(const NewtonSchulzTask& t) { return Workspace<N>(t, nullptr).end - (char*)nullptr; }
  static int64_t scratch_bytes(const NewtonSchulzTask& t) {
    return Scratch<N>(Workspace<N>(t, nullptr), nullptr).end - (char*)nullptr;
  }
  static void run(const NewtonSchulzTask& t, char* workspace, char* scratch, int phase, int64_t begin, int64_t end) {
    if (phase < kSteps || phase == phases(t) - 1)
      return run_outside_steps<N, E>(t, workspace, scratch, phase, begin, end);
    const unsigned before = enter_steps();
    run_step<N>(t, workspace, scratch, phase, begin, end);
    leave_steps(before);
  }
  static void run_all(const NewtonSchulzTask& t, char* workspace, char* scratch) {
    const int last = phases(t) - 1;
    for (int phase = kNorm; phase < kSteps; ++phase)
      run_outside_steps<N, E>(t, workspace, scratch, phase, 0, units(t, phase));
    const unsigned before = enter_steps();
    for (int phase = kSteps; phase < last; ++phase) run_step<N>(t, workspace, scratch, phase, 0, units(t, phase));
    leave_steps(before);
    run_outside_steps<N, E>(t, workspace, scratch, last, 0, units(t, last));
  }
  static constexpr NewtonSchulzEngine engine{workspace_bytes, phases, units, run, scratch_bytes, run_all};
};

}  // namespace

const NewtonSchulzEngine& GRADOPS_ISA::newton_schulz_bf16(Element element, int parts) {
#if defined(GRADOPS_LEVEL_v4_bf16)
  if (parts == 1) return newton_schulz_pairs(element);
#else
  if (parts == 1) return element == Element::bf16 ? Engine<1, Element::bf16>::engine : Engine<1, Element::f32>::engine;
#endif
  return element == Element::bf16 ? Engine<2, Element::bf16>::engine : Engine<2, Element::f32>::engine;
}

}  // namespace gradops
