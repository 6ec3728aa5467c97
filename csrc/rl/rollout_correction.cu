// One block per sequence: thread i takes tokens i, i + kThreads, ...
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "rl/rollout_correction.h"
#include "rl/token_range.cuh"

namespace gradops {
namespace {

constexpr int kThreads = 256;

template <class C>
__global__ void __launch_bounds__(kThreads) rollout_blocks(const __grid_constant__ RolloutTask t) {
  __shared__ double scratch[32];
  const auto all = [&](double v) { return block_all(v, 0., scratch, Add()); };
  const int64_t s = blockIdx.x;
  const auto [begin, end] = token_range(t, s);
  const int64_t first = begin + threadIdx.x;
  const auto kept = [=](int64_t i) { return !t.mask || t.mask[i]; };
  const auto log_ratio = [=](int64_t i) {
    return static_cast<const C*>(t.old_logp)[i] - static_cast<const C*>(t.rollout_logp)[i];
  };
  const C veto = C(t.log_veto), low = C(t.low), high = C(t.high);
  const bool may_veto = t.log_veto > -1e308;
  double sum = 0, count = 0, below = 0;
  if (may_veto || t.level > 0)
    for (int64_t i = first; i < end; i += kThreads)
      if (kept(i)) {
        const C d = log_ratio(i);
        sum += double(d);
        below += d < veto;
        count += 1;
      }
  if (may_veto) below = all(below);
  C common = C(0);
  if (t.level > 0) {
    sum = all(sum);
    count = all(count);
    common = C(exp(t.level == 2 && count > 1 ? sum / count : sum));
  }
  for (int64_t i = first; i < end; i += kThreads) {
    C weight = C(0);
    bool keep = kept(i) && !(below > 0);
    if (keep) {
      const C r = t.level == 0 ? exp_of(log_ratio(i)) : common;
      const bool inside = r >= low && r <= high;
      weight = t.reject ? (inside ? r : C(0)) : r < low ? low : r > high ? high : r;
      keep = inside || !t.reject;
    }
    static_cast<C*>(t.weights)[i] = weight;
    t.keep[i] = keep;
  }
}

}  // namespace

void cuda::rollout_correction(const RolloutTask& t, void* stream) {
  if (t.sequences == 0) return;
  launch(t.is_double ? rollout_blocks<double> : rollout_blocks<float>, blocks(t.sequences), kThreads, 0, stream, t);
}

}  // namespace gradops
