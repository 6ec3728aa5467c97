// The full-precision engine: iterates in float, or in double for f64 input.
//
// Y = X^T (so Y is the matrix itself if it is tall) has l rows and s <= l columns, and is stored in
// panels (common/simd_gemm.h). One step is
//   A = Y^T Y,   B = b A + c A A,   Y <- a Y + Y B
// A and B are symmetric: blocks on and below the diagonal are computed and mirrored.
//
// The Gram form takes a few steps at a time. Everything but Y is a polynomial of the first A, so all
// of it commutes and every product of two is symmetric as well:
//   P = a I + b A + c A A,   Q <- P Q,   A <- P A P,   and after the last of them Y <- Y Q
// Phases: sums of squares, packing, those of the steps, unpacking.
#include "linalg/newton_schulz.h"

#include "common/simd_gemm.h"
#include "common/widen.h"

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
  Panels<T> y, a, b, half, q[2];  // the last three for the Gram form
  Squares* squares;
  int64_t bytes;

  Arrays(const NewtonSchulzTask& t, char* workspace)
      : l(t.rows > t.cols ? t.rows : t.cols), s(t.rows > t.cols ? t.cols : t.rows), wide(t.rows < t.cols) {
    T* memory = reinterpret_cast<T*>(workspace);
    y = {memory, l, s};
    a = {y.data + y.size(), s, s};
    b = {a.data + a.size(), s, s};
    T* end = b.data + b.size();
    if (t.steps->restart > 1)
      for (Panels<T>* m : {&half, &q[0], &q[1]}) *m = {end, s, s}, end += m->size();
    squares = reinterpret_cast<Squares*>(end);
    bytes = reinterpret_cast<char*>(squares + chunks(t.rows * t.cols, kNormChunk)) - workspace;
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

enum Kind { norm, packing, gram, square, collect, halve, renew, update, unpacking };
struct Phase {
  Kind kind;
  int step = 0;      // of all
  int number = 0;    // of the steps taken together
  int together = 1;  // 1: the standard form
};

// Calls f with the phases of the steps, in their order, until it returns false.
template <class F>
[[gnu::always_inline]] inline bool each_step_phase(const NewtonSchulzTask& t, const F& f) {
  const int steps = t.steps->steps, most = t.steps->restart > 1 ? t.steps->restart : 1;
  for (int first = 0; first < steps; first += most) {
    const int n = steps - first < most ? steps - first : most;
    if (!f(Phase{gram, first, 0, n})) return false;
    for (int j = 0; j < n; ++j) {
      if (!f(Phase{square, first + j, j, n})) return false;
      if (j > 0 && !f(Phase{collect, first + j, j, n})) return false;
      if (j < n - 1 && !(f(Phase{halve, first + j, j, n}) && f(Phase{renew, first + j, j, n}))) return false;
    }
    if (!f(Phase{update, first + n - 1, n - 1, n})) return false;
  }
  return true;
}

Phase phase_of(const NewtonSchulzTask& t, int phase) {
  if (phase < 2) return {Kind(phase)};
  phase -= 2;
  Phase found{unpacking};
  each_step_phase(t, [&](const Phase& p) {
    if (phase == 0) found = p;
    return phase-- > 0;
  });
  return found;
}

template <class T>
struct Engine {
  static int phases(const NewtonSchulzTask& t) {
    int count = 2;
    while (phase_of(t, count).kind != unpacking) ++count;
    return count + 1;
  }
  static int64_t units(const NewtonSchulzTask& t, int phase) {
    return units_of(t, Arrays<T>(t, nullptr), phase_of(t, phase));
  }
  static int64_t units_of(const NewtonSchulzTask& t, const Arrays<T>& m, const Phase& what) {
    switch (what.kind) {
      case norm:
        return chunks(t.rows * t.cols, kNormChunk);
      case packing:
      case update:
      case unpacking:
        return chunks(m.l, kRowChunk);
      case square:  // B = b A is left to the update
        if (what.together == 1 && t.steps->c[what.step] == 0) return 0;
        [[fallthrough]];
      default:
        return m.a.blocks() * (m.a.blocks() + 1) / 2;
    }
  }
  static int64_t workspace_bytes(const NewtonSchulzTask& t) { return Arrays<T>(t, nullptr).bytes; }
  static int64_t scratch_bytes(const NewtonSchulzTask& t) {
    return Panels<T>{nullptr, kRowChunk, Arrays<T>(t, nullptr).s}.size() * int64_t(sizeof(T));
  }

  static void run(const NewtonSchulzTask& t, char* workspace, char* scratch, int phase, int64_t begin, int64_t end) {
    const Arrays<T> m(t, workspace);
    const Phase now = phase_of(t, phase);
    if (now.kind == norm || now.kind == packing || now.kind == unpacking)
      outside_steps(t, m, now.kind, begin, end);
    else
      flushing_denormals([&] { step(t, m, reinterpret_cast<T*>(scratch), now, begin, end); });
  }
  static void run_all(const NewtonSchulzTask& t, char* workspace, char* scratch) {
    const Arrays<T> m(t, workspace);
    for (Kind kind : {norm, packing}) outside_steps(t, m, kind, 0, units_of(t, m, {kind}));
    flushing_denormals([&] {
      each_step_phase(t, [&](const Phase& now) {
        step(t, m, reinterpret_cast<T*>(scratch), now, 0, units_of(t, m, now));
        return true;
      });
    });
    outside_steps(t, m, unpacking, 0, units_of(t, m, {unpacking}));
  }

  static void outside_steps(const NewtonSchulzTask& t, const Arrays<T>& m, Kind what, int64_t begin, int64_t end) {
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
    } else {
      with_stored_type<T>(t, [&]<class Out>(const Out*) { unpack(m, static_cast<Out*>(t.out), first, last); });
    }
  }

  static void step(const NewtonSchulzTask& t, const Arrays<T>& m, T* scratch, const Phase& now, int64_t begin,
                   int64_t end) {
    const T a = T(t.steps->a[now.step]), b = T(t.steps->b[now.step]), c = T(t.steps->c[now.step]);
    const bool standard = now.together == 1;
    // P of the first step is the first Q; later it needs a place of its own.
    const Panels<T>& p = !standard && now.number == 0 ? m.q[0] : m.b;
    const Panels<T>&q = m.q[now.number & 1], &q_before = m.q[1 - (now.number & 1)];
    if (now.kind == update) {
      for (int64_t first = begin * kRowChunk; first < end * kRowChunk && first < m.l; first += kRowChunk) {
        const int64_t last = first + kRowChunk < m.l ? first + kRowChunk : m.l;
        if (!standard)
          times_block(m.y, first, last, T(0), q, T(1), scratch);
        else if (c == 0)
          times_block(m.y, first, last, a, m.a, b, scratch);
        else
          times_block(m.y, first, last, a, m.b, T(1), scratch);
      }
      return;
    }
    const Panels<T>* const none = nullptr;
    int64_t bi = 0, before = 0;  // block row, blocks above it
    for (int64_t unit = begin; unit < end; ++unit) {
      while (before + bi + 1 <= unit) before += ++bi;
      const int64_t bj = unit - before;
      switch (now.kind) {
        case gram:
          symmetric_block(m.y, m.y, bi, bj, T(0), none, T(1), m.a);
          break;
        case square:
          symmetric_block(m.a, m.a, bi, bj, b, &m.a, c, p);
          if (!standard && bi == bj)
            for (int64_t i = bi * kBlock<T>; i < (bi + 1) * kBlock<T> && i < m.s; ++i) *p.at(i, i) += a;
          break;
        case collect:
          symmetric_block(p, q_before, bi, bj, T(0), none, T(1), q);
          break;
        case halve:
          symmetric_block(p, m.a, bi, bj, T(0), none, T(1), m.half);
          break;
        default:  // renew
          symmetric_block(p, m.half, bi, bj, T(0), none, T(1), m.a);
      }
    }
  }

  static constexpr NewtonSchulzEngine engine{workspace_bytes, phases, units, run, scratch_bytes, run_all};
};

}  // namespace

const NewtonSchulzEngine& GRADOPS_ISA::newton_schulz_full(Element element) {
  return element == Element::f64 ? Engine<double>::engine : Engine<float>::engine;
}

}  // namespace gradops
