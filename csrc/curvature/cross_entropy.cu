// One block per row. Which thread sums which entries depends on the length of the row alone; sums are compensated in
// the threads, then added in double in a fixed order. What is read twice comes from the second-level cache.
#include "common/reduce.cuh"
#include "common/row_loads.cuh"
#include "curvature/cross_entropy.h"

namespace gradops {
namespace {

struct RowSums {
  double top, sum;     // of e^(z - top), or with the logsumexp known, of p
  double mean, total;  // p.u; the sum of u, or without one, of z
};

// e (slope + rate (u - centre)) + shift, for e = e^(z - base)
template <class A>
struct Line {
  A base, slope, rate, centre, shift;
  // lse and mean are rounded to A, and what rounding took away is in the factors
  __device__ Line(double lse, double slope_in, double g, double mean, double shift)
      : base(A(lse)), centre(A(mean)), shift(A(shift)) {
    const double p = exp(lse - double(base) == 0 ? 0. : double(base) - lse);
    slope = A(p * (slope_in - g * (mean - double(centre)))), rate = A(p * g);
  }
  __device__ A at(A z) const { return exp_of(z - base) * slope + shift; }
  __device__ A at(A z, A u) const { return exp_of(z - base) * ((u - centre) * rate + slope) + shift; }
};

// Entries [i, i + kSize), as far as there are any; then `rest`
template <class T>
__device__ inline void load(const T* x, int64_t i, int64_t cols, bool whole, Arithmetic<T> rest, Arithmetic<T>* out) {
  using A = Arithmetic<T>;
  if (whole && i + Pack<T>::kSize <= cols) {
    const Pack<T> p = *reinterpret_cast<const Pack<T>*>(x + i);
    for (int j = 0; j < Pack<T>::kSize; ++j) out[j] = A(to_double(p.at[j]));
  } else {
    for (int j = 0; j < Pack<T>::kSize; ++j) out[j] = i + j < cols ? A(to_double(x[i + j])) : rest;
  }
}

// u null: none. known: the logsumexp, if it is known
template <class T>
__device__ RowSums sums_of(const T* z, const T* u, int64_t cols, const double* known, bool total_wanted,
                           double* scratch) {
  using A = Arithmetic<T>;
  constexpr int kSize = Pack<T>::kSize;
  const bool whole = aligned(z) && aligned(u);
  A top = -A(INFINITY);
  Compensated<A> sum, dot;  // dot: of e (u - centre), for the u of the largest z: p.u is nearly that if p is nearly 1
  A centre = 0;
  double total = 0;
  for (int64_t i = int64_t(threadIdx.x) * kSize; i < cols; i += int64_t(blockDim.x) * kSize) {
    A x[kSize], y[kSize], higher = top;
    load(z, i, cols, whole, -A(INFINITY), x);
    if (u) load(u, i, cols, whole, A(0), y);
    int place = 0;
    for (int j = 0; j < kSize; ++j)
      if (x[j] > higher) higher = x[j], place = j;
    if (higher > top) {
      if (u) {
        A next = 0;
        for (int j = 0; j < kSize; ++j) next = j == place ? y[j] : next;
        dot.add(A(sum.value()) * (centre - next)), centre = next;
      }
      const A f = known ? A(1) : top == -A(INFINITY) ? A(0) : exp_of(top - higher);
      sum.scale(f), dot.scale(f), top = higher;
    }
    const A base = known ? A(*known) : top == -A(INFINITY) ? A(0) : top;  // all is masked: any base gives 0, or NaN
    A s = 0, d = 0;
    for (int j = 0; j < kSize; ++j) {
      const A e = exp_of(x[j] - base);
      s += e;
      if (u) d += e * (y[j] - centre);
      if (total_wanted && i + j < cols) total += double(u ? y[j] : x[j]);
    }
    sum.add(s), dot.add(d);
  }
  const double max = block_all(double(top), -double(INFINITY), scratch, Larger());
  const double f = known || double(top) == max ? 1 : exp(double(top) - max);
  const double own = f == 0 && sum.value() == sum.value() ? 0 : f * sum.value();
  const double all = block_all(own, 0., scratch, Add());
  double mean = 0;
  if (u) {
    const double middle = double(top) == max ? double(centre) : -double(INFINITY);
    const double common = block_all(middle, -double(INFINITY), scratch, Larger());
    const double own_dot = f == 0 ? 0 : f * (dot.value() + sum.value() * (double(centre) - common));
    mean = common + block_all(own_dot, 0., scratch, Add()) / all;
  }
  return {max, all, mean, total_wanted ? block_all(total, 0., scratch, Add()) : 0};
}

template <class T>
__device__ void write_row(const Line<Arithmetic<T>>& line, const T* z, const T* u, T* out, int64_t cols) {
  using A = Arithmetic<T>;
  constexpr int kSize = Pack<T>::kSize;
  const bool whole = aligned(z) && aligned(u) && aligned(out);
  for (int64_t i = int64_t(threadIdx.x) * kSize; i < cols; i += int64_t(blockDim.x) * kSize) {
    A x[kSize], y[kSize];
    Pack<T> p;
    load(z, i, cols, whole, A(0), x);
    if (u) load(u, i, cols, whole, A(0), y);
    for (int j = 0; j < kSize; ++j) p.at[j] = from_double<T>(double(u ? line.at(x[j], y[j]) : line.at(x[j])));
    if (whole && i + kSize <= cols)
      *reinterpret_cast<Pack<T>*>(out + i) = p;
    else
      for (int j = 0; j < kSize && i + j < cols; ++j) out[i + j] = p.at[j];
  }
}

template <class T>
__device__ void fill(T* out, int64_t cols, double value) {
  for (int64_t i = threadIdx.x; i < cols; i += blockDim.x) out[i] = from_double<T>(value);
}

template <class T>
__device__ const T* row_of(const void* x, int64_t row, int64_t cols) {
  return x ? static_cast<const T*>(x) + row * cols : nullptr;
}

template <class T>
__global__ void __launch_bounds__(256) sums(const CrossEntropySums t) {
  __shared__ double scratch[32];
  const double s = t.label_smoothing;
  for (int64_t r = blockIdx.x; r < t.rows; r += gridDim.x) {
    const int64_t target = t.target[r];
    const bool ignored = target == t.ignore_index, wrong = !ignored && (target < 0 || target >= t.cols);
    if (ignored || wrong) {
      if (threadIdx.x == 0) t.loss[r] = t.lse[r] = wrong ? nan<double>() : 0;
      continue;
    }
    const T *z = row_of<T>(t.z, r, t.cols), *u = row_of<T>(t.z_dot, r, t.cols);
    const RowSums row = sums_of(z, u, t.cols, t.known_lse ? t.known_lse + r : nullptr, s > 0, scratch);
    if (threadIdx.x != 0) continue;
    if (u) {
      t.lse[r] = row.mean;
      t.loss[r] = row.mean - (1 - s) * to_double(u[target]) - (s > 0 ? s * row.total / double(t.cols) : 0);
    } else {  // from the largest logit, so that no digits are lost where logits are large
      const double log_sum = log(row.sum), own = s < 1 ? (1 - s) * (row.top - to_double(z[target])) : 0;
      t.lse[r] = row.top + log_sum;
      t.loss[r] = log_sum + own + (s > 0 ? s * (row.top - row.total / double(t.cols)) : 0);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(256) grads(const CrossEntropyGrad t) {
  for (int64_t r = blockIdx.x; r < t.rows; r += gridDim.x) {
    const int64_t target = t.target[r];
    const bool ignored = target == t.ignore_index, wrong = !ignored && (target < 0 || target >= t.cols);
    T* out = static_cast<T*>(t.out) + r * t.cols;
    if (ignored || wrong) {
      fill(out, t.cols, wrong ? nan<double>() : 0.);
      continue;
    }
    const T *z = row_of<T>(t.z, r, t.cols), *u = row_of<T>(t.z_dot, r, t.cols);
    const double slope = t.slope ? t.slope[r] : 0, g = u ? t.g[r] : 0, mean = u ? t.lse_dot[r] : 0;
    const double shift = -slope * t.label_smoothing / double(t.cols);
    const double change = u ? g * (to_double(u[target]) - mean) : 0, p = exp(to_double(z[target]) - t.lse[r]);
    const double own = p * change + slope * (p - (1 - t.label_smoothing)) + shift;
    __syncthreads();  // the target's entry has been read, and out may be z or u
    write_row(Line<Arithmetic<T>>(t.lse[r], slope, g, mean, shift), z, u, out, t.cols);
    __syncthreads();
    if (threadIdx.x == 0 && slope != 0) out[target] = from_double<T>(own);
  }
}

template <class T>
__global__ void __launch_bounds__(256) products(const SoftmaxCeHvp t) {
  __shared__ double scratch[32];
  for (int64_t r = blockIdx.x; r < t.rows; r += gridDim.x) {
    T* out = static_cast<T*>(t.out) + r * t.cols;
    if (t.scale[r] == 0) {
      fill(out, t.cols, 0.);
      continue;
    }
    const T *z = row_of<T>(t.z, r, t.cols), *u = row_of<T>(t.u, r, t.cols);
    const RowSums row = sums_of(z, u, t.cols, nullptr, false, scratch);  // each thread writes what it read itself
    write_row(Line<Arithmetic<T>>(row.top + log(row.sum), 0, t.scale[r], row.mean, 0), z, u, out, t.cols);
  }
}

template <class Task, class Kernels>
void each_row(const Task& t, void* stream, const Kernels& kernel_of) {
  const unsigned grid = blocks(t.rows < (1 << 20) ? t.rows : (1 << 20));
  with_device_type(t.element,
                   [&](auto zero) { launch(kernel_of(zero), grid, t.cols > 4096 ? 256 : 64, 0, stream, t); });
}

}  // namespace

void cuda::cross_entropy(const CrossEntropySums& t, void* stream) {
  each_row(t, stream, [](auto zero) { return sums<decltype(zero)>; });
}
void cuda::cross_entropy_backward(const CrossEntropyGrad& t, void* stream) {
  each_row(t, stream, [](auto zero) { return grads<decltype(zero)>; });
}
void cuda::softmax_ce_hvp(const SoftmaxCeHvp& t, void* stream) {
  each_row(t, stream, [](auto zero) { return products<decltype(zero)>; });
}

}  // namespace gradops
