#include "rl/rollout_correction.h"

#include "common/exp_log.h"
#include "rl/token_tile.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <class C>
void write(const C* ratio, const uint8_t* mask, int n, C low, C high, bool reject, C* weights, uint8_t* keep) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C r = ratio[i];
    const bool inside = (r >= low) & (r <= high);  // not for a NaN, which truncation leaves as it is
    const C moved = r < low ? low : r > high ? high : r;
    weights[i] = reject ? (inside ? r : C(0)) : moved;
    keep[i] = uint8_t(inside | !reject);
  }
  if (mask) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const bool kept = mask[i] != 0;
      weights[i] = kept ? weights[i] : C(0);
      keep[i] = kept ? keep[i] : uint8_t(0);
    }
  }
}

template <class C>
void sequence(const RolloutTask& t, int64_t s) {
  const int64_t begin = t.offsets ? t.offsets[s] : s * t.length, end = t.offsets ? t.offsets[s + 1] : begin + t.length;
  const C *old_logp = static_cast<const C*>(t.old_logp) + begin,
          *rollout = static_cast<const C*>(t.rollout_logp) + begin;
  const uint8_t* mask = t.mask ? t.mask + begin : nullptr;
  C* weights = static_cast<C*>(t.weights) + begin;
  uint8_t* keep = t.keep + begin;
  alignas(64) C tile[kTile];
  const auto log_ratios = [&](int64_t at, int n) {
    gather(tile, mask ? mask + at : nullptr, n, [=](int i) { return old_logp[at + i] - rollout[at + i]; });
  };
  const C veto = C(t.log_veto);
  bool vetoed = false;
  C common = C(0);
  if (t.level > 0 || veto > -C(__builtin_inf())) {
    double sum = 0;
    each_tile(end - begin, [&](int64_t at, int n, int full) {
      log_ratios(at, n);
      sum += tile_sum(tile, full);
      int below = 0;
#pragma omp simd reduction(+ : below)
      for (int i = 0; i < n; ++i) below += tile[i] < veto;  // veto < 0, so no masked token is
      vetoed |= below > 0;
    });
    const int64_t count = t.level == 2 ? count_tokens(mask, end - begin) : 1;
    common = C(exp_of(count > 1 ? sum / double(count) : sum));
  }
  if (vetoed) {
    for (int64_t i = 0; i < end - begin; ++i) weights[i] = C(0), keep[i] = 0;
    return;
  }
  each_tile(end - begin, [&](int64_t at, int n, int full) {
    if (t.level == 0) {
      log_ratios(at, n);
#pragma omp simd
      for (int i = 0; i < full; ++i) tile[i] = exp_of(tile[i]);
    } else {
      for (int i = 0; i < full; ++i) tile[i] = common;
    }
    write(tile, mask ? mask + at : nullptr, n, C(t.low), C(t.high), t.reject, weights + at, keep + at);
  });
}

}  // namespace

void rollout_correction_sequences(const RolloutTask& t, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) t.is_double ? sequence<double>(t, s) : sequence<float>(t, s);
}

}  // namespace gradops::GRADOPS_ISA
