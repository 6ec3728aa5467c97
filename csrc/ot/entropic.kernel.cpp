#include "ot/entropic.h"

#include "common/simd.h"
#include "common/widen.h"
#include "ot/exp2.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kRun = 1024;  // columns whose float sums are made before they go on in double
constexpr double kInfinity = __builtin_inf();
constexpr double kLeast = -1021;  // the least exponent of exp2_of

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
bool finite(double x) { return x - x == 0; }

[[gnu::always_inline]] inline double log2_of(double x) { return log_of(x) * 1.44269504088896340736; }

// c[j] += the squares of K coordinates' differences
template <int K, class T, class Real>
[[gnu::always_inline]] inline void add_squares(const T* x, const Real* y, int64_t stride, int64_t count, bool first,
                                               Real* c) {
  Real at[K];
  for (int k = 0; k < K; ++k) at[k] = Real(widen(x[k]));
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    Real sum = first ? Real(0) : c[j];
    for (int k = 0; k < K; ++k) {
      const Real difference = y[k * stride + j] - at[k];
      sum += difference * difference;
    }
    c[j] = sum;
  }
}

// Costs of row i and columns [begin, end), which may be where they lie or in `buffer`.
template <class Real>
const Real* costs(const EntropicItem& t, int64_t i, int64_t begin, int64_t end, Real* buffer) {
  const int64_t count = end - begin;
  const Real* found = buffer;
  with_type(t.cost.element, [&](auto zero) {
    using T = decltype(zero);
    if (t.cost.matrix) {
      const T* row = static_cast<const T*>(t.cost.matrix) + i * t.cost.m + begin;
      if constexpr (sizeof(T) == sizeof(Real)) {
        found = reinterpret_cast<const Real*>(row);
      } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) buffer[j] = Real(widen(row[j]));
      }
      return;
    }
    const T* x = static_cast<const T*>(t.cost.x) + i * t.cost.d;
    const Real* y = static_cast<const Real*>(t.y_transposed) + begin;
    const int64_t d = t.cost.d;
    if (d == 0)
      for (int64_t j = 0; j < count; ++j) buffer[j] = 0;
    int64_t k = 0;
    for (; k + 4 <= d; k += 4) add_squares<4>(x + k, y + k * t.columns, t.columns, count, k == 0, buffer);
    if (k + 3 == d) add_squares<3>(x + k, y + k * t.columns, t.columns, count, k == 0, buffer);
    if (k + 2 == d) add_squares<2>(x + k, y + k * t.columns, t.columns, count, k == 0, buffer);
    if (k + 1 == d) add_squares<1>(x + k, y + k * t.columns, t.columns, count, k == 0, buffer);
  });
  return found;
}

// The exponents f + g_j - scale c_j of a row. In float, rounded once: the sums of the high parts are exact (multiples
// of a grid), so are the products inside the additions, and all that was cut off is added at the end.
template <class Real>
struct Exponents;
template <>
struct Exponents<double> {
  const double *c, *g;
  double f, scale;
  Exponents(const EntropicPass& p, const double* costs, double shift) : Exponents(*p.item, p.base->g, costs, shift) {}
  Exponents(const EntropicItem& t, const double* potentials, const double* costs, double shift)
      : c(costs), g(potentials), f(shift), scale(t.scale) {}
  [[gnu::always_inline]] double operator[](int64_t j) const { return f + g[j] - c[j] * scale; }
};
template <>
struct Exponents<float> {
  const float *c, *g_high, *g_low;
  float f_high, f_low, scale_high, scale_low;
  Exponents(const EntropicPass& p, const float* costs, double shift)
      : c(costs), g_high(p.base->g_high), g_low(p.base->g_low) {
    const double round = p.base->grid * 0x1.8p52, high = (shift + round) - round;
    f_high = float(high), f_low = float(shift - double(f_high));
    // Cut off downwards, so that scale_low > 0 and an infinite cost makes both parts -infinity, and no NaN.
    scale_high = float(p.item->scale * (1 - 0x1p-22)), scale_low = float(p.item->scale - double(scale_high));
  }
  [[gnu::always_inline]] float operator[](int64_t j) const {
    const float high = (f_high + g_high[j]) - c[j] * scale_high, low = (f_low + g_low[j]) - c[j] * scale_low;
    return high + low;
  }
};

