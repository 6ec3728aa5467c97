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

// --- logits of 4 bytes and less: float vectors -------------------------------------------------------------------

// kMode 0: sums of e^d. 1: and of e^d d. 2: and of e^2d, e^3d.
struct Sums {
  Floats sum{}, dot{}, squares{}, cubes{};
  void operator+=(const Sums& o) { sum += o.sum, dot += o.dot, squares += o.squares, cubes += o.cubes; }
};
template <class T>
float top_of(const T* x, int64_t n) {  // n: of pairs of vectors
  Floats a = all(-float(kInfinity)), b = a;
  for (int64_t i = 0; i < n; i += kPair) {
    const Two v = load(x + i);
    a = larger(v.a, a), b = larger(v.b, b);
  }
  return top_lane(larger(a, b));
}

// How far logits are below a base, times the temperature
template <bool kCapped>
struct Below {
  explicit Below(double) {}
  void set_base(float x) { base = all(x), base_value = x; }
  [[gnu::always_inline]] Floats operator()(Floats x) const { return x - base; }
  Floats base;
  double base_value;
};
// Capped ones too are not subtracted from each other, as all their digits may be the same: with e = e^(-2 x / softcap),
// cap(x) = softcap (1 - e) / (1 + e), and cap(x) - cap(x') = 2 softcap (e' - e) / ((1 + e) (1 + e')).
template <>
struct Below<true> {
  explicit Below(double softcap) : softcap(softcap), rate(all(float(-2 / (kLn2 * softcap)))) {}
  [[gnu::always_inline]] Floats exponential(Floats x) const { return exp2_of(-larger(all(kLowest), -(x * rate))); }
  void set_base(float x) {
    base = exponential(all(x));
    const double e = double(base[0]);
    factor = all(float(2 * softcap / (1 + e))), base_value = softcap * (1 - e) / (1 + e);
  }
  [[gnu::always_inline]] Floats operator()(Floats x) const {
    const Floats e = exponential(x), below = (base - e) * factor / (1.f + e);
    return x == all(-float(kInfinity)) ? x : below;  // a masked entry stays masked
  }
  const double softcap;
  const Floats rate;
  Floats base, factor;
  double base_value;
};

// One pass: the largest entry is not known before, so exponents are taken from an earlier run's largest. Where a run's
// sums tell that one of its entries is far above, it is done once more.
template <int kMode, bool kCapped, class T>
class RowPart {
 public:
  explicit RowPart(const LogSoftmaxTask& t)
      : below_(t.softcap), rate_(all(float(1 / (kLn2 * t.temperature)))), inverse_(1 / t.temperature) {}

  SoftmaxPart of(const T* x, int64_t n) {
    part_ = {-kInfinity, 0, 0, 0, 0};
    has_base_ = false;
    const int64_t whole = n / kPair * kPair;
    int runs = 0;
    for (int64_t b = 0, size = kRow; b < whole; b += size, size = kRun) {  // the first run looks for a base
      visit(x + b, whole - b < size ? whole - b : size);
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
  // The longest row of additions in float: of a vector's sum over kRow entries, then of these, then of runs.
  static constexpr int64_t kRow = 32 * kPair, kRun = 4 * kRow;
  static constexpr int kRunsInFloat = 8;
  static constexpr int64_t kAhead = 8192;  // bytes; the processor itself looks less far, and not into the next page
  static constexpr float kFar = 1024;      // no sum of a lane reaches it unless an entry is above the base

  void visit(const T* x, int64_t n) {
    if (!has_base_) {
      const float top = top_of(x, n);
      if (top == -float(kInfinity)) {  // every entry is masked, or NaN
        for (int64_t i = 0; i < n; ++i)
          if (widen(x[i]) != widen(x[i])) part_.sum = __builtin_nan("");
        return;
      }
      has_base_ = true;
      below_.set_base(top);
    }
    Sums s = run(x, n);
    if (top_lane(larger(s.sum, Floats{})) > kFar) {
      close();
      below_.set_base(top_of(x, n));
      s = run(x, n);
    }
    sums_ += s;
  }

  Sums run(const T* x, int64_t n) const {
    Sums all_rows;
    for (int64_t row = 0; row < n; row += kRow) {
      Sums a, b;
      const int64_t end = n - row < kRow ? n : row + kRow;
#pragma GCC unroll 2
      for (int64_t i = row; i < end; i += kPair) {
        const Two v = load(x + i);
        __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead);
        if constexpr (sizeof(T) == 4) __builtin_prefetch(reinterpret_cast<const char*>(x + i + kWide) + kAhead);
        add(a, below_(v.a));
        add(b, below_(v.b));
      }
      a += b, all_rows += a;
    }
    return all_rows;
  }

  [[gnu::always_inline]] void add(Sums& s, Floats d) const {
    if constexpr (kMode > 0) d = larger(lowest_, d);  // 0 * -inf would be NaN
    const Floats e = powers_(d, rate_);
    s.sum += e;
    if constexpr (kMode > 0) s.dot += e * d;
    if constexpr (kMode > 1) {
      const Floats square = e * e;
      s.squares += square, s.cubes += square * e;
    }
  }

  void to_double() {
    now_.sum += lanes_sum(sums_.sum);
    if (kMode > 0) now_.dot += inverse_ * lanes_sum(sums_.dot);
    if (kMode > 1) now_.squares += lanes_sum(sums_.squares), now_.cubes += lanes_sum(sums_.cubes);
    sums_ = Sums();
  }
  void close() {  // what was summed on this base goes to part_
    if (!has_base_) return;
    to_double();
    now_.max = below_.base_value * inverse_;
    part_ = merged(part_, now_);
    now_ = {};
  }

  Below<kCapped> below_;
  const Powers powers_{};
  const Floats rate_, lowest_ = all(-200.f) / rate_;
  const double inverse_;
  bool has_base_ = false;
  Sums sums_;
  SoftmaxPart now_{}, part_{};
};

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

double z_of(const LogSoftmaxTask& t, double x) {
  double slope;
  return capped(x, t.softcap, slope) / t.temperature;
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
        const double logp = id < 0 ? 0 : ((absent ? -kInfinity : z_of(t, double(widen(x[id])))) - part.max) - log_sum;
        t.logp[k] = logp > 0 ? 0 : logp;
      }
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
