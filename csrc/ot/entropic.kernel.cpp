#include "ot/entropic.h"

#include "common/simd.h"
#include "common/widen.h"
#include "ot/exp2.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kRun = 1024;  // columns whose float sums are made before they go on in double
constexpr double kInfinity = __builtin_inf();

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
bool finite(double x) { return x - x == 0; }

double log2_of(double x) { return log_of(x) * 1.44269504088896340736; }

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
  Exponents(const EntropicPass& p, const double* costs, double shift)
      : c(costs), g(p.item->g), f(shift), scale(p.item->scale) {}
  [[gnu::always_inline]] double operator[](int64_t j) const { return f + g[j] - c[j] * scale; }
};
template <>
struct Exponents<float> {
  const float *c, *g_high, *g_low;
  float f_high, f_low, scale_high, scale_low;
  Exponents(const EntropicPass& p, const float* costs, double shift) : c(costs), g_high(p.g_high), g_low(p.g_low) {
    const double round = p.grid * 0x1.8p52, high = (shift + round) - round;
    f_high = float(high), f_low = float(shift - double(f_high));
    // Cut off downwards, so that scale_low > 0 and an infinite cost makes both parts -infinity, and no NaN.
    scale_high = float(p.item->scale * (1 - 0x1p-22)), scale_low = float(p.item->scale - double(scale_high));
  }
  [[gnu::always_inline]] float operator[](int64_t j) const {
    const float high = (f_high + g_high[j]) - c[j] * scale_high, low = (f_low + g_low[j]) - c[j] * scale_low;
    return high + low;
  }
};

// t[j] = 2^exponent; their sum
template <class Real>
double powers(const Exponents<Real> exponent, int64_t count, Real* __restrict__ t) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = least(begin + kRun, count);
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) {
      const Real power = exp2_of(exponent[j]);
      t[j] = power;
      sum += power;
    }
    total += double(sum);
  }
  return total;
}

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

// sums[j] += sum over the rows of the group of t[r][j] weight[r]
template <class Real>
void add_rows(const Real* __restrict__ t, int64_t stride, const double* weight, int64_t count,
              double* __restrict__ sums) {
  Real w[kEntropicGroup];
  for (int r = 0; r < kEntropicGroup; ++r) w[r] = Real(weight[r]);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    Real sum = 0;
    for (int r = 0; r < kEntropicGroup; ++r) sum += t[r * stride + j] * w[r];
    sums[j] += double(sum);
  }
}

// The sum of t (r log r - r + 1) over a row, r = the rounded entry / t
double divergence(const Exponents<double> exponent, const double* t, const EntropicRounding& u, double x, double fill,
                  int64_t count) {
  const double *y = u.y, *h = u.h;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    const double to = t[j] * x * y[j] + fill * h[j], by = to / t[j] - 1;
    const double near = t[j] * by * by * (0.5 - by * (1. / 6 - by * (1. / 12 - by * (1. / 20 - by * (1. / 30)))));
    const double far = to * (log_of(to) - exponent[j] * 0.69314718055994530942) - to + t[j];
    const double part = __builtin_fabs(by) < 1e-3 ? near : far;
    sum += to > 0 ? part : t[j];
  }
  return sum;
}