// t[j] = 2^exponent; their sum, each times v[j]
template <class Real, class Weights>
double powers(const Exponents<Real> exponent, const Weights v, int64_t count, Real* __restrict__ t) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = least(begin + kRun, count);
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) {
      const Real power = exp2_of(exponent[j]);
      t[j] = power;
      sum += power * v[j];
    }
    total += double(sum);
  }
  return total;
}
struct Ones {
  [[gnu::always_inline]] double operator[](int64_t) const { return 1; }
};

template <class Real>
double largest(const Exponents<Real> exponent, int64_t count) {
  Real top = -Real(kInfinity);
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < count; ++j) {
    const Real z = exponent[j];
    top = z > top ? z : top;
  }
  return double(top);
}

// Of W = kLanes rows whose sums lie in the lanes of W vectors: lane r of the result is the sum of the lanes of row r.
template <class Real, int H, int... N>
[[gnu::always_inline]] inline Vec<Real> folded(Vec<Real>* row, std::integer_sequence<int, N...> lanes) {
  constexpr int W = kLanes<Real>;
  for (int i = 0; i < H; ++i)
    row[i] = __builtin_shufflevector(row[i], row[i + H], (N & H ? W + N - H : N)...) +
             __builtin_shufflevector(row[i], row[i + H], (N & H ? W + N : N + H)...);
  if constexpr (H > 1) return folded<Real, H / 2>(row, lanes);
  return row[0];
}

// sums[r] = the sum of t[r][j] v[j], for kLanes rows
template <class Real>
void dot_rows(const Real* t, int64_t stride, const Real* v, double* sums) {
  constexpr int W = kLanes<Real>;
  for (int r = 0; r < W; ++r) sums[r] = 0;
  for (int64_t begin = 0; begin < stride; begin += kRun) {
    const int64_t end = least(begin + kRun, stride);
    Vec<Real> sum[W] = {};
    for (int64_t j = begin; j < end; j += W) {
      const Vec<Real> by = load_anywhere(v + j);
      for (int r = 0; r < W; ++r) sum[r] += load_anywhere(t + r * stride + j) * by;
    }
    const Vec<Real> all = folded<Real, W / 2>(sum, std::make_integer_sequence<int, W>());
    for (int r = 0; r < W; ++r) sums[r] += double(all[r]);
  }
}

// sums[j] += the sum of t[r][j] weight[r], for kLanes rows
template <class Real>
void add_rows(const Real* __restrict__ t, int64_t stride, const double* weight, double* __restrict__ sums) {
  constexpr int W = kLanes<Real>;
  Real w[W];
  for (int r = 0; r < W; ++r) w[r] = Real(weight[r]);
#pragma omp simd
  for (int64_t j = 0; j < stride; ++j) {
    Real even = 0, odd = 0;
    for (int r = 0; r < W; r += 2) even += t[r * stride + j] * w[r], odd += t[(r + 1) * stride + j] * w[r + 1];
    sums[j] += double(even + odd);
  }
}

// What exp2_of makes of entries too small for it is at most this part of a sum, times all that they are weighted with.
template <class Real>
constexpr double kNoise = sizeof(Real) == 4 ? 0x1p-101 : 0x1p-968;

template <class Real>
struct Pass {
  const EntropicPass& p;
  const EntropicItem& item = *p.item;
  const int64_t m = item.columns, stride = entropic_stride(m);
  const Real* const v = static_cast<const Real*>(p.base->v);
  Real* const buffer;

  // Row i of the kernel, with f_i as its exponents' base; its sum
  double build(int64_t i, double f, double log_a, Real* row) const {
    p.base->f[i] = f;
    for (int64_t j = m; j < stride; ++j) row[j] = 0;
    return powers(Exponents<Real>(p, costs<Real>(item, i, 0, m, buffer), f - log_a), v, m, row);
  }
  bool trusted(double sum) const { return sum > 0x1p-60 && sum < 0x1p60 && sum > kNoise<Real> * p.base->v_sum; }

