#include "rl/selective_log_softmax.h"

#include "common/exp_log.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kBlock = 4096;
constexpr double kInfinity = __builtin_inf();

template <class T>
using Arithmetic = decltype(widen(T()));

// z = cap(x) / temperature, in two steps: `capped`, then a product with `inverse`.
template <class A>
struct Scale {
  A cap, twice, inverse;
  bool capped;
  template <class Task>
  explicit Scale(const Task& t)
      : cap(A(t.softcap)),
        twice(t.softcap > 0 ? A(2 / t.softcap) : 0),
        inverse(A(1 / t.temperature)),
        capped(t.softcap > 0) {}
};

// softcap * tanh(x / softcap); a masked entry, -inf, stays masked. slope: its derivative
template <class A>
[[gnu::always_inline]] inline A cap(A x, const Scale<A>& s, A& slope) {
  const A e = exp_of(-__builtin_fabs(x) * s.twice), q = (A(1) - e) / (A(1) + e);
  slope = A(1) - q * q;
  const A y = x < 0 ? -s.cap * q : s.cap * q;
  return x == -A(kInfinity) ? x : y;
}
template <class A>
A cap(A x, const Scale<A>& s) {
  A slope;
  return s.capped ? cap(x, s, slope) : x;
}

SoftmaxPart merged(const SoftmaxPart& a, const SoftmaxPart& b) {
  if (a.max == -kInfinity) return {b.max, a.sum + b.sum, b.dot, b.squares, b.cubes};  // a.sum: 0 or NaN
  if (b.max == -kInfinity) return {a.max, a.sum + b.sum, a.dot, a.squares, a.cubes};
  const double max = a.max > b.max ? a.max : b.max, down_a = a.max - max, down_b = b.max - max;
  const double fa = exp_of(down_a), fb = exp_of(down_b);
  // 0 * inf would be NaN; what is that far down does not count
  const double dot_a = fa > 0 ? fa * (a.dot + a.sum * down_a) : 0, dot_b = fb > 0 ? fb * (b.dot + b.sum * down_b) : 0;
  return {max, fa * a.sum + fb * b.sum, dot_a + dot_b, fa * fa * a.squares + fb * fb * b.squares,
          fa * fa * fa * a.cubes + fb * fb * fb * b.cubes};
}

template <class T>
SoftmaxPart block_part(const T* x, int64_t n, const Scale<Arithmetic<T>>& s) {
  using A = Arithmetic<T>;
  A top = -A(kInfinity);
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = widen(x[i]) > top ? A(widen(x[i])) : top;
  if (top == -A(kInfinity)) {  // every entry is masked, or NaN
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) nan |= widen(x[i]) != widen(x[i]);
    return {-kInfinity, nan ? __builtin_nan("") : 0., 0, 0, 0};
  }
  const A base = cap(top, s);
  A sum = 0, dot = 0, squares = 0, cubes = 0;
#pragma omp simd reduction(+ : sum, dot, squares, cubes)
  for (int64_t i = 0; i < n; ++i) {
    A d = (cap(A(widen(x[i])), s) - base) * s.inverse;
    d = d < A(-86) ? A(-86) : d;
    const A e = exp_of(d);
    sum += e, dot += e * d, squares += e * e, cubes += e * e * e;
  }
  return {double(base) * double(s.inverse), sum, dot, squares, cubes};
}

}  // namespace

void log_softmax_parts(const LogSoftmaxTask& t, int64_t begin, int64_t end, SoftmaxPart* parts) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    using A = Arithmetic<T>;
    const Scale<A> scale(t);
    const int64_t chunks = softmax_chunks(t);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / chunks, first = i % chunks * kSoftmaxChunk;
      const T* x = static_cast<const T*>(t.logits) + row * t.cols;
      SoftmaxPart part{-kInfinity, 0, 0, 0, 0};
      if (t.keep_ids) {
        A kept[kBlock];
        for (int64_t b = t.keep_offsets[row]; b < t.keep_offsets[row + 1]; b += kBlock) {
          const int64_t n = t.keep_offsets[row + 1] - b < kBlock ? t.keep_offsets[row + 1] - b : kBlock;
          for (int64_t j = 0; j < n; ++j) kept[j] = widen(x[t.keep_ids[b + j]]);
          part = merged(part, block_part(kept, n, scale));
        }
      } else {
        const int64_t last = first + kSoftmaxChunk < t.cols ? first + kSoftmaxChunk : t.cols;
        for (int64_t b = first; b < last; b += kBlock)
          part = merged(part, block_part(x + b, last - b < kBlock ? last - b : kBlock, scale));
      }
      parts[i] = part;
    }
  });
}

namespace {

// Whether id is one of ids[begin, end), which ascend; begin becomes its place.
bool find(const int64_t* ids, int64_t& begin, int64_t end, int64_t id) {
  const int64_t last = end;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] < id)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin < last && ids[begin] == id;
}

}  // namespace

