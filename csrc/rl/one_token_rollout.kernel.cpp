#include "rl/one_token_rollout.h"

#include "common/exp_log.h"
#include "common/float_vectors.h"
#include "common/philox.h"

namespace gradops::GRADOPS_ISA {
namespace {

static_assert(kBlock % kRolloutSegment == 0 && kRolloutSegment % kPair == 0);

template <class T>
constexpr bool kIsDouble = sizeof(T) == 8;

template <int H, int... N>
[[gnu::always_inline]] inline Floats fold_sum(Floats x, std::integer_sequence<int, N...> lanes) {
  x += __builtin_shufflevector(x, x, (N ^ H)...);
  if constexpr (H > 1) return fold_sum<H / 2>(x, lanes);
  return x;
}
[[gnu::always_inline]] inline double lane_sum(Floats x) {
  return double(fold_sum<kWide / 2>(x, std::make_integer_sequence<int, kWide>())[0]);
}

// n logits from z, or copied to `rest` and filled up with -inf, which adds nothing to any sum.
template <class T>
const T* filled(const T* z, int64_t n, int64_t up_to, T* rest) {
  if (n == up_to) return z;
  for (int64_t c = 0; c < up_to; ++c) narrow(c < n ? widen(z[c]) : -decltype(widen(*z))(kInfinity), rest[c]);
  return rest;
}
int64_t whole_pairs(int64_t n) { return (n + kPair - 1) / kPair * kPair; }

// Sums over a row with d = z - max, kept relative to the largest logit so far.
template <class T>
struct Row {
  double max = -kInfinity, p = 0, q = 0, qd = 0;  // of e^d, e^(d / temperature), d e^(d / temperature)
  double inverse;                                 // of the temperature

  explicit Row(double temperature) : inverse(1 / temperature) {}
  double shift() const { return max > -kInfinity ? max : 0; }  // no -inf - -inf

  void raise(double to) {
    if (!(to > max)) return;
    if (max > -kInfinity) {
      const double d = max - to, scale = exp_of(d * inverse);
      p *= exp_of(d);
      qd = scale == 0 ? 0 : scale * (qd + q * d);
      q *= scale;
    }
    max = to;
  }

  void add(const T* z, int64_t n) {  // n: of pairs of vectors
    if constexpr (kIsDouble<T>) {
      double big = -kInfinity;  // a NaN is passed over: the sums will show it
      for (int64_t c = 0; c < n; ++c) big = z[c] > big ? z[c] : big;
      raise(big);
      const double base = shift(), rate = inverse;
      double sum_p = 0, sum_q = 0, sum_qd = 0;
#pragma omp simd reduction(+ : sum_p, sum_q, sum_qd)
      for (int64_t c = 0; c < n; ++c) {
        const double d = z[c] - base, e = exp_of(d * rate);
        sum_p += exp_of(d);
        sum_q += e;
        sum_qd += e * (d < -1e30 ? -1e30 : d);  // -inf has the weight 0
      }
      p += sum_p, q += sum_q, qd += sum_qd;
    } else {
      Floats top = all(-float(kInfinity)), top_b = top;
      for (int64_t c = 0; c < n; c += kPair) {
        const Two v = load(z + c);
        top = larger(v.a, top), top_b = larger(v.b, top_b);
      }
      raise(double(top_lane(larger(top, top_b))));
      const Floats base = all(float(shift())), rate_p = all(kLog2E), rate_q = all(float(inverse / kLn2));
      Floats sum_p{}, sum_q{}, sum_qd{};
      const auto each = [&](Floats x) {
        const Floats d = x - base, y = larger(all(kLowest), d * rate_q), e = exp2_of(y);
        sum_p += exp2_of(d * rate_p);
        sum_q += e;
        sum_qd += e * y;
      };
      for (int64_t c = 0; c < n; c += kPair) {
        const Two v = load(z + c);
        each(v.a), each(v.b);
      }
      p += lane_sum(sum_p), q += lane_sum(sum_q), qd += lane_sum(sum_qd) * kLn2 / inverse;
    }
  }
};

// Of one segment, in order, and their sum
template <class T>
double segment_weights(const T* z, double shift, double inverse, double* e) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < kRolloutSegment; ++c) sum += e[c] = exp_of((double(widen(z[c])) - shift) * inverse);
  return sum;
}
template <class T>
double segment_sum(const T* z, double shift, double inverse) {
  if constexpr (kIsDouble<T>) {
    double e[kRolloutSegment];
    return segment_weights(z, shift, inverse, e);
  } else {
    const Floats base = all(float(shift)), rate = all(float(inverse / kLn2));
    Floats a{}, b{};
    for (int64_t c = 0; c < kRolloutSegment; c += kPair) {
      const Two v = load(z + c);
      a += exp2_of(larger(all(kLowest), (v.a - base) * rate)), b += exp2_of(larger(all(kLowest), (v.b - base) * rate));
    }
    return lane_sum(a + b);
  }
}

