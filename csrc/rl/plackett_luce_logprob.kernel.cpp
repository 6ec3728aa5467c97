#include "rl/plackett_luce_logprob.h"

#include "common/exp_log.h"
#include "common/simd.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr float lowest(float) { return -0x1.fffffep127f; }
constexpr double lowest(double) { return -0x1.fffffffffffffp1023; }

// Arrays are padded to whole vectors with numbers that change nothing: most rows are short, and what is left
// over of a loop would cost more than the loop.
int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

template <class T>
struct Row {
  const T* scores;
  const int64_t* permutation;
  int64_t n, k;
  // scratch
  double *sum, *weight;              // of each place: r, q / r
  T *most, *chosen, *grow, *shrink;  // of each place; most has one more: what is left behind the last place
  T* left;                           // scores, -inf for ranked items
  int32_t* place;                    // of each item, -1 for the unranked

  Row(const PlackettLuce& t, void* scratch) : n(t.n), k(t.k) {
    const int64_t places = k + 16;
    sum = static_cast<double*>(scratch);
    weight = sum + places;
    most = reinterpret_cast<T*>(weight + places);
    chosen = most + places;
    grow = chosen + places;
    shrink = grow + places;
    left = shrink + places;
    place = reinterpret_cast<int32_t*>(left + n + 16);
  }

  // Places the items; the number of places, or -1.
  int64_t find_places() {
    for (int64_t j = 0; j < padded(n); ++j) place[j] = -1;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t item = permutation[i];
      if (item < 0) return i;
      if (item >= n || place[item] >= 0) return -1;
      place[item] = int32_t(i);
      chosen[i] = scores[item];
    }
    return k;
  }

  // most, grow, shrink and sum of every place
  void accumulate(int64_t ranked) {
    T m = lowest(T());
    double r = 0;
    if (ranked < n) {
      for (int64_t j = n; j < padded(n); ++j) left[j] = -T(__builtin_inf());
      for (int64_t j = 0; j < n; ++j) left[j] = place[j] < 0 ? scores[j] : -T(__builtin_inf());
#pragma omp simd reduction(max : m)
      for (int64_t j = 0; j < padded(n); ++j) m = left[j] > m ? left[j] : m;
#pragma omp simd reduction(+ : r)
      for (int64_t j = 0; j < padded(n); ++j) r += double(exp_of(left[j] - m));
    }
    for (int64_t i = ranked; i < padded(ranked); ++i) chosen[i] = m;
    for (int64_t i = ranked; i <= padded(ranked); ++i) most[i] = m, sum[i] = 1;
    for (int64_t i = ranked; i-- > 0;) most[i] = m = chosen[i] > m ? chosen[i] : m;
#pragma omp simd
    for (int64_t i = 0; i < padded(ranked); ++i) {
      grow[i] = exp_of(chosen[i] - most[i]);
      shrink[i] = exp_of(most[i + 1] - most[i]);
    }
    for (int64_t i = ranked; i-- > 0;) sum[i] = r = r * double(shrink[i]) + double(grow[i]);
  }

  double logprob(int64_t ranked) {
    double total = 0;
    // Two loops: as one, with a double in it, GCC makes scalar code.
    for (int64_t i = 0; i < padded(ranked); ++i) grow[i] = T(sum[i] == 0 ? 1. : sum[i]);  // 0: only -inf is left
#pragma omp simd
    for (int64_t i = 0; i < padded(ranked); ++i) grow[i] = (chosen[i] - most[i]) - log_of(grow[i]);
    for (int64_t i = 0; i < ranked; ++i) total += double(grow[i]);
    return total;
  }

  void gradient(int64_t ranked, T* out) {
    if (ranked == 0) {
      for (int64_t j = 0; j < n; ++j) out[j] = 0;
      return;
    }
#pragma omp simd
    for (int64_t i = 1; i < padded(ranked); ++i) weight[i] = double(shrink[i - 1]) * sum[i] / sum[i - 1];
    double q = 1;
    weight[0] = 1 / sum[0];
    for (int64_t i = 1; i < ranked; ++i) {
      q = q * weight[i] + 1;
      weight[i] = q / sum[i];
    }
    const T m = most[ranked - 1], w = T(weight[ranked - 1]);
    if (ranked < n) {
#pragma omp simd
      for (int64_t j = 0; j < padded(n); ++j) left[j] = -exp_of(left[j] - m) * w;
      for (int64_t j = 0; j < n; ++j) out[j] = left[j];
    }
    for (int64_t i = 0; i < ranked; ++i) out[permutation[i]] = T(1) - grow[i] * T(weight[i]);
  }
};

template <class T>
int64_t rows(const PlackettLuce& t, int64_t begin, int64_t end, void* scratch) {
  Row<T> row(t, scratch);
  T* out = static_cast<T*>(t.out);
  for (int64_t b = begin; b < end; ++b) {
    row.scores = static_cast<const T*>(t.scores) + b * t.n;
    row.permutation = t.permutation + b * t.k;
    const int64_t ranked = row.find_places();
    if (ranked < 0) return b;
    row.accumulate(ranked);
    if (t.gradient)
      row.gradient(ranked, out + b * t.n);
    else
      out[b] = T(row.logprob(ranked));
  }
  return -1;
}

}  // namespace

int64_t plackett_luce_rows(const PlackettLuce& t, int64_t begin, int64_t end, void* scratch) {
  int64_t bad = -1;
  flushing_denormals([&] {
    bad = t.element == Element::f64 ? rows<double>(t, begin, end, scratch) : rows<float>(t, begin, end, scratch);
  });
  return bad;
}

}  // namespace gradops::GRADOPS_ISA
