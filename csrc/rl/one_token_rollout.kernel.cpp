#include "rl/one_token_rollout.h"

#include "common/exp_log.h"
#include "common/philox.h"
#include "common/simd.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // logits that are worked on in the first-level cache
static_assert(kBlock % kRolloutSegment == 0);

template <class T>
struct ComputeIn {
  using type = float;
};
template <>
struct ComputeIn<double> {
  using type = double;
};

// A block of the row, widened; filled up with -inf, which adds nothing to any sum. Returns the filled length.
template <class T, class C>
[[gnu::always_inline]] inline int64_t load(const T* z, int64_t n, C* to) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) to[c] = C(widen(z[c]));
  const int64_t filled = (n + kRolloutSegment - 1) / kRolloutSegment * kRolloutSegment;
  for (int64_t c = n; c < filled; ++c) to[c] = -C(__builtin_inf());
  return filled;
}

template <class C>
[[gnu::always_inline]] inline C largest(const C* z, int64_t filled) {  // a NaN is passed over: the sums will show it
  Vec<C> m = vec_at(z);
  for (int64_t c = kLanes<C>; c < filled; c += kLanes<C>) m = vec_at(z + c) > m ? vec_at(z + c) : m;
  C big = -C(__builtin_inf());
  for (int i = 0; i < kLanes<C>; ++i) big = m[i] > big ? m[i] : big;
  return big;
}

// Sums over a row with d = z - max, kept relative to the largest logit so far.
template <class C>
struct Sums {
  C max = -C(__builtin_inf());
  double p = 0, q = 0, qd = 0;  // of e^d, e^(d / temperature), d e^(d / temperature)

  void raise(C to, double inverse) {
    if (!(to > max)) return;
    if (max > -C(__builtin_inf())) {
      const double d = double(max) - double(to), scale = exp_of(d * inverse);
      p *= exp_of(d);
      qd = scale * (qd + q * d);
      q *= scale;
    }
    max = to;
  }
  C shift() const { return max > -C(__builtin_inf()) ? max : C(0); }  // no -inf - -inf
};

template <class C>
[[gnu::always_inline]] inline void add_block(const C* z, int64_t filled, C inverse, Sums<C>& sums) {
  sums.raise(largest(z, filled), double(inverse));
  const C shift = sums.shift();
  C p = 0, q = 0, qd = 0;
#pragma omp simd reduction(+ : p, q, qd)
  for (int64_t c = 0; c < filled; ++c) {
    const C d = z[c] - shift, e = exp_of(d * inverse);
    p += exp_of(d);
    q += e;
    qd += e * (d < C(-1e30) ? C(-1e30) : d);  // -inf has the weight 0
  }
  sums.p += double(p);
  sums.q += double(q);
  sums.qd += double(qd);
}

template <class C>
[[gnu::always_inline]] inline void weights(const C* z, C shift, C inverse, C* e) {  // of one segment
#pragma omp simd
  for (int64_t c = 0; c < kRolloutSegment; ++c) e[c] = exp_of((z[c] - shift) * inverse);
}

// Draws k columns with probability q, in ascending order: the order statistics of k uniform numbers are the partial
// sums of k + 1 exponential ones over their total.
template <class T, class C>
void draw(const T* z, int64_t cols, C shift, C inverse, uint64_t seed, int64_t k, int64_t* samples, double* upto) {
  alignas(kVectorBytes) C block[kBlock], e[kRolloutSegment];
  double total = 0;
  for (int64_t begin = 0, s = 0; begin < cols; begin += kBlock) {
    const int64_t filled = load(z + begin, begin + kBlock < cols ? kBlock : cols - begin, block);
    for (int64_t at = 0; at < filled; at += kRolloutSegment, ++s) {
      weights(block + at, shift, inverse, e);
      C sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < kRolloutSegment; ++c) sum += e[c];
      upto[s] = total += double(sum);
    }
  }
  const int64_t segments = (cols + kRolloutSegment - 1) / kRolloutSegment;
  double sum = 0, reached = 0;
  for (int64_t i = 0; i < k; ++i) {
    sum -= log_of(philox_uniform(seed, i));
    samples[i] = __builtin_bit_cast(int64_t, sum);
  }
  const double scale = total / (sum - log_of(philox_uniform(seed, k)));
  for (int64_t i = 0, s = 0, loaded = -1, c = 0; i < k; ++i) {
    const double r = __builtin_bit_cast(double, samples[i]) * scale;
    while (s + 1 < segments && upto[s] <= r) ++s;
    const int64_t begin = s * kRolloutSegment;
    const int64_t length = begin + kRolloutSegment < cols ? kRolloutSegment : cols - begin;
    if (loaded != s) {
      load(z + begin, length, block);
      weights(block, shift, inverse, e);
      loaded = s, c = 0, reached = s ? upto[s - 1] : 0;
    }
    while (c < length && !(reached + double(e[c]) > r)) reached += double(e[c++]);
    int64_t pick = c < length ? c : length - 1;  // the segment's sum may round to more than its parts
    while (pick > 0 && !(e[pick] > 0)) --pick;
    samples[i] = begin + pick;
  }
}

