#include "rl/selective_log_softmax.h"

#include "rl/softmax_block.h"

namespace gradops::GRADOPS_ISA {
namespace {

SoftmaxPart merged(const SoftmaxPart& a, const SoftmaxPart& b) {
  if (a.max == -kInfinity) return {b.max, a.sum + b.sum, b.dot, b.squares, b.cubes};  // a.sum: 0 or NaN
  if (b.max == -kInfinity) return {a.max, a.sum + b.sum, a.dot, a.squares, a.cubes};
  const double max = a.max > b.max ? a.max : b.max, down_a = a.max - max, down_b = b.max - max;
  const double fa = exp_of(down_a), fb = exp_of(down_b);
  // what is infinitely far down does not count
  const double dot_a = fa == 0 ? 0 : fa * (a.dot + a.sum * down_a), dot_b = fb == 0 ? 0 : fb * (b.dot + b.sum * down_b);
  return {max, fa * a.sum + fb * b.sum, dot_a + dot_b, fa * fa * a.squares + fb * fb * b.squares,
          fa * fa * fa * a.cubes + fb * fb * fb * b.cubes};
}

double lanes_sum(Floats x) {
  double s = 0;
  for (int i = 0; i < kWide; ++i) s += double(x[i]);
  return s;
}

// --- logits of 4 bytes and less: float vectors -------------------------------------------------------------------

// kMode 0: sums of e^d. 1: and of e^d d. 2: and of e^2d, e^3d.
struct Sums {
  Floats sum{}, dot{}, squares{}, cubes{};
  void operator+=(const Sums& o) { sum += o.sum, dot += o.dot, squares += o.squares, cubes += o.cubes; }
};
template <int kMode>
[[gnu::always_inline]] inline void add(Sums& s, Floats y) {  // y = d log2(e)
  if constexpr (kMode > 0) y = larger(all(kLowest), y);      // 0 * -inf would be NaN
  const Floats e = exp2_of(y);
  s.sum += e;
  if constexpr (kMode > 0) s.dot += e * y;
  if constexpr (kMode > 1) {
    const Floats square = e * e;
    s.squares += square, s.cubes += square * e;
  }
}

template <class T>
float top_of(const T* x, int64_t n) {  // n: of pairs of vectors
  Floats a = all(-float(kInfinity)), b = a;
  for (int64_t i = 0; i < n; i += kPair) {
    const Two v = load(x + i);
    a = larger(v.a, a), b = larger(v.b, b);
  }
  return top_lane(larger(a, b));
}

// One pass: the largest entry is not known before, so exponents are taken from an earlier run's largest. Where a run's
// sums tell that one of its entries is far above, it is done once more.
template <int kMode, bool kCapped, class T>
class RowPart {
 public:
  explicit RowPart(const LogSoftmaxTask& t)
      : cap_(t.softcap), rate_(all(float(1 / (kLn2 * t.temperature)))), inverse_(1 / t.temperature) {}

  SoftmaxPart of(const T* x, int64_t n) {
    part_ = {-kInfinity, 0, 0, 0, 0};
    base_ = -float(kInfinity);
    const int64_t whole = n / kPair * kPair;
    int runs = 0;
    for (int64_t b = 0; b < whole; b += kRun) {
      visit(x + b, whole - b < kRun ? whole - b : kRun);
      if (++runs % kRunsInFloat == 0) to_double();
    }
    if (whole < n) {
      T rest[kPair];
      for (int64_t i = 0; i < kPair; ++i)
        if (i < n - whole)
          rest[i] = x[whole + i];
        else
          narrow(-float(kInfinity), rest[i]);
      visit(rest, kPair);
    }
    close();
    return part_;
  }

 private:
  // The longest row of additions in float: that of a run, kRun / kPair, and then kRunsInFloat.
  static constexpr int64_t kRun = 32 * kPair;
  static constexpr int kRunsInFloat = 16;
  static constexpr float kFar = 1024;  // no sum of a lane reaches it unless an entry is above the base

  Floats capped(Floats x) const {
    Floats slope;
    return kCapped ? cap_(x, slope) : x;
  }

  void visit(const T* x, int64_t n) {
    if (base_ == -float(kInfinity)) {
      const float top = top_of(x, n);
      if (top == -float(kInfinity)) {  // every entry is masked, or NaN
        for (int64_t i = 0; i < n; ++i)
          if (widen(x[i]) != widen(x[i])) part_.sum = __builtin_nan("");
        return;
      }
      base_ = capped(all(top))[0];
    }
    Sums s = run(x, n);
    if (top_lane(larger(s.sum, Floats{})) > kFar) {
      close();
      base_ = capped(all(top_of(x, n)))[0];
      s = run(x, n);
    }
    sums_ += s;
  }

  Sums run(const T* x, int64_t n) const {
    Sums a, b;
    const Floats base = all(base_);
#pragma GCC unroll 2
    for (int64_t i = 0; i < n; i += kPair) {
      const Two v = load(x + i);
      add<kMode>(a, (capped(v.a) - base) * rate_);
      add<kMode>(b, (capped(v.b) - base) * rate_);
    }
    a += b;
    return a;
  }

  void to_double() {
    now_.sum += lanes_sum(sums_.sum);
    if (kMode > 0) now_.dot += kLn2 * lanes_sum(sums_.dot);
    if (kMode > 1) now_.squares += lanes_sum(sums_.squares), now_.cubes += lanes_sum(sums_.cubes);
    sums_ = Sums();
  }
  void close() {  // what was summed on this base goes to part_
    to_double();
    now_.max = double(base_) * inverse_;
    part_ = merged(part_, now_);
    now_ = {};
  }

