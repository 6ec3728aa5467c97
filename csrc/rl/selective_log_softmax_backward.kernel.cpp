#include "rl/selective_log_softmax.h"
#include "rl/softmax_block.h"

namespace gradops::GRADOPS_ISA {
namespace {

// Whether the gradient goes past the caches, which it would not fit into: a store need then not read the line first.
// For 16-bit ones the arithmetic takes as long as that, and gains nothing.
bool streams(const LogSoftmaxGradTask& t) {
  constexpr int64_t kLarge = 16 << 20;  // entries
  return t.element == Element::f32 && t.grad != t.logits && !t.keep_ids && t.rows * t.cols >= kLarge;
}
// Entries before the first that may be streamed to
template <class T>
int64_t entries_to_boundary(const T* y) {
  return int64_t(-reinterpret_cast<uintptr_t>(y) % kVectorBytes / sizeof(T));
}

// p (slope + bend log p) dz/dx, with log p = z - lse = (cap(x) - base) / temperature - rest, so that no digits are lost
// where logits are large. p = e^-rest e^(...), and the first factor goes into the others.
template <bool kCapped, bool kBend>
class GradFloats {
 public:
  GradFloats(const LogSoftmaxGradTask& t, double lse, double slope, double bend)
      : cap_(t.softcap),
        base_(all(float(lse * t.temperature))),
        rate_(all(float(1 / (kLn2 * t.temperature)))),
        inverse_(1 / t.temperature),
        streams_(streams(t)) {
    const double rest = lse - double(base_[0]) * inverse_, scale = (1 - rest) * inverse_;  // e^-rest: rest is tiny
    slope_ = all(number(scale * (slope - rest * bend))), bend_ = all(number(scale * inverse_ * bend));
  }

  [[gnu::always_inline]] Floats operator()(Floats x) const {
    Floats dy;
    if constexpr (kCapped) x = cap_(x, dy);
    Floats d = x - base_;
    if constexpr (kBend) d = larger(lowest_, d);  // 0 * -inf would be NaN
    const Floats p = powers_(d, rate_), g = p * (kBend ? d * bend_ + slope_ : slope_);
    return kCapped ? g * dy : g;
  }
  float operator()(float x) const { return (*this)(all(x))[0]; }
  float dz(float x) const {
    Floats dy = all(1);
    if constexpr (kCapped) cap_(all(x), dy);
    return float(inverse_) * dy[0];
  }
  template <class T>
  void run(const T* x, T* y, int64_t n) const {
    int64_t i = 0;
    if constexpr (sizeof(T) == 4)
      if (streams_ && entries_to_boundary(y) == 0)
        for (; i + kPair <= n; i += kPair) {
          const Two v = load(x + i);
          stream({(*this)(v.a), (*this)(v.b)}, y + i);
        }
    for (; i + kPair <= n; i += kPair) {
      const Two v = load(x + i);
      store({(*this)(v.a), (*this)(v.b)}, y + i);
    }
    for (; i < n; ++i) narrow((*this)(widen(x[i])), y[i]);
  }

 private:
  static float number(double x) { return x != x ? __builtin_nanf("") : float(x); }  // as rounding to bfloat16 wants NaN
  const Cap cap_;
  const Powers powers_{};
  const Floats base_, rate_, lowest_ = all(-200.f) / rate_;
  const double inverse_;
  const bool streams_;
  Floats slope_, bend_;
};

class GradDoubles {
 public:
  GradDoubles(const LogSoftmaxGradTask& t, double lse, double slope, double bend)
      : t_(t), lse_(lse), slope_(slope), bend_(bend) {}
  double operator()(double x) const {
    double dy;
    const double log_p = capped(x, t_.softcap, dy) / t_.temperature - lse_, p = exp_of(log_p);
    return p * (slope_ + bend_ * (log_p < -800 ? -800 : log_p)) * dy / t_.temperature;
  }
  double dz(double x) const {
    double dy;
    capped(x, t_.softcap, dy);
    return dy / t_.temperature;
  }
  void run(const double* x, double* y, int64_t n) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = (*this)(x[i]);
  }

