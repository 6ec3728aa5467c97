#include "rl/plackett_luce_logprob.h"

#include "common/exp_log.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr float lowest(float) { return -0x1.fffffep127f; }
constexpr double lowest(double) { return -0x1.fffffffffffffp1023; }

template <class T>
struct Row {
  const T* scores;
  const int64_t* permutation;
  int64_t n, k;
  // scratch
  T *most, *chosen, *grow, *shrink, *sum;  // of each place; most has one more: what is left behind the last place
  T* left;                                 // scores, -inf for ranked items
  int32_t* place;                          // of each item, -1 for the unranked

  Row(const PlackettLuce& t, void* scratch) : n(t.n), k(t.k) {
    most = static_cast<T*>(scratch);
    chosen = most + k + 1;
    grow = chosen + k;
    shrink = grow + k;
    sum = shrink + k;
    left = sum + k;
    place = reinterpret_cast<int32_t*>(left + n);
  }

  // Places the items; the number of places, or -1.
  int64_t find_places() {
    for (int64_t j = 0; j < n; ++j) place[j] = -1;
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
#pragma omp simd reduction(max : m)
      for (int64_t j = 0; j < n; ++j) {
        left[j] = place[j] < 0 ? scores[j] : -T(__builtin_inf());
        m = left[j] > m ? left[j] : m;
      }
#pragma omp simd reduction(+ : r)
      for (int64_t j = 0; j < n; ++j) r += double(exp_of(left[j] - m));
    }
    most[ranked] = m;
    for (int64_t i = ranked; i-- > 0;) most[i] = m = chosen[i] > m ? chosen[i] : m;
#pragma omp simd
    for (int64_t i = 0; i < ranked; ++i) {
      grow[i] = exp_of(chosen[i] - most[i]);
      shrink[i] = exp_of(most[i + 1] - most[i]);
    }
    for (int64_t i = ranked; i-- > 0;) sum[i] = T(r = r * double(shrink[i]) + double(grow[i]));
  }

  double logprob(int64_t ranked) const {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < ranked; ++i)  // nothing left but -inf: the term is -inf, not NaN
      total += double((chosen[i] - most[i]) - log_of(sum[i] == 0 ? T(1) : sum[i]));
    return total;
  }

  void gradient(int64_t ranked, T* out) {
    if (ranked == 0) {
      for (int64_t j = 0; j < n; ++j) out[j] = 0;
      return;
    }
    T* weight = chosen;  // q / r
    double q = 1;
    weight[0] = T(1) / sum[0];
#pragma omp simd
    for (int64_t i = 1; i < ranked; ++i) weight[i] = shrink[i - 1] * sum[i] / sum[i - 1];
    for (int64_t i = 1; i < ranked; ++i) {
      q = q * double(weight[i]) + 1;
      weight[i] = T(q / double(sum[i]));
    }
    const T m = most[ranked - 1], w = weight[ranked - 1];
    if (ranked < n) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) out[j] = -exp_of(left[j] - m) * w;
    }
    for (int64_t i = 0; i < ranked; ++i) out[permutation[i]] = T(1) - grow[i] * weight[i];
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
  return t.element == Element::f64 ? rows<double>(t, begin, end, scratch) : rows<float>(t, begin, end, scratch);
}

}  // namespace gradops::GRADOPS_ISA