  const Cap cap_;
  const Floats rate_;
  const double inverse_;
  float base_ = 0;
  Sums sums_;
  SoftmaxPart now_{}, part_{};
};

template <class T>
double z_of(const LogSoftmaxTask& t, T x) {  // as the sums saw it
  Floats slope;
  const float y = t.softcap > 0 ? Cap(t.softcap)(all(widen(x)), slope)[0] : widen(x);
  return double(y) / t.temperature;
}

// --- float64 logits ----------------------------------------------------------------------------------------------

template <int kMode, bool kCapped>
class RowPart<kMode, kCapped, double> {
 public:
  explicit RowPart(const LogSoftmaxTask& t) : t_(t) {}
  SoftmaxPart of(const double* x, int64_t n) const {
    SoftmaxPart part{-kInfinity, 0, 0, 0, 0};
    for (int64_t b = 0; b < n; b += kRun) part = merged(part, run(x + b, n - b < kRun ? n - b : kRun));
    return part;
  }

 private:
  static constexpr int64_t kRun = 2048;
  double z(double x) const {
    double slope;
    return (kCapped ? capped(x, t_.softcap, slope) : x) / t_.temperature;
  }
  SoftmaxPart run(const double* x, int64_t n) const {
    double top = -kInfinity;
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top, nan |= x[i] != x[i];
    if (top == -kInfinity) return {top, nan ? __builtin_nan("") : 0, 0, 0, 0};
    const double base = z(top);
    double sum = 0, dot = 0, squares = 0, cubes = 0;
#pragma omp simd reduction(+ : sum, dot, squares, cubes)
    for (int64_t i = 0; i < n; ++i) {
      const double d = z(x[i]) - base, e = exp_of(d);
      sum += e, dot += e * (d < -800 ? -800 : d), squares += e * e, cubes += e * e * e;
    }
    return {base, sum, dot, squares, cubes};
  }
  const LogSoftmaxTask& t_;
};

double z_of(const LogSoftmaxTask& t, double x) {
  double slope;
  return capped(x, t.softcap, slope) / t.temperature;
}

// --- any logits --------------------------------------------------------------------------------------------------

template <int kMode, bool kCapped, class T>
void parts_of(const LogSoftmaxTask& t, int64_t begin, int64_t end, SoftmaxPart* parts) {
  using A = Arithmetic<T>;
  RowPart<kMode, kCapped, T> row_part(t);
  RowPart<kMode, kCapped, A> kept_part(t);
  const int64_t chunks = softmax_chunks(t);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / chunks, first = i % chunks * kSoftmaxChunk;
    const T* x = static_cast<const T*>(t.logits) + row * t.cols;
    if (!t.keep_ids) {
      parts[i] = row_part.of(x + first, t.cols - first < kSoftmaxChunk ? t.cols - first : kSoftmaxChunk);
      continue;
    }
    parts[i] = {-kInfinity, 0, 0, 0, 0};
    A kept[kBlock];
    for (int64_t b = t.keep_offsets[row], last = t.keep_offsets[row + 1]; b < last; b += kBlock) {
      const int64_t n = last - b < kBlock ? last - b : kBlock;
      for (int64_t j = 0; j < n; ++j) kept[j] = widen(x[t.keep_ids[b + j]]);
      parts[i] = merged(parts[i], kept_part.of(kept, n));
    }
  }
}

}  // namespace

void log_softmax_parts(const LogSoftmaxTask& t, int64_t begin, int64_t end, SoftmaxPart* parts) {
  with_capped(t.softcap, t.element, [&](auto is_capped, auto zero) {
    constexpr bool kCapped = decltype(is_capped)::value;
    using T = decltype(zero);
    const auto f = t.sum_p2 ? parts_of<2, kCapped, T> : t.entropy ? parts_of<1, kCapped, T> : parts_of<0, kCapped, T>;
    if constexpr (sizeof(T) == 8)
      f(t, begin, end, parts);
    else
      flushing_denormals([&] { f(t, begin, end, parts); });
  });
}

void log_softmax_finish(const LogSoftmaxTask& t, int64_t begin, int64_t end, const SoftmaxPart* parts) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    const int64_t chunks = softmax_chunks(t);
    for (int64_t r = begin; r < end; ++r) {
      SoftmaxPart part{-kInfinity, 0, 0, 0, 0};
      for (int64_t i = 0; i < chunks; ++i) part = merged(part, parts[r * chunks + i]);
      const double log_sum = log_of(part.sum), inverse = 1 / part.sum;
      const double entropy = log_sum - part.dot * inverse;
      t.lse[r] = part.max + log_sum;
      if (t.entropy) t.entropy[r] = entropy < 0 ? 0 : entropy;  // rounding must not leave the range
      if (t.sum_p2) t.sum_p2[r] = part.squares * inverse * inverse;
      if (t.sum_p3) t.sum_p3[r] = part.cubes * inverse * inverse * inverse;
      const T* x = static_cast<const T*>(t.logits) + r * t.cols;
      for (int64_t k = r * t.targets; k < (r + 1) * t.targets; ++k) {
        const int64_t id = t.index[k];
        int64_t place = t.keep_ids ? t.keep_offsets[r] : 0;
        const bool absent = t.keep_ids && id >= 0 && !find(t.keep_ids, place, t.keep_offsets[r + 1], id);
        const double logp = id < 0 ? 0 : ((absent ? -kInfinity : z_of(t, x[id])) - part.max) - log_sum;
        t.logp[k] = logp > 0 ? 0 : logp;
      }
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
