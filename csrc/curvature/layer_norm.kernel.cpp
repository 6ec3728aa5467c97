#include "curvature/layer_norm.h"

#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

// total[i]: the sum over c of what f(c, s...) adds to the i-th s. In R, a run at a time: longer ones lose digits.
template <class R, class F>
[[gnu::always_inline]] inline void add_up(int64_t n, double (&total)[4], const F& f) {
  constexpr int64_t kRun = 1024;
  for (double& t : total) t = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    R s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t c = begin; c < end; ++c) f(c, s0, s1, s2, s3);
    total[0] += double(s0), total[1] += double(s1), total[2] += double(s2), total[3] += double(s3);
  }
}

// Somewhere among the numbers of a row: what is left when it is subtracted is small where their mean is large.
template <class R>
R sample(const R* x, int64_t n) {
  return x[0] / 4 + x[n / 4] / 4 + x[n / 2] / 4 + x[n - 1] / 4;
}

// (x - mean) * scale, where the mean has more digits than x: their difference from those of x goes into a shift.
template <class R>
struct Centered {
  R high, scale, shift;
  Centered(double mean, double factor) : high(R(mean)), scale(R(factor)), shift(R((double(high) - mean) * factor)) {}
  [[gnu::always_inline]] R operator()(R x) const { return (x - high) * scale + shift; }
};

// Compiled once, and not into every loop over rows.
template <class R>
[[gnu::noinline]] void widen_row(Element type, const void* from, int64_t first, int64_t n, R* to) {
  const auto fill = [&](const auto* x) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] = widen(x[first + c]);
  };
  type == Element::bf16 ? fill(static_cast<const Bf16*>(from)) : fill(static_cast<const F16*>(from));
}
template <class R>
[[gnu::noinline]] void narrow_row(Element type, const R* from, int64_t first, int64_t n, void* to) {
  const auto put = [&](auto* y) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) narrow(from[c], y[first + c]);
  };
  type == Element::bf16 ? put(static_cast<Bf16*>(to)) : put(static_cast<F16*>(to));
}

// Rows as arrays of R: in place, or widened into a buffer.
template <class R>
struct Rows {
  const LayerNormRows& t;

  R* buffer(int slot) const { return static_cast<R*>(t.buffers) + slot * t.n; }
  const R* read(const void* base, int64_t r, int slot) const {
    if (!base) return static_cast<const R*>(t.zeros);
    if (element_size(t.element) == sizeof(R)) return static_cast<const R*>(base) + r * t.n;
    R* to = buffer(slot);
    widen_row(t.element, base, r * t.n, t.n, to);
    return to;
  }
  // The row of results is at(c).
  template <class F>
  [[gnu::always_inline]] void write(int64_t r, const F& at) const {
    if (!t.out) return;
    const bool direct = element_size(t.element) == sizeof(R);
    R* to = direct ? static_cast<R*>(t.out) + r * t.n : buffer(kLayerNormBuffers - 1);
#pragma omp simd
    for (int64_t c = 0; c < t.n; ++c) to[c] = at(c);
    if (!direct) narrow_row(t.element, to, r * t.n, t.n, t.out);
  }
  const R* weight() const { return static_cast<const R*>(t.weight); }
  const R* weight_dot() const { return static_cast<const R*>(t.weight_dot); }
};

template <class F>
[[gnu::always_inline]] inline void with_real(Element e, const F& f) {
  e == Element::f64 ? f(0.) : f(0.f);
}

// The mean (if wanted) and the mean square around it; returns whether sums of A were up to it.
template <class A, class R>
bool measure(const R* x, int64_t n, bool center, double& mean, double& square) {
  double s[4];
  A near = center ? A(sample(x, n)) : A(0);
  for (int pass = 0; pass < 2; ++pass) {
    add_up<A>(n, s, [=](int64_t c, A& s0, A& s1, A&, A&) {
      const A d = A(x[c]) - near;
      s0 += d, s1 += d * d;
    });
    const double rest = center ? s[0] / double(n) : 0;
    mean = double(near) + rest;
    square = s[1] / double(n) - rest * rest;
    if (rest * rest <= square) break;
    near = A(mean);  // now the rest is nothing but rounding
  }
  square = square < 0 ? 0 : square;
  return sizeof(A) == 8 || (s[1] > 1e-24 && s[1] < 1e37);
}

