// One block per row. Which thread sums which entries depends on the length of the row alone; sums are compensated in
// the threads, then added in double in a fixed order.
#include "common/reduce.cuh"
#include "common/row_loads.cuh"
#include "rl/selective_log_softmax.h"

namespace gradops {
namespace {

constexpr int kPacks = 4;  // 16-byte loads a thread has under way
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// softcap * tanh(x / softcap) and its derivative; a masked entry, -inf, stays masked.
template <class A>
__device__ inline A capped(A x, A softcap, A* slope) {
  *slope = 1;
  if (softcap == 0 || x == -A(INFINITY)) return x;
  const A q = tanh(x / softcap);
  *slope = 1 - q * q;
  return softcap * q;
}

// The entries of a row, or of its keep set: number i is logit id(i).
template <class T>
struct Row {
  const T* x;
  const int64_t* ids;
  int64_t count, cols;
  template <class Task>
  __device__ Row(const Task& t, int64_t r)
      : x(static_cast<const T*>(t.logits) + r * t.cols),
        ids(t.keep_ids ? t.keep_ids + t.keep_offsets[r] : nullptr),
        count(ids ? t.keep_offsets[r + 1] - t.keep_offsets[r] : t.cols),
        cols(t.cols) {}
  __device__ bool has(int64_t id) const { return id >= 0 && id < cols; }
  __device__ Arithmetic<T> at(int64_t i) const {
    using A = Arithmetic<T>;
    if (!ids) return A(to_double(x[i]));
    return has(ids[i]) ? A(to_double(x[ids[i]])) : nan<A>();
  }
  __device__ bool kept(int64_t id) const {
    if (!ids) return true;
    int64_t begin = 0, end = count;
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (ids[middle] < id)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin < count && ids[begin] == id;
  }
  // Entries [i, i + kSize), as far as there are any; the rest is masked
  __device__ void load(int64_t i, bool whole, Arithmetic<T>* out) const {
    using A = Arithmetic<T>;
    if (whole && i + Pack<T>::kSize <= count) {
      const Pack<T> p = *reinterpret_cast<const Pack<T>*>(x + i);
      for (int j = 0; j < Pack<T>::kSize; ++j) out[j] = A(to_double(p.at[j]));
    } else {
      for (int j = 0; j < Pack<T>::kSize; ++j) out[j] = i + j < count ? at(i + j) : -A(INFINITY);
    }
  }
};

// kMode: 0 sums e^d; 1 and e^d d; 2 and e^2d and e^3d, with d = z - max
template <class T, int kMode>
__global__ void __launch_bounds__(256) forward(const LogSoftmaxTask t) {
  using A = Arithmetic<T>;
  constexpr int kSize = Pack<T>::kSize;
  __shared__ double scratch[32];
  const A softcap = A(t.softcap), rate = A(kLog2E / t.temperature);
  for (int64_t r = blockIdx.x; r < t.rows; r += gridDim.x) {
    const Row<T> row(t, r);
    const bool whole = !row.ids && aligned(row.x);
    A top = -A(INFINITY), slope;  // of cap(x)
    Compensated<A> sum, dot, squares, cubes;
    for (int64_t first = int64_t(threadIdx.x) * kSize; first < row.count;
         first += int64_t(blockDim.x) * kSize * kPacks) {
      A x[kPacks][kSize];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) row.load(first + int64_t(p) * blockDim.x * kSize, whole, x[p]);
      A higher = top;
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        for (int j = 0; j < kSize; ++j) {
          x[p][j] = capped(x[p][j], softcap, &slope);
          higher = x[p][j] > higher ? x[p][j] : higher;
        }
      if (higher == -A(INFINITY)) {  // every entry is masked, or NaN
        for (int p = 0; p < kPacks; ++p)
          for (int j = 0; j < kSize; ++j)
            if (x[p][j] != x[p][j]) sum.sum = x[p][j];
        continue;
      }
      if (higher > top) {
        const A down = top == -A(INFINITY) ? 0 : (top - higher) * rate, f = exp2(down);
        if constexpr (kMode > 0) dot.add(A(sum.value()) * down), dot.scale(f);
        if constexpr (kMode > 1) squares.scale(f * f), cubes.scale(f * f * f);
        sum.scale(f);
        top = higher;
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        A s = 0, d = 0, s2 = 0, s3 = 0;
        for (int j = 0; j < kSize; ++j) {
          const A y = (x[p][j] - top) * rate, e = exp2(y);
          s += e;
          if constexpr (kMode > 0) d += e * (y < -2000 ? A(-2000) : y);
          if constexpr (kMode > 1) s2 += e * e, s3 += e * e * e;
        }
        sum.add(s);
        if constexpr (kMode > 0) dot.add(d);
        if constexpr (kMode > 1) squares.add(s2), cubes.add(s3);
      }
    }
    const double max = block_all(double(top), -double(INFINITY), scratch, Larger());
    const double down = top == -A(INFINITY) ? 0 : (double(top) - max) * kLog2E / t.temperature, f = exp2(down);
    const double total = block_all(f * sum.value(), 0., scratch, Add());
    const double log_sum = log(total), z_max = max / t.temperature;
    if (kMode > 0 && t.entropy) {
      const double own = f == 0 ? 0 : f * kLn2 * (dot.value() + sum.value() * down);
      const double entropy = log_sum - block_all(own, 0., scratch, Add()) / total;
      if (threadIdx.x == 0) t.entropy[r] = entropy < 0 ? 0 : entropy;
    }
    if constexpr (kMode > 1) {
      const double p2 = block_all(f * f * squares.value(), 0., scratch, Add()) / (total * total);
      const double p3 = block_all(f * f * f * cubes.value(), 0., scratch, Add()) / (total * total * total);
      if (threadIdx.x == 0) t.sum_p2[r] = p2, t.sum_p3[r] = p3;
    }
    if (threadIdx.x == 0) t.lse[r] = z_max + log_sum;
    for (int64_t k = threadIdx.x; k < t.targets; k += blockDim.x) {
      const int64_t id = t.index[r * t.targets + k];
      double z = -double(INFINITY);
      if (!row.has(id))
        z = nan<double>();
      else if (row.kept(id))
        z = double(capped(A(to_double(row.x[id])), softcap, &slope)) / t.temperature;
      const double logp = t.partial && id == -1 ? 0 : (z - z_max) - log_sum;
      t.logp[r * t.targets + k] = logp > 0 ? 0 : logp;
    }
  }
}

// p (slope + bend log p) dz/dx at one logit
template <class A>
struct Grad {
  A softcap, inverse, rate, base, rest, slope, bend;
  __device__ Grad(const LogSoftmaxGradTask& t, double lse, double slope, double bend)
      : softcap(A(t.softcap)),
        inverse(A(1 / t.temperature)),
        rate(A(kLog2E / t.temperature)),
        base(A(lse * t.temperature)),  // z - lse = (cap(x) - base) / temperature - rest: exact for large logits too
        rest(A((lse - double(base) / t.temperature) * kLog2E)),
        slope(A(slope)),
        bend(A(bend * kLn2)) {}
  __device__ A operator()(A x) const {
    A dy;
    const A y = (capped(x, softcap, &dy) - base) * rate - rest;
    return exp2(y) * (slope + bend * (y < -2000 ? A(-2000) : y)) * dy * inverse;
  }
  __device__ A dz(A x) const {
    A dy;
    capped(x, softcap, &dy);
    return dy * inverse;
  }
};

// old: for each target the logit there, which the gradient may replace; values: the gradients of the keep sets.
template <class T>
__global__ void __launch_bounds__(256)
    backward(const LogSoftmaxGradTask t, Arithmetic<T>* __restrict__ old, Arithmetic<T>* __restrict__ values) {
  using A = Arithmetic<T>;
  constexpr int kSize = Pack<T>::kSize;
  __shared__ double scratch[32];
  for (int64_t r = blockIdx.x; r < t.rows; r += gridDim.x) {
    const Row<T> row(t, r);
    T* y = static_cast<T*>(t.grad) + r * t.cols;
    const int64_t targets = t.grad_logp ? t.targets : 0, *index = t.index + r * t.targets;
    const double* g = t.grad_logp + r * targets;
    double own = 0, nonzero = 0;
    for (int64_t k = threadIdx.x; k < targets; k += blockDim.x) {
      own += g[k], nonzero += g[k] != 0;
      if (row.has(index[k])) old[r * targets + k] = A(to_double(row.x[index[k]]));
    }
    const double bend = t.grad_entropy ? -t.grad_entropy[r] : 0;
    const double rest = (t.grad_lse ? t.grad_lse[r] : 0.) + (t.grad_entropy ? bend * t.entropy[r] : 0.);
    const double slope = rest - block_all(own, 0., scratch, Add());
    const bool zero = block_all(nonzero, 0., scratch, Add()) == 0 && rest == 0 && bend == 0;
    const Grad<A> grad(t, t.lse[r], slope, bend);
    const bool whole = aligned(row.x) && aligned(y);
    A* value = row.ids ? values + t.keep_offsets[r] : nullptr;
    if (row.ids && !zero)
      for (int64_t i = threadIdx.x; i < row.count; i += blockDim.x) value[i] = grad(row.at(i));
    __syncthreads();  // old and value are complete, and y may be written
    for (int64_t first = int64_t(threadIdx.x) * kSize; first < t.cols; first += int64_t(blockDim.x) * kSize) {
      Pack<T> out;
      A x[kSize];
      const bool all = whole && first + kSize <= t.cols, nothing = zero || row.ids;
      if (!nothing) row.load(first, all, x);
      for (int j = 0; j < kSize; ++j) out.at[j] = from_double<T>(nothing ? 0. : double(grad(x[j])));
      if (all)
        *reinterpret_cast<Pack<T>*>(y + first) = out;
      else
        for (int j = 0; j < kSize && first + j < t.cols; ++j) y[first + j] = out.at[j];
    }
    __syncthreads();  // the next two write over that
    if (zero) continue;
    if (row.ids) {
      for (int64_t i = threadIdx.x; i < row.count; i += blockDim.x)
        if (row.has(row.ids[i])) y[row.ids[i]] = from_double<T>(double(value[i]));
      __syncthreads();
    }
    for (int64_t k = threadIdx.x; k < targets; k += blockDim.x) {
      const int64_t id = index[k];
      if (!row.has(id) || !row.kept(id)) continue;
      double sum = 0;  // one entry may be chosen more than once; the first of those threads writes it
      bool first = true;
      for (int64_t i = 0; i < targets; ++i)
        if (index[i] == id) sum += g[i], first = first && i >= k;
      if (!first) continue;
      const A x = old[r * targets + k];
      y[id] = from_double<T>(double(grad(x) + A(sum) * grad.dz(x)));
    }
  }
}

int threads(int64_t cols) { return cols > 4096 ? 256 : 64; }
unsigned grid(int64_t rows) { return blocks(rows < (1 << 20) ? rows : (1 << 20)); }

}  // namespace

int64_t cuda::selective_log_softmax_workspace(const LogSoftmaxTask&) { return 0; }

void cuda::selective_log_softmax(const LogSoftmaxTask& t, void*, void* stream) {
  with_device_type(t.element, [&](auto type) {
    using T = decltype(type);
    const auto f = t.sum_p2 ? forward<T, 2> : t.entropy ? forward<T, 1> : forward<T, 0>;
    launch(f, grid(t.rows), threads(t.cols), 0, stream, t);
  });
}

int64_t cuda::selective_log_softmax_backward_workspace(const LogSoftmaxGradTask& t) {
  return (t.rows * t.targets + t.kept) * (t.element == Element::f64 ? 8 : 4);
}

void cuda::selective_log_softmax_backward(const LogSoftmaxGradTask& t, void* workspace, void* stream) {
  with_device_type(t.element, [&](auto type) {
    using A = Arithmetic<decltype(type)>;
    A* old = static_cast<A*>(workspace);
    launch(backward<decltype(type)>, grid(t.rows), threads(t.cols), 0, stream, t, old, old + t.rows * t.targets);
  });
}

}  // namespace gradops