template <class Real>
EntropicOutcome pass(const EntropicPass& p, int64_t begin, int64_t end, void* scratch, double* sums) {
  const EntropicItem& item = *p.item;
  const int64_t m = item.columns, stride = (m + 15) / 16 * 16;
  Real* t = static_cast<Real*>(scratch);
  Real* buffer = t + kEntropicGroup * stride;
  EntropicOutcome out{0, 0, false};
  for (int64_t j = 0; j < m; ++j) sums[j] = 0;
  for (int64_t first = begin; first < end; first += kEntropicGroup) {
    // Logarithms for the whole group at once: one after the other they would take longer than a short row.
    double weight[kEntropicGroup] = {}, log_a[kEntropicGroup], total[kEntropicGroup], omega[kEntropicGroup];
    for (int64_t r = 0; r < kEntropicGroup; ++r) {
      log_a[r] = first + r < end && item.a[first + r] > 0 ? item.a[first + r] : 1;
      total[r] = 1, omega[r] = p.omega;
    }
#pragma omp simd
    for (int64_t r = 0; r < kEntropicGroup; ++r) log_a[r] = log2_of(log_a[r]);
    for (int64_t r = 0; r < kEntropicGroup; ++r) {
      const int64_t i = first + r;
      Real* row = t + r * stride;
      if (i >= end || item.a[i] == 0) {
        if (i < end) item.f[i] = -kInfinity;
        for (int64_t j = 0; j < m; ++j) row[j] = 0;
        continue;
      }
      const Real* c = costs<Real>(item, i, 0, m, buffer);
      double shift = item.f[i] - log_a[r], sum = powers(Exponents<Real>(p, c, shift), m, row);
      const double before = sum;
      if (!(finite(shift) && sum > 1e-18 && sum < 1e18)) {
        shift = -largest(Exponents<Real>(p, c, 0.), m);
        if (!finite(shift)) {
          out.infeasible |= shift > 0;
          out.error += shift > 0 ? 0. : __builtin_nan("");  // costs of NaN, which is no maximum, or -infinity
          continue;
        }
        sum = powers(Exponents<Real>(p, c, shift), m, row);
        omega[r] = 1;
        out.error += 2 * item.a[i];  // at most: the former potential was no estimate
      } else {
        out.error += item.a[i] * __builtin_fabs(before - 1);
      }
      item.f[i] = shift + log_a[r];
      total[r] = sum, weight[r] = item.a[i];
    }
    double step[kEntropicGroup];
#pragma omp simd
    for (int64_t r = 0; r < kEntropicGroup; ++r) {
      step[r] = -omega[r] * log2_of(total[r]);
      weight[r] *= omega[r] == 1 ? 1 / total[r] : exp2_of(step[r]);
    }
    for (int64_t r = 0; r < kEntropicGroup && first + r < end; ++r) {
      const int64_t i = first + r;
      item.f[i] += step[r];
      if (weight[r] != 0) out.span = __builtin_fabs(item.f[i]) > out.span ? __builtin_fabs(item.f[i]) : out.span;
    }
    add_rows(t, stride, weight, m, sums);
  }
  return out;
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

EntropicStep entropic_step(const EntropicItem& t, double omega, double least_sum, const double* sums) {
  const double* b = t.b;
  double *g = t.g, error = 0, doubtful = 0;
#pragma omp simd reduction(+ : error, doubtful)
  for (int64_t j = 0; j < t.columns; ++j) {
    const double step = omega * log2_of(b[j] / sums[j]), distance = __builtin_fabs(sums[j] - b[j]);
    const double moved = sums[j] >= least_sum ? g[j] + step : g[j];
    g[j] = b[j] == 0 ? -kInfinity : moved;
    error += b[j] == 0 ? 0. : distance;
    doubtful += b[j] == 0 || sums[j] >= least_sum ? 0. : 1.;
  }
  return {error, int64_t(doubtful)};
}

double entropic_split(const EntropicItem& t, double span, float* g_high, float* g_low) {
  const double* g = t.g;
  double top = 1;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < t.columns; ++j) {
    const double size = g[j] == -kInfinity ? 0. : __builtin_fabs(g[j]);
    top = size > top ? size : top;
  }
  double grid = 0x1p-22;
  while (grid * 0x1p23 < top + span) grid *= 2;
  const double round = grid * 0x1.8p52;
#pragma omp simd
  for (int64_t j = 0; j < t.columns; ++j) {
    const double on_grid = (g[j] + round) - round;
    g_high[j] = float(on_grid);
    g_low[j] = g[j] == -kInfinity ? 0.f : float(g[j] - double(float(on_grid)));
  }
  return grid;
}

void entropic_measure(const EntropicItem& item, int64_t begin, int64_t end, void* scratch, double* rows, double* x,
                      double* columns, double* scaled) {
  const EntropicPass p{&item, true, nullptr, nullptr, 0, 1};
  const int64_t m = item.columns;
  double *t = static_cast<double*>(scratch), *buffer = t + m;
  for (int64_t j = 0; j < m; ++j) columns[j] = scaled[j] = 0;
  for (int64_t i = begin; i < end; ++i) {
    rows[i] = x[i] = 0;
    if (item.f[i] == -kInfinity) continue;
    rows[i] = powers(Exponents<double>(p, costs<double>(item, i, 0, m, buffer), item.f[i]), m, t);
    x[i] = rows[i] > item.a[i] ? item.a[i] / rows[i] : 1.;
    const double weight = x[i];
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) columns[j] += t[j], scaled[j] += t[j] * weight;
  }
}

double entropic_gap(const EntropicItem& item, const EntropicRounding& u, int64_t begin, int64_t end, void* scratch) {
  const EntropicPass p{&item, true, nullptr, nullptr, 0, 1};
  const int64_t m = item.columns;
  double *t = static_cast<double*>(scratch), *buffer = t + m, gap = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (item.f[i] == -kInfinity) continue;
    const double* c = costs<double>(item, i, 0, m, buffer);
    const Exponents<double> exponent(p, c, item.f[i]);
    powers(exponent, m, t);
    double kept = 0;
#pragma omp simd reduction(+ : kept)
    for (int64_t j = 0; j < m; ++j) kept += t[j] * u.y[j];
    const double missing = item.a[i] - u.x[i] * kept;
    gap += divergence(exponent, t, u, u.x[i], u.total > 0 && missing > 0 ? missing / u.total : 0., m);
  }
  return gap;
}

}  // namespace gradops::GRADOPS_ISA