template <class R>
void forward(const LayerNormRows& t, int64_t begin, int64_t end) {
  const Rows<R> rows{t};
  const R *w = rows.weight(), *b = static_cast<const R*>(t.bias);
  for (int64_t r = begin; r < end; ++r) {
    const R* x = rows.read(t.x, r, 0);
    double mean, square;
    if (!measure<R>(x, t.n, t.center, mean, square)) measure<double>(x, t.n, t.center, mean, square);
    const double rstd = 1 / __builtin_sqrt(square + t.eps);
    t.stats[2 * r] = mean, t.stats[2 * r + 1] = rstd;
    const Centered<R> normal(mean, rstd);
    rows.write(r, [=](int64_t c) { return normal(x[c]) * w[c] + b[c]; });
  }
}

template <class R>
void change(const LayerNormRows& t, int64_t begin, int64_t end) {
  const Rows<R> rows{t};
  const R *w = rows.weight(), *wd = rows.weight_dot(), *bd = static_cast<const R*>(t.bias_dot);
  const double n = double(t.n);
  for (int64_t r = begin; r < end; ++r) {
    const R *x = rows.read(t.x, r, 0), *xd = rows.read(t.x_dot, r, 1);
    const double mean = t.stats[2 * r], rstd = t.stats[2 * r + 1];
    const Centered<R> normal(mean, rstd);
    const R near = t.center ? sample(xd, t.n) : R(0);
    double s[4];
    add_up<R>(t.n, s, [=](int64_t c, R& s0, R& s1, R&, R&) {
      const R d = xd[c] - near;
      s0 += d, s1 += normal(x[c]) * d;
    });
    const double mean_dot = t.center ? double(near) + s[0] / n : 0, rstd_dot = -rstd * rstd * s[1] / n;
    t.stats_dot[2 * r] = mean_dot, t.stats_dot[2 * r + 1] = rstd_dot;
    const Centered<R> moved(mean_dot, rstd);
    const R p = R(rstd_dot / rstd);
    rows.write(r, [=](int64_t c) {
      const R v = normal(x[c]);
      return wd[c] * v + w[c] * (moved(xd[c]) + p * v) + bd[c];
    });
  }
}

template <class R>
[[gnu::always_inline]] inline void put_gradient(const Rows<R>& rows, int64_t r, const R* x, const R* g,
                                                const Centered<R>& normal, const double* s) {
  const double n = double(rows.t.n);
  const R m = rows.t.center ? R(s[0] / n) : R(0), q = R(s[1] / n), rstd = normal.scale;
  const R* w = rows.weight();
  rows.write(r, [=](int64_t c) { return rstd * (g[c] * w[c] - m - normal(x[c]) * q); });
}

// Which sums over the rows are made: kSums of dweight and dbias, in this order. Long rows go in pairs: the weight and
// these sums are then read half as often. Of short ones, a pair is two pages, and memory comes faster in order.
constexpr int64_t kLongRow = 4096;
template <class R, int kSums>
void backward(const LayerNormRows& t, int64_t begin, int64_t end, R* __restrict__ dw, R* __restrict__ db) {
  const Rows<R> rows{t};
  const R* w = rows.weight();
  double s[4];
  int64_t r = begin;
  for (; t.n >= kLongRow && r + 1 < end; r += 2) {
    const R *x = rows.read(t.x, r, 0), *g = rows.read(t.g, r, 1);
    const R *y = rows.read(t.x, r + 1, 2), *h = rows.read(t.g, r + 1, 3);
    const Centered<R> of_x(t.stats[2 * r], t.stats[2 * r + 1]), of_y(t.stats[2 * r + 2], t.stats[2 * r + 3]);
    add_up<R>(t.n, s, [=](int64_t c, R& s0, R& s1, R& s2, R& s3) {
      const R v = of_x(x[c]), u = of_y(y[c]), a = g[c] * w[c], b = h[c] * w[c];
      s0 += a, s1 += a * v, s2 += b, s3 += b * u;
      if constexpr (kSums > 0) dw[c] += g[c] * v + h[c] * u;
      if constexpr (kSums > 1) db[c] += g[c] + h[c];
    });
    put_gradient(rows, r, x, g, of_x, s);
    put_gradient(rows, r + 1, y, h, of_y, s + 2);
  }
  for (; r < end; ++r) {
    const R *x = rows.read(t.x, r, 0), *g = rows.read(t.g, r, 1);
    const Centered<R> normal(t.stats[2 * r], t.stats[2 * r + 1]);
    add_up<R>(t.n, s, [=](int64_t c, R& s0, R& s1, R&, R&) {
      const R v = normal(x[c]), a = g[c] * w[c];
      s0 += a, s1 += a * v;
      if constexpr (kSums > 0) dw[c] += g[c] * v;
      if constexpr (kSums > 1) db[c] += g[c];
    });
    put_gradient(rows, r, x, g, normal, s);
  }
}