void log_softmax_finish(const LogSoftmaxTask& t, int64_t begin, int64_t end, const SoftmaxPart* parts) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    using A = Arithmetic<T>;
    const Scale<A> scale(t);
    const int64_t chunks = softmax_chunks(t);
    for (int64_t r = begin; r < end; ++r) {
      SoftmaxPart part{-kInfinity, 0, 0, 0, 0};
      for (int64_t i = 0; i < chunks; ++i) part = merged(part, parts[r * chunks + i]);
      const double log_sum = log_of(part.sum), inverse = 1 / part.sum;
      t.lse[r] = part.max + log_sum;
      if (t.entropy) t.entropy[r] = log_sum - part.dot * inverse;
      if (t.sum_p2) t.sum_p2[r] = part.squares * inverse * inverse;
      if (t.sum_p3) t.sum_p3[r] = part.cubes * inverse * inverse * inverse;
      const T* x = static_cast<const T*>(t.logits) + r * t.cols;
      for (int64_t k = r * t.targets; k < (r + 1) * t.targets; ++k) {
        const int64_t id = t.index[k];
        int64_t place = t.keep_ids ? t.keep_offsets[r] : 0;
        if (id < 0) {
          t.logp[k] = 0;
        } else if (t.keep_ids && !find(t.keep_ids, place, t.keep_offsets[r + 1], id)) {
          t.logp[k] = part.sum == part.sum ? -kInfinity : part.sum;
        } else {
          t.logp[k] = (double(cap(A(widen(x[id])), scale)) * double(scale.inverse) - part.max) - log_sum;
        }
      }
    }
  });
}

namespace {

// p (slope + bend log p) + the targets' own part, times dz/dx
template <class A>
struct Coefficients {
  double lse;
  A slope, bend;
};

template <class T>
void grad_block(const T* x, int64_t n, const Scale<Arithmetic<T>>& s, const Coefficients<Arithmetic<T>>& c,
                Arithmetic<T>* out, Arithmetic<T>* dz) {
  using A = Arithmetic<T>;
  // z - lse = (cap(x) - base) * inverse - rest, with no digits lost where logits are large
  const A base = A(c.lse / double(s.inverse)), rest = A(c.lse - double(base) * double(s.inverse));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A slope = 1;
    const A y = s.capped ? cap(A(widen(x[i])), s, slope) : A(widen(x[i]));
    const A d = (y - base) * s.inverse - rest;
    const A p = d < A(-86) ? A(0) : exp_of(d), clamped = d < A(-86) ? A(-86) : d;
    dz[i] = slope * s.inverse;
    out[i] = p * (c.slope + c.bend * clamped) * dz[i];
  }
}

}  // namespace

void log_softmax_grad(const LogSoftmaxGradTask& t, int64_t begin, int64_t end) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    using A = Arithmetic<T>;
    const Scale<A> scale(t);
    const int64_t chunks = softmax_chunks(t);
    A kept[kBlock], out[kBlock], dz[kBlock];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / chunks, first = i % chunks * kSoftmaxChunk;
      const T* x = static_cast<const T*>(t.logits) + row * t.cols;
      T* y = static_cast<T*>(t.grad) + row * t.cols;
      const double* g = t.grad_logp ? t.grad_logp + row * t.targets : nullptr;
      const int64_t* index = t.index + row * t.targets;
      const double g_entropy = t.grad_entropy ? t.grad_entropy[row] : 0;
      double slope = t.grad_lse ? t.grad_lse[row] : 0;
      for (int64_t k = 0; g && k < t.targets; ++k) slope -= g[k];
      if (t.grad_entropy) slope -= g_entropy * t.entropy[row];
      const Coefficients<A> c{t.lse[row], A(slope), A(-g_entropy)};
      if (t.keep_ids) {
        int64_t written = 0;
        for (int64_t b = t.keep_offsets[row]; b < t.keep_offsets[row + 1]; b += kBlock) {
          const int64_t n = t.keep_offsets[row + 1] - b < kBlock ? t.keep_offsets[row + 1] - b : kBlock;
          const int64_t* ids = t.keep_ids + b;
          for (int64_t j = 0; j < n; ++j) kept[j] = widen(x[ids[j]]);
          grad_block(kept, n, scale, c, out, dz);
          for (int64_t k = 0; g && k < t.targets; ++k) {
            int64_t place = 0;
            if (find(ids, place, n, index[k])) out[place] += A(g[k]) * dz[place];
          }
          for (; written <= ids[n - 1]; ++written) y[written] = T();
          for (int64_t j = 0; j < n; ++j) narrow(out[j], y[ids[j]]);
        }
        for (; written < t.cols; ++written) y[written] = T();
        continue;
      }
      const int64_t last = first + kSoftmaxChunk < t.cols ? first + kSoftmaxChunk : t.cols;
      for (int64_t b = first; b < last; b += kBlock) {
        const int64_t n = last - b < kBlock ? last - b : kBlock;
        grad_block(x + b, n, scale, c, out, dz);
        for (int64_t k = 0; g && k < t.targets; ++k)
          if (index[k] >= b && index[k] < b + n) out[index[k] - b] += A(g[k]) * dz[index[k] - b];
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) narrow(out[j], y[b + j]);
      }
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