 private:
  const LogSoftmaxGradTask& t_;
  const double lse_, slope_, bend_;
};

// The gradient at x[0, n), written to y, which may be x. place(id): where in x the entry id is; negative: not there.
template <class T, class Grad, class Place>
void grad_block(const Grad& grad, const T* x, T* y, int64_t n, const double* g, const int64_t* index, int64_t targets,
                const Place& place) {
  T old[kBlock];
  double sum[kBlock];  // of g, for each of the targets here; one may be chosen more than once
  bool any = false;
  for (int64_t k = 0; k < targets; ++k)
    if (const int64_t i = place(index[k]); i >= 0) any = true, old[i] = x[i], sum[i] = 0;
  grad.run(x, y, n);
  if (!any) return;
  for (int64_t k = 0; k < targets; ++k)
    if (const int64_t i = place(index[k]); i >= 0) sum[i] += g[k];
  using A = Arithmetic<T>;
  for (int64_t k = 0; k < targets; ++k)
    if (const int64_t i = place(index[k]); i >= 0)
      narrow(grad(widen(old[i])) + A(sum[i]) * grad.dz(widen(old[i])), y[i]);
}

template <class Grad, class T>
void grads_of(const LogSoftmaxGradTask& t, int64_t begin, int64_t end) {
  using A = Arithmetic<T>;
  const int64_t chunks = softmax_chunks(t);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / chunks, first = t.keep_ids ? 0 : i % chunks * kSoftmaxChunk;
    const int64_t last = t.keep_ids || first + kSoftmaxChunk > t.cols ? t.cols : first + kSoftmaxChunk;
    const T* x = static_cast<const T*>(t.logits) + row * t.cols;
    T* y = static_cast<T*>(t.grad) + row * t.cols;
    const int64_t targets = t.grad_logp ? t.targets : 0, *index = t.index + row * t.targets;
    const double* g = t.grad_logp + row * targets;
    const double bend = t.grad_entropy ? -t.grad_entropy[row] : 0;
    double slope = (t.grad_lse ? t.grad_lse[row] : 0) + (t.grad_entropy ? bend * t.entropy[row] : 0);
    bool zero = bend == 0 && slope == 0;
    for (int64_t k = 0; k < targets; ++k) slope -= g[k], zero &= g[k] == 0;
    if (zero) {
      for (int64_t j = first; j < last; ++j) y[j] = T();
      continue;
    }
    const Grad grad(t, t.lse[row], slope, bend);
    if (!t.keep_ids) {
      const int64_t lead = streams(t) ? entries_to_boundary(y + first) : 0;
      for (int64_t b = first, n; b < last; b += n) {
        n = b == first && lead ? lead : kBlock;
        if (n > last - b) n = last - b;
        grad_block(grad, x + b, y + b, n, g, index, targets,
                   [=](int64_t id) { return id >= b && id < b + n ? id - b : -1; });
      }
      continue;
    }
    int64_t written = 0;
    A kept[kBlock];
    for (int64_t b = t.keep_offsets[row]; b < t.keep_offsets[row + 1]; b += kBlock) {
      const int64_t n = t.keep_offsets[row + 1] - b < kBlock ? t.keep_offsets[row + 1] - b : kBlock;
      const int64_t* ids = t.keep_ids + b;
      for (int64_t j = 0; j < n; ++j) kept[j] = widen(x[ids[j]]);
      grad_block(grad, kept, kept, n, g, index, targets, [=](int64_t id) {
        int64_t place = 0;
        return find(ids, place, n, id) ? place : -1;
      });
      for (; written <= ids[n - 1]; ++written) y[written] = T();
      for (int64_t j = 0; j < n; ++j) narrow(kept[j], y[ids[j]]);
    }
    for (; written < t.cols; ++written) y[written] = T();
  }
}

}  // namespace

void log_softmax_grad(const LogSoftmaxGradTask& t, int64_t begin, int64_t end) {
  with_capped(t.softcap, t.element, [&](auto is_capped, auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 8)
      grads_of<GradDoubles, T>(t, begin, end);
    else
      flushing_denormals([&] {
        constexpr bool kCapped = decltype(is_capped)::value;
        const auto f =
            t.grad_entropy ? grads_of<GradFloats<kCapped, true>, T> : grads_of<GradFloats<kCapped, false>, T>;
        f(t, begin, end);
        if (streams(t)) streamed();
      });
  });
}

}  // namespace gradops::GRADOPS_ISA