  void group(int64_t first, int64_t count, Real* t, EntropicOutcome& out, double* sums) const {
    const int64_t padded = (count + kEntropicStep - 1) / kEntropicStep * kEntropicStep;
    const double* const a = item.a + first;
    double* const f = item.f + first;
    double total[kEntropicRows], weight[kEntropicRows], moved[kEntropicRows], step[kEntropicRows];
    double omega[kEntropicRows];
    if (p.fresh) {
      // Logarithms for the whole group at once: one after the other they would take longer than a short row.
      for (int64_t r = 0; r < padded; ++r) weight[r] = r < count && a[r] > 0 ? a[r] : 1;
#pragma omp simd
      for (int64_t r = 0; r < padded; ++r) weight[r] = log2_of(weight[r]);
      for (int64_t r = 0; r < padded; ++r) {
        if (r < count && a[r] != 0)
          total[r] = finite(f[r]) ? build(first + r, f[r], weight[r], t + r * stride) : f[r];
        else
          for (int64_t j = 0; j < stride; ++j) t[r * stride + j] = 0;
      }
    } else {
      for (int64_t r = 0; r < padded; r += kLanes<Real>) dot_rows(t + r * stride, stride, v, total + r);
    }
    for (int64_t r = 0; r < padded; ++r) {
      weight[r] = moved[r] = 0, omega[r] = p.omega;
      if (r >= count || a[r] == 0) {
        if (r < count) f[r] = -kInfinity;
        total[r] = 1;
        continue;
      }
      weight[r] = a[r];
      moved[r] = f[r] - p.base->f[first + r];
      if (trusted(total[r])) continue;
      const double top = largest(Exponents<Real>(p, costs<Real>(item, first + r, 0, m, buffer), 0.), m);
      if (!finite(top)) {
        out.infeasible |= top < 0;
        out.error += top < 0 ? 0. : __builtin_nan("");  // costs of NaN, which is no maximum, or -infinity
        total[r] = 1, weight[r] = 0;
        continue;
      }
      const double log_a = log2_of(a[r]);
      f[r] = log_a - top;
      total[r] = build(first + r, f[r], log_a, t + r * stride);
      omega[r] = 1, moved[r] = __builtin_nan("");
    }
    double error = 0;
#pragma omp simd reduction(+ : error)
    for (int64_t r = 0; r < padded; ++r) {
      // At most 2 where the former potential was no estimate
      const double known = exp2_of(moved[r]), before = known * total[r];
      error += moved[r] == moved[r] ? weight[r] * __builtin_fabs(before - 1) : 2 * weight[r];
      step[r] = -omega[r] * log2_of(moved[r] == moved[r] ? before : total[r]);
      weight[r] *= omega[r] == 1 ? 1 / total[r] : known * exp2_of(step[r]);
    }
    out.error += error;
    for (int64_t r = 0; r < count; ++r) {
      f[r] += step[r], out.weight += weight[r];
      if (weight[r] != 0) out.span = __builtin_fabs(f[r]) > out.span ? __builtin_fabs(f[r]) : out.span;
    }
    for (int64_t r = 0; r < padded; r += kLanes<Real>) add_rows(t + r * stride, stride, weight + r, sums);
  }
};

template <class Real>
EntropicOutcome pass(const EntropicPass& p, int64_t begin, int64_t end, void* scratch, double* sums) {
  const int64_t stride = entropic_stride(p.item->columns), rows = entropic_group(stride, sizeof(Real));
  Real* const memory = static_cast<Real*>(scratch);
  Real* const kernel = static_cast<Real*>(p.kernel);
  const Pass<Real> part{.p = p, .buffer = memory + rows * stride};
  EntropicOutcome out{0, 0, 0, false};
  for (int64_t j = 0; j < stride; ++j) sums[j] = 0;
  for (int64_t i = begin; i < end; i += rows)
    part.group(i, least(rows, end - i), kernel ? kernel + i * stride : memory, out, sums);
  return out;
}