template <class T>
void forward(const OneTokenRolloutTask& t, int64_t row, double* scratch) {
  using C = typename ComputeIn<T>::type;
  alignas(kVectorBytes) C block[kBlock];
  const T* z = static_cast<const T*>(t.logits) + row * t.cols;
  const double inverse = 1 / t.temperature;
  Sums<C> sums;
  for (int64_t begin = 0; begin < t.cols; begin += kBlock)
    add_block(block, load(z + begin, begin + kBlock < t.cols ? kBlock : t.cols - begin, block), C(inverse), sums);
  double* state = t.state + 3 * row;
  const double max = double(sums.max), log_p = log_of(sums.p), log_q = log_of(sums.q);
  state[0] = max, state[1] = log_p, state[2] = log_q;
  const int64_t x = t.targets[row];
  double loss;
  if (t.k) {
    int64_t* samples = t.samples + row * t.k;
    draw(z, t.cols, sums.shift(), C(inverse), uint64_t(t.seeds[row]), t.k, samples, scratch);
    loss = 0;
    for (int64_t i = 0; i < t.k; ++i)
      loss -= (samples[i] == x ? 1 : t.beta) * (double(widen(z[samples[i]])) - max - log_p);
    loss /= double(t.k);
  } else {
    const double d = double(widen(z[x])) - max, q = exp_of(d * inverse - log_q);
    loss = -(q == 0 ? 0 : (1 - t.beta) * q * (d - log_p)) - t.beta * (sums.qd / sums.q - log_p);
  }
  static_cast<C*>(t.loss)[row] = C(loss);
}

template <class T>
void backward(const OneTokenRolloutBackwardTask& t, int64_t row) {
  using C = typename ComputeIn<T>::type;
  const T* z = static_cast<const T*>(t.logits) + row * t.cols;
  T* to = static_cast<T*>(t.grad_logits) + row * t.cols;
  const double* state = t.state + 3 * row;
  const double g = double(static_cast<const C*>(t.grad)[row]), inverse = 1 / t.temperature;
  const int64_t x = t.targets[row];
  const C max = C(state[0]), log_p = C(state[1]), log_q = C(state[2]), inv = C(inverse);
  const auto p_at = [=](int64_t c) { return double(exp_of(C(widen(z[c])) - max - log_p)); };
  if (t.k == 0) {
    const double q = exp_of((double(widen(z[x])) - state[0]) * inverse - state[2]);
    const C on_p = C(g * ((1 - t.beta) * q + t.beta)), on_q = C(g * t.beta);
#pragma omp simd
    for (int64_t c = 0; c < t.cols; ++c) {
      const C d = C(widen(z[c])) - max;
      narrow(on_p * exp_of(d - log_p) - on_q * exp_of(d * inv - log_q), to[c]);
    }
    narrow(g * ((1 - t.beta) * q + t.beta) * p_at(x) - g * q, to[x]);
    return;
  }
  const int64_t* samples = t.samples + row * t.k;
  double reward = 0;
  for (int64_t i = 0; i < t.k; ++i) reward += samples[i] == x ? 1 : t.beta;
  reward /= double(t.k);
  const C on_p = C(g * reward);
#pragma omp simd
  for (int64_t c = 0; c < t.cols; ++c) narrow(on_p * exp_of(C(widen(z[c])) - max - log_p), to[c]);
  for (int64_t i = 0, end; i < t.k; i = end) {
    for (end = i + 1; end < t.k && samples[end] == samples[i];) ++end;
    const double w = (samples[i] == x ? 1 : t.beta) * double(end - i) / double(t.k);
    narrow(g * reward * p_at(samples[i]) - g * w, to[samples[i]]);
  }
}

}  // namespace

void one_token_rollout_rows(const OneTokenRolloutTask& t, int64_t begin, int64_t end, double* scratch) {
  with_type(t.element, [&](auto zero) {
    for (int64_t row = begin; row < end; ++row) forward<decltype(zero)>(t, row, scratch);
  });
}

void one_token_rollout_backward_rows(const OneTokenRolloutBackwardTask& t, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) {
    for (int64_t row = begin; row < end; ++row) backward<decltype(zero)>(t, row);
  });
}

}  // namespace gradops::GRADOPS_ISA
