#include "rl/permutation_weights.h"

#include "common/exp_log.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <class T>
void groups(const PermutationWeights& t, int64_t begin, int64_t end) {
  const T* logp = static_cast<const T*>(t.logp);
  auto* weights = static_cast<decltype(widen(T()))*>(t.weights);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = t.offsets[g], last = t.offsets[g + 1];
    double most = -__builtin_inf(), sum = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t from = t.cu_seqlens[i], to = t.cu_seqlens[i + 1];
      double s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t j = from; j < to; ++j) s += double(widen(logp[j]));
      t.means[i] = s / (double(to - from) * t.tau);
      most = t.means[i] > most ? t.means[i] : most;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) sum += t.means[i] = exp_of(t.means[i] - most);
    for (int64_t i = first; i < last; ++i) narrow(t.means[i] / sum, weights[i]);
  }
}

}  // namespace

void permutation_weights_groups(const PermutationWeights& t, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) { groups<decltype(zero)>(t, begin, end); });
}

}  // namespace gradops::GRADOPS_ISA