template <class Real>
EntropicStep step(const EntropicPass& p, double weight, double* __restrict__ sums) {
  const double *b = p.item->b, *base = p.base->g;
  double *g = p.item->g, error = 0, doubtful = 0, drift = 0, total = 0;
  Real* v = static_cast<Real*>(p.base->v);
  const double trusted = kNoise<Real> * weight, omega = p.omega;
#pragma omp simd reduction(+ : error, doubtful, total) reduction(max : drift)
  for (int64_t j = 0; j < p.item->columns; ++j) {
    const bool none = b[j] == 0, doubt = !(sums[j] >= trusted) & !none;
    const double sum = sums[j] * double(v[j]), old = g[j], stepped = old + omega * log2_of(b[j] / sum);
    const double distance = __builtin_fabs(sum - b[j]), to = doubt ? old : stepped;
    const double moved = to - base[j], power = exp2_of(moved), size = __builtin_fabs(moved);
    const double scaling = none ? 0. : power, far = none ? 0. : size;
    g[j] = none ? -kInfinity : to;
    sums[j] = doubt ? -1. : sum;
    v[j] = Real(scaling);
    total += scaling;
    drift = far > drift ? far : drift;
    error += none ? 0. : distance;
    doubtful += doubt ? 1. : 0.;
  }
  p.base->v_sum = total;
  return {error, drift, int64_t(doubtful)};
}

template <class Real>
void split(const EntropicItem& t, double span, EntropicBase& base) {
  const double* g = t.g;
  double top = 1, total = 0;
  Real* v = static_cast<Real*>(base.v);
#pragma omp simd reduction(max : top) reduction(+ : total)
  for (int64_t j = 0; j < t.columns; ++j) {
    const bool any = g[j] != -kInfinity;
    const double size = any ? __builtin_fabs(g[j]) : 0.;
    base.g[j] = g[j], v[j] = any ? 1 : 0, total += any ? 1. : 0.;
    top = size > top ? size : top;
  }
  for (int64_t j = t.columns; j < entropic_stride(t.columns); ++j) v[j] = 0;
  base.v_sum = total, base.grid = 0x1p-22;
  if (sizeof(Real) == 8) return;
  while (base.grid * 0x1p23 < top + span) base.grid *= 2;
  const double round = base.grid * 0x1.8p52;
#pragma omp simd
  for (int64_t j = 0; j < t.columns; ++j) {
    const double on_grid = (g[j] + round) - round;
    base.g_high[j] = float(on_grid);
    base.g_low[j] = g[j] == -kInfinity ? 0.f : float(g[j] - double(float(on_grid)));
  }
}

// to log(to / t) - to + t, without cancellation: 2^k t is near `to`, and s = (to - 2^k t) / (to + 2^k t). t is normal.
[[gnu::always_inline]] inline double divergence(double to, double t) {
  constexpr uint64_t kHalf = uint64_t(1) << 51, kSign = uint64_t(1) << 63;  // of k + 2048 there is no sign to keep
  const uint64_t bits = __builtin_bit_cast(uint64_t, t);
  const uint64_t shifted = (__builtin_bit_cast(uint64_t, to) - bits + kHalf + kSign) >> 52;
  const double near = __builtin_bit_cast(double, bits + (shifted << 52) + kSign), k = whole_of(int64_t(shifted) - 2048);
  const double sum = to + near, s = (to - near) / sum, z = s * s;
  const double part = z * sum + to * s * log_tail(z) + (k * 0.69314718055994530942 * to + (t - near));
  return to > 0x1p-1000 ? part : t;
}

constexpr double kTiny = 0x1p-900;  // entries below it may be more than what they stand for: see exp2_of

double* plan_row(const EntropicItem& t, const EntropicKept& kept, int64_t i, void* scratch) {
  return kept.plan ? kept.plan + i * entropic_stride(t.columns) : static_cast<double*>(scratch);
}

}  // namespace

EntropicOutcome entropic_pass(const EntropicPass& p, int64_t begin, int64_t end, void* scratch, double* sums) {
  EntropicOutcome out;
  flushing_denormals([&] {
    out = p.in_double ? pass<double>(p, begin, end, scratch, sums) : pass<float>(p, begin, end, scratch, sums);
  });
  return out;
}

