#include "rl/capo_update_moments.h"

#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kRun = 32;  // terms summed in Real before they go to a sum in double

template <class T>
void update(const CapoUpdate& t, const CapoSegments& segments, int64_t begin, int64_t end, int64_t first, int64_t last,
            void* scratch) {
  using Real = decltype(widen(T()));
  const T* hidden = static_cast<const T*>(t.tokens.hidden);
  const Real *probs = static_cast<const Real*>(t.tokens.probs),
             *advantage = static_cast<const Real*>(t.tokens.advantage);
  const int64_t k = t.tokens.k, h = t.tokens.h, width = last - first;
  double* total = static_cast<double*>(scratch);
  Real* run = reinterpret_cast<Real*>(total + width);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t stop = segments.begin[r + 1];
    int64_t i = segments.begin[r];
    if (i == stop) continue;
    for (int64_t c = 0; c < width; ++c) total[c] = 0;
    while (i < stop) {
      for (int64_t c = 0; c < width; ++c) run[c] = 0;
      for (const int64_t pause = i + kRun < stop ? i + kRun : stop; i < pause; ++i) {
        const int64_t place = segments.order[i], n = place / k;
        const Real weight = advantage[n] * (Real(place % k == t.tokens.action[n]) - probs[place]);
        const T* x = hidden + n * h + first;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) run[c] += weight * widen(x[c]);
      }
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) total[c] += double(run[c]);
    }
    Real* average = static_cast<Real*>(t.average) + r * h + first;
    Real* squares = static_cast<Real*>(t.squares) + r * h + first;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      const double g = total[c];
      average[c] = Real(t.beta1 * double(average[c]) + (1 - t.beta1) * g);
      squares[c] = Real(t.beta2 * double(squares[c]) + (1 - t.beta2) * g * g);
    }
  }
}

}  // namespace

void capo_update_rows(const CapoUpdate& t, const CapoSegments& segments, int64_t begin, int64_t end, int64_t first,
                      int64_t last, void* scratch) {
  with_type(t.tokens.element,
            [&](auto zero) { update<decltype(zero)>(t, segments, begin, end, first, last, scratch); });
}

}  // namespace gradops::GRADOPS_ISA