// Draws k columns with probability q, in ascending order: the order statistics of k uniform numbers are the partial
// sums of k + 1 exponential ones over their total. upto[s]: the sum of the weights of the segments 0 to s.
template <class T>
void draw(const T* z, int64_t cols, double shift, double inverse, uint64_t seed, int64_t k, int64_t* samples,
          double* upto) {
  T rest[kRolloutSegment];
  double e[kRolloutSegment], total = 0, sum = 0, reached = 0;
  const int64_t segments = (cols + kRolloutSegment - 1) / kRolloutSegment;
  const auto length = [=](int64_t s) { return s + 1 < segments ? kRolloutSegment : cols - s * kRolloutSegment; };
  const auto segment = [&](int64_t s) { return filled(z + s * kRolloutSegment, length(s), kRolloutSegment, rest); };
  for (int64_t s = 0; s < segments; ++s) upto[s] = total += segment_sum(segment(s), shift, inverse);
  for (int64_t i = 0; i < k; ++i) {
    sum -= log_of(philox_uniform(seed, i));
    samples[i] = __builtin_bit_cast(int64_t, sum);
  }
  const double scale = total / (sum - log_of(philox_uniform(seed, k)));
  for (int64_t i = 0, s = 0, loaded = -1, c = 0; i < k; ++i) {
    const double r = __builtin_bit_cast(double, samples[i]) * scale;
    while (s + 1 < segments && upto[s] <= r) ++s;
    if (loaded != s) {
      segment_weights(segment(s), shift, inverse, e);
      loaded = s, c = 0, reached = s ? upto[s - 1] : 0;
    }
    while (c < length(s) && !(reached + e[c] > r)) reached += e[c++];
    int64_t pick = c < length(s) ? c : length(s) - 1;  // the segment's sum may round to more than its parts
    while (pick > 0 && !(e[pick] > 0)) --pick;
    samples[i] = s * kRolloutSegment + pick;
  }
}

template <class T>
void forward(const OneTokenRolloutTask& t, int64_t row, double* scratch) {
  const T* z = static_cast<const T*>(t.logits) + row * t.cols;
  T rest[kBlock];
  Row<T> sums(t.temperature);
  for (int64_t begin = 0; begin < t.cols; begin += kBlock) {
    const int64_t n = begin + kBlock < t.cols ? kBlock : t.cols - begin;
    sums.add(filled(z + begin, n, whole_pairs(n), rest), whole_pairs(n));
  }
  const double log_p = log_of(sums.p), log_q = log_of(sums.q);
  double* state = t.state + 3 * row;
  state[0] = sums.max, state[1] = log_p, state[2] = log_q;
  const int64_t x = t.targets[row];
  double loss;
  if (t.k) {
    int64_t* samples = t.samples + row * t.k;
    draw(z, t.cols, sums.shift(), sums.inverse, uint64_t(t.seeds[row]), t.k, samples, scratch);
    loss = 0;
    for (int64_t i = 0; i < t.k; ++i)
      loss -= (samples[i] == x ? 1 : t.beta) * (double(widen(z[samples[i]])) - sums.max - log_p);
    loss /= double(t.k);
  } else {
    const double d = double(widen(z[x])) - sums.max, q = exp_of(d * sums.inverse - log_q);
    loss = -(q == 0 ? 0 : (1 - t.beta) * q * (d - log_p)) - t.beta * (sums.qd / sums.q - log_p);
  }
  static_cast<Arithmetic<T>*>(t.loss)[row] = Arithmetic<T>(loss);
}

// to = on_p p - on_q q; without q if on_q is 0
template <class T>
void write(const T* z, int64_t cols, const double* state, double inverse, double on_p, double on_q, T* to) {
  if constexpr (kIsDouble<T>) {
    const double max = state[0], log_p = state[1], log_q = state[2];
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c)
      to[c] = on_p * exp_of(z[c] - max - log_p) - (on_q == 0 ? 0 : on_q * exp_of((z[c] - max) * inverse - log_q));
  } else {
    const Floats max = all(float(state[0])), log_p = all(float(state[1] / kLn2)), log_q = all(float(state[2] / kLn2));
    const Floats rate_p = all(kLog2E), rate_q = all(float(inverse / kLn2)), p = all(float(on_p)), q = all(float(on_q));
    const auto power = [](Floats y) { return exp2_of(larger(all(kLowest), y)) - kNothing; };  // 0 at -inf
    const auto one = [&](Floats x) { return p * power((x - max) * rate_p - log_p); };
    const auto both = [&](Floats x) { return one(x) - q * power((x - max) * rate_q - log_q); };
    const auto run = [&](const auto& f) {
      int64_t c = 0;
      for (; c + kPair <= cols; c += kPair) {
        const Two v = load(z + c);
        store({f(v.a), f(v.b)}, to + c);
      }
      for (; c < cols; ++c) narrow(f(all(widen(z[c])))[0], to[c]);
    };
    on_q == 0 ? run(one) : run(both);
  }
}

template <class T>
void backward(const OneTokenRolloutBackwardTask& t, int64_t row) {
  const T* z = static_cast<const T*>(t.logits) + row * t.cols;
  T* to = static_cast<T*>(t.grad_logits) + row * t.cols;
  const double* state = t.state + 3 * row;
  const double g = double(static_cast<const Arithmetic<T>*>(t.grad)[row]), inverse = 1 / t.temperature;
  const int64_t x = t.targets[row];
  // at an entry of weight w that is no multiple of q
  const auto put = [=](int64_t c, double reward, double w) {
    narrow(g * reward * exp_of(double(widen(z[c])) - state[0] - state[1]) - g * w, to[c]);
  };
  if (t.k == 0) {
    const double q = exp_of((double(widen(z[x])) - state[0]) * inverse - state[2]), reward = (1 - t.beta) * q + t.beta;
    write(z, t.cols, state, inverse, g * reward, g * t.beta, to);
    put(x, reward, q);
    return;
  }
  const int64_t* samples = t.samples + row * t.k;
  double reward = 0;
  for (int64_t i = 0; i < t.k; ++i) reward += samples[i] == x ? 1 : t.beta;
  reward /= double(t.k);
  write(z, t.cols, state, inverse, g * reward, 0, to);
  for (int64_t i = 0, end; i < t.k; i = end) {
    for (end = i + 1; end < t.k && samples[end] == samples[i];) ++end;
    put(samples[i], reward, (samples[i] == x ? 1 : t.beta) * double(end - i) / double(t.k));
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