template <class R, int kSums>
void backward_change(const LayerNormRows& t, int64_t begin, int64_t end, R* __restrict__ dw, R* __restrict__ db) {
  const Rows<R> rows{t};
  const R *w = rows.weight(), *wd = rows.weight_dot();
  const double n = double(t.n);
  for (int64_t r = begin; r < end; ++r) {
    const R *x = rows.read(t.x, r, 0), *g = rows.read(t.g, r, 1);
    const R *xd = rows.read(t.x_dot, r, 2), *gd = rows.read(t.g_dot, r, 3);
    const double stretch = t.stats_dot[2 * r + 1] / t.stats[2 * r + 1];
    const Centered<R> normal(t.stats[2 * r], t.stats[2 * r + 1]), moved(t.stats_dot[2 * r], t.stats[2 * r + 1]);
    const R p = R(stretch), rstd = normal.scale;
    double s[4];
    add_up<R>(t.n, s, [=](int64_t c, R& s0, R& s1, R& s2, R& s3) {
      const R v = normal(x[c]), vd = moved(xd[c]) + p * v, a = g[c] * w[c], ad = gd[c] * w[c] + g[c] * wd[c];
      s0 += a, s1 += a * v, s2 += ad, s3 += ad * v + a * vd;
      if constexpr (kSums > 0) dw[c] += gd[c] * v + g[c] * vd;
      if constexpr (kSums > 1) db[c] += gd[c];
    });
    // p dx and what has no other factors are joined: p (a - m) + a. - m. = p a + a. - (p m + m.)
    const R q = R(s[1] / n), both = R(stretch * s[1] / n + s[3] / n);
    const R shift = t.center ? R(stretch * s[0] / n + s[2] / n) : R(0);
    rows.write(r, [=](int64_t c) {
      const R v = normal(x[c]), vd = moved(xd[c]) + p * v;
      return rstd * (g[c] * (p * w[c] + wd[c]) + gd[c] * w[c] - shift - vd * q - v * both);
    });
  }
}

template <class R>
void clear(R* x, int64_t n) {
  for (int64_t c = 0; x && c < n; ++c) x[c] = 0;
}

}  // namespace

void layer_norm_forward(const LayerNormRows& t, int64_t begin, int64_t end) {
  with_real(t.element, [&](auto zero) { forward<decltype(zero)>(t, begin, end); });
}

void layer_norm_jvp(const LayerNormRows& t, int64_t begin, int64_t end) {
  with_real(t.element, [&](auto zero) { change<decltype(zero)>(t, begin, end); });
}

void layer_norm_backward(const LayerNormRows& t, int64_t begin, int64_t end, void* dweight, void* dbias) {
  with_real(t.element, [&](auto zero) {
    using R = decltype(zero);
    R *dw = static_cast<R*>(dweight), *db = static_cast<R*>(dbias);
    clear(dw, t.n), clear(db, t.n);
    const auto f = db ? &backward<R, 2> : dw ? &backward<R, 1> : &backward<R, 0>;
    f(t, begin, end, dw, db);
  });
}

void layer_norm_backward_jvp(const LayerNormRows& t, int64_t begin, int64_t end, void* dweight, void* dbias) {
  with_real(t.element, [&](auto zero) {
    using R = decltype(zero);
    R *dw = static_cast<R*>(dweight), *db = static_cast<R*>(dbias);
    clear(dw, t.n), clear(db, t.n);
    const auto f = db ? &backward_change<R, 2> : dw ? &backward_change<R, 1> : &backward_change<R, 0>;
    f(t, begin, end, dw, db);
  });
}

void layer_norm_widen(const void* from, Element from_element, double otherwise, void* to, Element to_element,
                      int64_t n) {
  with_real(to_element, [&](auto zero) {
    using R = decltype(zero);
    R* out = static_cast<R*>(to);
    if (!from) {
      for (int64_t c = 0; c < n; ++c) out[c] = R(otherwise);
      return;
    }
    with_type(from_element, [&](auto type) {
      const auto* in = static_cast<const decltype(type)*>(from);
      for (int64_t c = 0; c < n; ++c) out[c] = R(widen(in[c]));
    });
  });
}

void layer_norm_total(const void* partial, Element partial_element, int64_t count, int64_t step, void* out,
                      Element out_element, int64_t begin, int64_t end) {
  with_real(partial_element, [&](auto zero) {
    const auto* rows = static_cast<const decltype(zero)*>(partial);
    constexpr int64_t kColumns = 256;
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t columns = end - first < kColumns ? end - first : kColumns;
      double total[kColumns] = {};
      for (int64_t i = 0; i < count; ++i)
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) total[c] += double(rows[i * step + first + c]);
      with_type(out_element, [&](auto type) {
        auto* to = static_cast<decltype(type)*>(out) + first;
        for (int64_t c = 0; c < columns; ++c) narrow(total[c], to[c]);
      });
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