void entropic_columns(const EntropicItem& t, int64_t begin, int64_t end, void* scratch, double* top, double* sums) {
  double* buffer = static_cast<double*>(scratch);
  const int64_t count = end - begin;
  for (int64_t j = 0; j < count; ++j) top[j] = -kInfinity, sums[j] = 0;
  for (int64_t i = 0; i < t.rows; ++i) {
    const double* c = costs<double>(t, i, begin, end, buffer);
    if (t.f[i] == -kInfinity) continue;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const double z = t.f[i] - c[j] * t.scale;
      top[j] = z > top[j] ? z : top[j];
    }
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    const double* c = costs<double>(t, i, begin, end, buffer);
    if (t.f[i] == -kInfinity) continue;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) sums[j] += exp2_of(t.f[i] - c[j] * t.scale - top[j]);
  }
}

EntropicStep entropic_step(const EntropicPass& p, double weight, double* sums) {
  return p.in_double ? step<double>(p, weight, sums) : step<float>(p, weight, sums);
}

void entropic_base(const EntropicItem& t, bool in_double, double span, EntropicBase& base) {
  in_double ? split<double>(t, span, base) : split<float>(t, span, base);
}

void entropic_measure(const EntropicItem& item, const EntropicKept& kept, int64_t begin, int64_t end, void* scratch,
                      double* rows, double* x, double* columns, double* scaled) {
  const int64_t m = item.columns;
  double* buffer = static_cast<double*>(scratch) + m;
  for (int64_t j = 0; j < m; ++j) columns[j] = scaled[j] = 0;
  for (int64_t i = begin; i < end; ++i) {
    double* const t = plan_row(item, kept, i, scratch);
    const double factor = x[i];
    rows[i] = x[i] = 0;
    if (item.f[i] == -kInfinity) continue;
    double sum = 0;
    if (const double* v = kept.v) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < m; ++j) t[j] *= factor * v[j], sum += t[j];
    } else {
      sum = powers(Exponents<double>(item, item.g, costs<double>(item, i, 0, m, buffer), item.f[i]), Ones(), m, t);
    }
    rows[i] = sum;
    x[i] = sum > item.a[i] ? item.a[i] / sum : 1.;
    const double weight = x[i];
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) columns[j] += t[j], scaled[j] += t[j] * weight;
  }
}

double entropic_gap(const EntropicItem& item, const EntropicKept& kept, const EntropicRounding& u, int64_t begin,
                    int64_t end, void* scratch) {
  const int64_t m = item.columns;
  const double *y = u.y, *h = u.h;
  double *buffer = static_cast<double*>(scratch) + m, *apart = buffer + m, gap = 0;
#pragma omp simd
  for (int64_t j = 0; j < m; ++j) apart[j] = divergence(y[j], 1.);
  for (int64_t i = begin; i < end; ++i) {
    if (item.f[i] == -kInfinity) continue;
    double* const t = plan_row(item, kept, i, scratch);
    const auto exponents = [&] {
      return Exponents<double>(item, item.g, costs<double>(item, i, 0, m, buffer), item.f[i]);
    };
    if (!kept.plan) powers(exponents(), Ones(), m, t);
    const double x = u.x[i];
    double left = 0, cut = 0, parted = 0, tiny = 0;
#pragma omp simd reduction(+ : left, cut, parted, tiny)
    for (int64_t j = 0; j < m; ++j) {
      left += t[j] * y[j], cut += t[j] * (1 - y[j]), parted += t[j] * apart[j];
      tiny += t[j] < kTiny && h[j] > 0 ? 1. : 0.;
    }
    const double missing = item.a[i] - x * left, fill = missing / u.total;
    if (!(u.total > 0 && missing > kEntropicRounding * item.a[i])) {
      // With d(r) = r log r - r + 1, d(x y) = y d(x) + x d(y) + (1 - x) (1 - y), and none of these is negative.
      gap += divergence(x, 1.) * left + x * parted + (1 - x) * cut;
      continue;
    }
    double sum = 0;
    if (tiny == 0) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < m; ++j) sum += divergence(t[j] * (x * y[j]) + fill * h[j], t[j]);
    } else {
      const Exponents<double> exponent = exponents();
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < m; ++j) {
        const double entry = exp2_of(exponent[j]), more = fill * h[j];
        const double below = kLeast - exponent[j];  // by how much exp2_of gave too much
        sum += divergence(entry * (x * y[j]) + more, entry) +
               (more > 0 && below > 0 ? more * (below * 0.69314718055994530942) : 0.);
      }
    }
    gap += sum;
  }
  return gap;
}

}  // namespace gradops::GRADOPS_ISA
