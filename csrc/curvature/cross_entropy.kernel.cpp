// A row is read block by block, with exponents taken from the largest logit so far; sums are made in floats within a
// block and in double over the blocks. What is written needs the exponentials once more, which costs less than their
// way through memory would; the row is still in the cache.
#include "curvature/cross_entropy.h"

#include "common/exp_log.h"
#include "common/float_vectors.h"

namespace gradops::GRADOPS_ISA {
namespace {

// centre is the u of the largest z: where p is nearly 1, p.u would be nearly that, and u - p.u of few digits.
struct RowSums {
  double top = -kInfinity, base, centre = 0;
  double sum = 0, dot = 0;  // of e^(z - base), and of that times u - centre
  double total = 0;         // of u, or without one, of z
  double log_sum() const { return log_of(sum); }
  double mean() const { return centre + dot / sum; }
};

// e (slope + rate (u - centre)) + shift, for e = e^(z - base)
struct Line {
  double base, slope, rate, centre, shift;
};

template <class A>
A number(double x) {  // as rounding to bfloat16 wants NaN
  return x != x ? A(__builtin_nan("")) : A(x);
}

// --- numbers of 4 bytes and less -----------------------------------------------------------------------------------

[[gnu::always_inline]] inline bool any_lane(Vec<int> true_is_all_ones) {
#if defined(__AVX512F__)
  return __builtin_ia32_cvtd2mask512(true_is_all_ones) != 0;
#elif defined(__AVX2__)
  return __builtin_ia32_movmskps256((Floats)true_is_all_ones) != 0;
#elif defined(__SSE2__)
  return __builtin_ia32_movmskps((Floats)true_is_all_ones) != 0;
#else
  for (int i = 0; i < kWide; ++i)
    if (true_is_all_ones[i]) return true;
  return false;
#endif
}

template <class T>
struct Block {
  // n: of pairs of vectors
  static float top(const T* z, int64_t n) {
    Floats a = all(-float(kInfinity)), b = a;
    for (int64_t i = 0; i < n; i += kPair) {
      const Two v = load(z + i);
      a = larger(v.a, a), b = larger(v.b, b);
    }
    return top_lane(larger(a, b));
  }

  static int64_t place_of(float top, const T* z, int64_t n) {  // of the first
    int64_t i = 0;
    for (; i + kPair < n; i += kPair) {
      const Two v = load(z + i);
      if (any_lane((v.a == all(top)) | (v.b == all(top)))) break;
    }
    while (i < n - 1 && widen(z[i]) != top) ++i;
    return i;
  }

  struct Sums {
    Floats sum{}, dot{}, total{};
    [[gnu::always_inline]] void add(const Powers& powers, Floats d, Floats u, Floats centre, bool has_u) {
      const Floats e = powers(d, all(kLog2E));
      sum += e;
      if (has_u) dot += e * (u - centre);
      total += has_u ? u : d;
    }
  };
  template <bool kDot>
  static void add(RowSums& s, const T* z, const T* u, int64_t n) {
    const Powers powers;
    const Floats base = all(float(s.base)), centre = all(float(s.centre));
    Sums a, b;
    for (int64_t i = 0; i < n; i += kPair) {
      const Two v = load(z + i);
      const Two w = kDot ? load(u + i) : Two();
      a.add(powers, v.a - base, w.a, centre, kDot);
      b.add(powers, v.b - base, w.b, centre, kDot);
    }
    s.sum += lanes_sum(a.sum + b.sum);
    s.total += lanes_sum(a.total + b.total) + (kDot ? 0 : double(n) * s.base);
    if (kDot) s.dot += lanes_sum(a.dot + b.dot);
  }

