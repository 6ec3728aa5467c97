// The full-precision engine: iterates in float, or in double for f64 input.
//
// Y = X^T (so Y is the matrix itself if it is tall) has l rows and s <= l columns, and is stored in
// panels (linalg/simd_gemm.h). One step is
//   A = Y^T Y,   B = b A + c A A,   Y <- a Y + Y B
// A and B are symmetric: blocks on and below the diagonal are computed and mirrored.
// Phases: sums of squares, packing, three per step, unpacking.
#include "linalg/newton_schulz.h"

#include "common/widen.h"
#include "linalg/simd_gemm.h"

namespace gradops {
namespace {

constexpr int64_t kNormChunk = 16384;  // elements
constexpr int64_t kRowChunk = 64;      // rows of Y
constexpr int64_t chunks(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr double kInfinity = __builtin_inf();

// Sums of squares as they are, scaled down and scaled up: one of them neither overflows nor underflows.
struct Squares {
  static constexpr double kDown = 0x1p-600, kUp = 0x1p600;
  double plain = 0, down = 0, up = 0;
};

template <class T>
struct Arrays {
  int64_t l, s;
  bool wide;
  Panels<T> y, a, b;
  Squares* squares;
  int64_t bytes;

  Arrays(const NewtonSchulzTask& t, char* workspace)
      : l(t.rows > t.cols ? t.rows : t.cols), s(t.rows > t.cols ? t.cols : t.rows), wide(t.rows < t.cols) {
    T* memory = reinterpret_cast<T*>(workspace);
    y = {memory, l, s};
    a = {y.data + y.size(), s, s};
    b = {a.data + a.size(), s, s};
    squares = reinterpret_cast<Squares*>(b.data + b.size());
    bytes =
        (2 * a.size() + y.size()) * int64_t(sizeof(T)) + chunks(t.rows * t.cols, kNormChunk) * int64_t(sizeof(Squares));
  }
};

// f(pointer of the stored type)
template <class T, class F>
void with_stored_type(const NewtonSchulzTask& t, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<const double*>(t.in));
  } else if (t.element == Element::f32) {
    f(static_cast<const float*>(t.in));
  } else if (t.element == Element::bf16) {
    f(static_cast<const Bf16*>(t.in));
  } else {
    f(static_cast<const F16*>(t.in));
  }
}

template <class In>
Squares sum_squares(const In* in, int64_t count) {
  Squares s;
  double plain = 0, down = 0, up = 0;
  if constexpr (sizeof(In) == 8) {
#pragma omp simd reduction(+ : plain, down, up)
    for (int64_t i = 0; i < count; ++i) {
      const double x = in[i], lower = x * s.kDown, higher = x * s.kUp;
      plain += x * x;
      down += lower * lower;
      up += higher * higher;
    }
  } else {  // double holds the square of every float
#pragma omp simd reduction(+ : plain)
    for (int64_t i = 0; i < count; ++i) plain += double(widen(in[i])) * double(widen(in[i]));
    down = up = plain;
  }
  s.plain = plain, s.down = down, s.up = up;
  return s;
}

// Elements are multiplied by `power`, then by `factor`.
struct Scale {
  double power, factor;
};
Scale scale_of(const NewtonSchulzTask& t, const Squares* squares) {
  Squares all;
  for (int64_t i = 0; i < chunks(t.rows * t.cols, kNormChunk); ++i) {
    all.plain += squares[i].plain;
    all.down += squares[i].down;
    all.up += squares[i].up;
  }
  if (!(all.down < kInfinity)) return {1, __builtin_nan("")};
  if (!t.normalize || all.up == 0) return {1, 1};
  if (all.plain > 0x1p1000) return {Squares::kDown, 1 / __builtin_sqrt(all.down)};
  if (all.plain < 0x1p-800) return {Squares::kUp, 1 / __builtin_sqrt(all.up)};
  return {1, 1 / __builtin_sqrt(all.plain)};
}

template <class In, class T>
[[gnu::always_inline]] inline void scale_run(const In* in, T* out, int64_t count, Scale scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = T(double(widen(in[i])) * scale.power * scale.factor);
}

template <class T, class In>
void pack(const Arrays<T>& m, const In* in, Scale scale, int64_t first, int64_t last) {
  constexpr int W = kLanes<T>, P = kPanel<T>;
  alignas(kVectorBytes) T block[W * W];
  Vec<T> row[W];
  if (!m.wide) {
    for (int64_t j = 0; j < m.s; j += P) {
      const int64_t count = m.s - j < P ? m.s - j : P, padded = (count + W - 1) / W * W;
      T* to = m.y.at(first, j);
      for (int64_t i = first; i < last; ++i, to += P) {
        if (count == P) {
          scale_run(in + i * m.s + j, to, P, scale);
        } else {
          scale_run(in + i * m.s + j, to, count, scale);
          for (int64_t c = count; c < padded; ++c) to[c] = 0;
        }
      }
    }
    return;
  }
  for (int64_t j = 0; j < m.s; j += W)
    for (int64_t i = first; i < last; i += W) {
      const int64_t count = last - i < W ? last - i : W;
      for (int r = 0; r < W; ++r) {
        if (j + r < m.s && count == W) {
          scale_run(in + (j + r) * m.l + i, block + r * W, W, scale);
        } else {
          for (int c = 0; c < W; ++c) block[r * W + c] = 0;
          if (j + r < m.s) scale_run(in + (j + r) * m.l + i, block + r * W, count, scale);
        }
      }
      for (int r = 0; r < W; ++r) row[r] = vec_at(block + r * W);
      transpose<T>(row);
      for (int64_t r = 0; r < count; ++r) vec_at(m.y.at(i + r, j)) = row[r];
    }
}

template <class T, class Out>
[[gnu::always_inline]] inline void narrow_run(const T* in, Out* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(in[i], out[i]);
}

template <class T, class Out>
void unpack(const Arrays<T>& m, Out* out, int64_t first, int64_t last) {
  constexpr int W = kLanes<T>, P = kPanel<T>;
  alignas(kVectorBytes) T block[W * W];
  Vec<T> row[W];
  if (!m.wide) {
    for (int64_t j = 0; j < m.s; j += P) {
      const T* from = m.y.at(first, j);
      for (int64_t i = first; i < last; ++i, from += P) {
        if (m.s - j >= P)
          narrow_run(from, out + i * m.s + j, P);
        else
          narrow_run(from, out + i * m.s + j, m.s - j);
      }
    }
    return;
  }
  for (int64_t j = 0; j < m.s; j += W)
    for (int64_t i = first; i < last; i += W) {
      const int64_t count = last - i < W ? last - i : W;
      for (int64_t r = 0; r < W; ++r) row[r] = r < count ? vec_at(m.y.at(i + r, j)) : Vec<T>{};
      transpose<T>(row);
      for (int r = 0; r < W; ++r) vec_at(block + r * W) = row[r];
      for (int r = 0; r < W && j + r < m.s; ++r) {
        if (count == W)
          narrow_run(block + r * W, out + (j + r) * m.l + i, W);
        else
          narrow_run(block + r * W, out + (j + r) * m.l + i, count);
      }
    }
}

template <class T>
struct Engine {
  enum Kind { norm, packing, gram, square, update, unpacking };
  static Kind kind(const NewtonSchulzTask& t, int phase) {
    return phase < 2 ? Kind(phase) : phase == phases(t) - 1 ? unpacking : Kind(gram + (phase - 2) % 3);
  }
  static double c(const NewtonSchulzTask& t, int phase) { return t.steps->c[(phase - 2) / 3]; }