  template <bool kDot>
  static void write(const Line& l, const T* z, const T* u, T* out, int64_t n) {
    const Powers powers;
    const Floats base = all(number<float>(l.base)), slope = all(number<float>(l.slope)),
                 rate = all(number<float>(l.rate)), centre = all(number<float>(l.centre)),
                 shift = all(number<float>(l.shift));
    for (int64_t i = 0; i < n; i += kPair) {
      const Two v = load(z + i);
      const Two w = kDot ? load(u + i) : Two();
      const auto value = [&](Floats z, Floats u) {
        return powers(z - base, all(kLog2E)) * (kDot ? (u - centre) * rate + slope : slope) + shift;
      };
      store({value(v.a, w.a), value(v.b, w.b)}, out + i);
    }
  }
};

// --- float64 -------------------------------------------------------------------------------------------------------

template <>
struct Block<double> {
  static double top(const double* z, int64_t n) {
    double top = -kInfinity;
    for (int64_t i = 0; i < n; ++i) top = z[i] > top ? z[i] : top;
    return top;
  }
  static int64_t place_of(double top, const double* z, int64_t n) {
    int64_t i = 0;
    while (i < n - 1 && z[i] != top) ++i;
    return i;
  }
  template <bool kDot>
  static void add(RowSums& s, const double* z, const double* u, int64_t n) {
    double sum = 0, dot = 0, total = 0;
#pragma omp simd reduction(+ : sum, dot, total)
    for (int64_t i = 0; i < n; ++i) {
      const double e = exp_of(z[i] - s.base);
      sum += e;
      if (kDot) dot += e * (u[i] - s.centre);
      total += kDot ? u[i] : z[i] - s.base;
    }
    s.sum += sum, s.dot += dot, s.total += total + (kDot ? 0 : double(n) * s.base);
  }
  template <bool kDot>
  static void write(const Line& l, const double* z, const double* u, double* out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      out[i] = exp_of(z[i] - l.base) * (kDot ? (u[i] - l.centre) * l.rate + l.slope : l.slope) + l.shift;
  }
};

// --- any numbers ---------------------------------------------------------------------------------------------------

template <class T>
constexpr int64_t kWhole = sizeof(T) == 8 ? 1 : kPair;  // entries that a Block takes at a time

// The last entries of a row, less than kWhole, filled up with logits that have p = 0
template <class T>
struct Rest {
  T z[kPair], u[kPair];
  Rest(const T* z_end, const T* u_end, int64_t n) {
    using A = Arithmetic<T>;
    for (int64_t i = 0; i < kPair; ++i) {
      narrow(i < n ? widen(z_end[i]) : -A(kInfinity), z[i]);
      narrow(i < n && u_end ? widen(u_end[i]) : A(0), u[i]);
    }
  }
};

template <bool kDot, class T>
RowSums sums_of(const T* z, const T* u, int64_t cols, const double* known_lse) {
  using A = Arithmetic<T>;
  RowSums s;
  s.base = known_lse ? double(A(*known_lse)) : 0;  // where all is masked so far, any base gives e = 0, or NaN
  const auto add = [&](const T* z, const T* u, int64_t n) {
    const A top = Block<T>::top(z, n);
    if (double(top) > s.top) {
      const double centre = kDot ? double(widen(u[Block<T>::place_of(top, z, n)])) : 0;
      if (kDot) s.dot += s.sum * (s.centre - centre), s.centre = centre;
      const double f = known_lse ? 1 : s.top == -kInfinity ? 0 : exp_of(s.top - double(top));
      s.sum *= f, s.dot *= f, s.top = double(top);
      if (!known_lse) s.base = s.top;
    }
    Block<T>::template add<kDot>(s, z, u, n);
  };
  for (int64_t b = 0; b < cols; b += kBlock) {
    const int64_t n = cols - b < kBlock ? cols - b : kBlock, whole = n / kWhole<T> * kWhole<T>;
    if (whole) add(z + b, kDot ? u + b : u, whole);
    if (whole == n) continue;
    const Rest<T> rest(z + b + whole, kDot ? u + b + whole : u, n - whole);
    const double total = s.total;
    add(rest.z, rest.u, kPair);
    s.total = total;
    for (int64_t i = b + whole; i < b + n; ++i) s.total += double(widen(kDot ? u[i] : z[i]));
  }
  return s;
}

template <bool kDot, class T>
void write_row(const Line& line, const T* z, const T* u, T* out, int64_t cols) {
  for (int64_t b = 0; b < cols; b += kBlock) {
    const int64_t n = cols - b < kBlock ? cols - b : kBlock, whole = n / kWhole<T> * kWhole<T>;
    Block<T>::template write<kDot>(line, z + b, kDot ? u + b : u, out + b, whole);
    if (whole == n) continue;
    Rest<T> rest(z + b + whole, kDot ? u + b + whole : u, n - whole);
    Block<T>::template write<kDot>(line, rest.z, rest.u, rest.z, kPair);
    for (int64_t i = whole; i < n; ++i) out[b + i] = rest.z[i - whole];
  }
}

// p (slope + g (u - mean)) + shift, with lse and mean rounded so that differences from them lose nothing in T's
// arithmetic, and what rounding took away in the factors
template <class T>
Line line_of(double lse, double slope, double g, double mean, double shift) {
  const double base = double(Arithmetic<T>(lse)), centre = double(Arithmetic<T>(mean));
  const double p = lse - base == 0 ? 1 : exp_of(base - lse);
  return {base, p * (slope - g * (mean - centre)), p * g, centre, shift};
}

template <class T>
void zeros(T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = T();
}

template <class T>
const T* row_of(const void* x, int64_t row, int64_t cols) {
  return x ? static_cast<const T*>(x) + row * cols : nullptr;
}

template <class T>
void sums(const CrossEntropySums& t, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    t.loss[r] = t.lse[r] = 0;
    const int64_t target = t.target[r];
    if (target == t.ignore_index) continue;
    const T *z = row_of<T>(t.z, r, t.cols), *u = row_of<T>(t.z_dot, r, t.cols);
    const double* lse = t.known_lse ? t.known_lse + r : nullptr;
    const double s = t.label_smoothing;
    if (u) {
      const RowSums row = sums_of<true>(z, u, t.cols, lse);
      t.lse[r] = row.mean();
      t.loss[r] = t.lse[r] - (1 - s) * double(widen(u[target]));
      if (s > 0) t.loss[r] -= s * row.total / double(t.cols);
    } else {  // from the largest logit, so that no digits are lost where logits are large
      const RowSums row = sums_of<false>(z, u, t.cols, lse);
      const double log_sum = row.log_sum();
      t.lse[r] = row.top + log_sum;
      t.loss[r] = log_sum + (s < 1 ? (1 - s) * (row.top - double(widen(z[target]))) : 0.);
      if (s > 0) t.loss[r] += s * (row.top - row.total / double(t.cols));
    }
  }
}

template <class T>
void grads(const CrossEntropyGrad& t, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(t.out) + r * t.cols;
    const int64_t target = t.target[r];
    if (target == t.ignore_index) {
      zeros(out, t.cols);
      continue;
    }
    const T *z = row_of<T>(t.z, r, t.cols), *u = row_of<T>(t.z_dot, r, t.cols);
    const double slope = t.slope ? t.slope[r] : 0, g = u ? t.g[r] : 0, mean = u ? t.lse_dot[r] : 0;
    const double shift = -slope * t.label_smoothing / double(t.cols);
    const double change = u ? g * (double(widen(u[target])) - mean) : 0;
    const double p = exp_of(double(widen(z[target])) - t.lse[r]);
    const double own = p * change + slope * (p - (1 - t.label_smoothing)) + shift;
    const Line line = line_of<T>(t.lse[r], slope, g, mean, shift);
    u ? write_row<true>(line, z, u, out, t.cols) : write_row<false>(line, z, u, out, t.cols);
    if (slope != 0) narrow(number<Arithmetic<T>>(own), out[target]);
  }
}