  static int phases(const NewtonSchulzTask& t) { return 2 + 3 * t.steps->steps + 1; }
  static int64_t units(const NewtonSchulzTask& t, int phase) {
    const Arrays<T> m(t, nullptr);
    const int64_t triangle = m.a.blocks() * (m.a.blocks() + 1) / 2;
    switch (kind(t, phase)) {
      case norm:
        return chunks(t.rows * t.cols, kNormChunk);
      case gram:
        return triangle;
      case square:
        return c(t, phase) == 0 ? 0 : triangle;  // B = b A is left to the update
      default:
        return chunks(m.l, kRowChunk);
    }
  }
  static int64_t workspace_bytes(const NewtonSchulzTask& t) { return Arrays<T>(t, nullptr).bytes; }
  static int64_t scratch_bytes(const NewtonSchulzTask& t) {
    return Panels<T>{nullptr, kRowChunk, Arrays<T>(t, nullptr).s}.size() * int64_t(sizeof(T));
  }

  static void run(const NewtonSchulzTask& t, char* workspace, char* scratch, int phase, int64_t begin, int64_t end) {
    const Arrays<T> m(t, workspace);
    const Kind what = kind(t, phase);
    const int64_t first = begin * kRowChunk, last = end * kRowChunk < m.l ? end * kRowChunk : m.l;
    if (what == norm) {
      with_stored_type<T>(t, [&](auto* in) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t from = unit * kNormChunk, rest = t.rows * t.cols - from;
          m.squares[unit] = sum_squares(in + from, rest < kNormChunk ? rest : kNormChunk);
        }
      });
    } else if (what == packing) {
      with_stored_type<T>(t, [&](auto* in) { pack(m, in, scale_of(t, m.squares), first, last); });
    } else if (what == unpacking) {
      with_stored_type<T>(t, [&]<class Out>(const Out*) { unpack(m, static_cast<Out*>(t.out), first, last); });
    } else {
      flushing_denormals([&] { step(t, m, reinterpret_cast<T*>(scratch), what, (phase - 2) / 3, begin, end); });
    }
  }

  static void step(const NewtonSchulzTask& t, const Arrays<T>& m, T* scratch, Kind what, int number, int64_t begin,
                   int64_t end) {
    const T a = T(t.steps->a[number]), b = T(t.steps->b[number]), c = T(t.steps->c[number]);
    if (what == update) {
      for (int64_t first = begin * kRowChunk; first < end * kRowChunk && first < m.l; first += kRowChunk)
        times_block(m.y, first, first + kRowChunk < m.l ? first + kRowChunk : m.l, a, c == 0 ? m.a : m.b,
                    c == 0 ? b : T(1), scratch);
      return;
    }
    int64_t bi = 0, before = 0;  // block row, blocks above it
    for (int64_t unit = begin; unit < end; ++unit) {
      while (before + bi + 1 <= unit) before += ++bi;
      if (what == gram)
        gram_block<T>(m.y, bi, unit - before, 0, nullptr, 1, m.a);
      else
        gram_block<T>(m.a, bi, unit - before, b, &m.a, c, m.b);
    }
  }

  static constexpr NewtonSchulzEngine engine{workspace_bytes, phases, units, run, scratch_bytes};
};

}  // namespace

const NewtonSchulzEngine& GRADOPS_ISA::newton_schulz_full(Element element) {
  return element == Element::f64 ? Engine<double>::engine : Engine<float>::engine;
}

}  // namespace gradops