template <class T>
void products(const SoftmaxCeHvp& t, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T *z = row_of<T>(t.z, r, t.cols), *u = row_of<T>(t.u, r, t.cols);
    T* out = static_cast<T*>(t.out) + r * t.cols;
    if (t.scale[r] == 0) {
      zeros(out, t.cols);
      continue;
    }
    const RowSums row = sums_of<true>(z, u, t.cols, nullptr);
    write_row<true>(line_of<T>(row.top + row.log_sum(), 0, t.scale[r], row.mean(), 0), z, u, out, t.cols);
  }
}

template <class T, class F>
void run(const F& f) {
  if constexpr (sizeof(T) == 8)
    f();
  else
    flushing_denormals(f);
}

}  // namespace

void cross_entropy_sums(const CrossEntropySums& t, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) { run<decltype(zero)>([&] { sums<decltype(zero)>(t, begin, end); }); });
}
void cross_entropy_grad(const CrossEntropyGrad& t, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) { run<decltype(zero)>([&] { grads<decltype(zero)>(t, begin, end); }); });
}
void softmax_ce_hvp(const SoftmaxCeHvp& t, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) { run<decltype(zero)>([&] { products<decltype(zero)>(t, begin, end); }); });
}

}  // namespace gradops::GRADOPS_ISA
