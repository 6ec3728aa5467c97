// A block takes a row, or in backward passes a piece of rows one after another; a thread has the same columns in all.
// Rows are read twice, from the cache the second time. Numbers of float are summed in float by a thread, which has few,
// and in double between threads. Sums over rows are kept in shared memory, or in the partial sums if they are too long.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "curvature/layer_norm.h"

namespace gradops {
namespace {

constexpr int kMaxThreads = 512;

template <class R>
__device__ R load(Element e, const void* x, int64_t i, double otherwise) {
  return x ? R(number_at(e, x, i)) : R(otherwise);
}
template <class R, class T>
__device__ R real(T x) {
  return R(to_double(x));
}

__device__ double total(double v, double* scratch) { return block_all(v, 0., scratch, Add()); }

// As on the CPU: the digits of the mean beyond those of x go into a shift.
template <class R>
struct Centered {
  R high, scale, shift;
  __device__ Centered(double mean, double factor)
      : high(R(mean)), scale(R(factor)), shift(R((double(high) - mean) * factor)) {}
  __device__ R operator()(R x) const { return (x - high) * scale + shift; }
};

// Somewhere among the numbers of a row.
template <class R, class T>
__device__ R sample(const T* x, int64_t n) {
  return real<R>(x[0]) / 4 + real<R>(x[n / 4]) / 4 + real<R>(x[n / 2]) / 4 + real<R>(x[n - 1]) / 4;
}

template <class A, class R, class T>
__device__ bool measure(const T* x, int64_t n, bool center, double* scratch, double& mean, double& square) {
  A near = center ? A(sample<R>(x, n)) : A(0);
  double sum = 0;
  for (int pass = 0; pass < 2; ++pass) {
    A s0 = 0, s1 = 0;
    for (int64_t c = threadIdx.x; c < n; c += blockDim.x) {
      const A d = A(real<R>(x[c])) - near;
      s0 += d, s1 += d * d;
    }
    const double rest = center ? total(double(s0), scratch) / double(n) : 0;
    sum = total(double(s1), scratch);
    mean = double(near) + rest;
    square = sum / double(n) - rest * rest;
    if (rest * rest <= square) break;
    near = A(mean);
  }
  square = square < 0 ? 0 : square;
  return sizeof(A) == 8 || (sum > 1e-24 && sum < 1e37);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) forward(const __grid_constant__ LayerNormTask t) {
  using R = Arithmetic<T>;
  __shared__ double scratch[32];
  const int64_t r = blockIdx.x, parameters = r / t.rows * t.n;
  const T* x = static_cast<const T*>(t.x) + r * t.n;
  T* y = static_cast<T*>(t.out) + r * t.n;
  double mean, square;
  if (!measure<R, R>(x, t.n, t.center, scratch, mean, square))
    measure<double, R>(x, t.n, t.center, scratch, mean, square);
  const double rstd = 1 / sqrt(square + t.eps);
  if (threadIdx.x == 0) t.stats[2 * r] = mean, t.stats[2 * r + 1] = rstd;
  const Centered<R> normal(mean, rstd);
  for (int64_t c = threadIdx.x; c < t.n; c += blockDim.x) {
    const R w = load<R>(t.weight_element, t.weight, parameters + c, 1);
    const R b = load<R>(t.weight_element, t.bias, parameters + c, 0);
    y[c] = from_double<T>(double(normal(real<R>(x[c])) * w + b));
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) change(const __grid_constant__ LayerNormTask t) {
  using R = Arithmetic<T>;
  __shared__ double scratch[32];
  const int64_t r = blockIdx.x, parameters = r / t.rows * t.n;
  const T* x = static_cast<const T*>(t.x) + r * t.n;
  const T* x_dot = t.x_dot ? static_cast<const T*>(t.x_dot) + r * t.n : nullptr;
  T* y_dot = static_cast<T*>(t.out) + r * t.n;
  const double n = double(t.n), rstd = t.stats[2 * r + 1];
  const Centered<R> normal(t.stats[2 * r], rstd);
  const R near = t.center && x_dot ? sample<R>(x_dot, t.n) : R(0);
  R s0 = 0, s1 = 0;
  for (int64_t c = threadIdx.x; x_dot && c < t.n; c += blockDim.x) {
    const R d = real<R>(x_dot[c]) - near;
    s0 += d, s1 += normal(real<R>(x[c])) * d;
  }
  const double mean_dot = t.center ? double(near) + total(double(s0), scratch) / n : 0;
  const double rstd_dot = -rstd * rstd * total(double(s1), scratch) / n;
  if (threadIdx.x == 0) t.stats_dot[2 * r] = mean_dot, t.stats_dot[2 * r + 1] = rstd_dot;
  const Centered<R> moved(mean_dot, rstd);
  const R p = R(rstd_dot / rstd);
  for (int64_t c = threadIdx.x; c < t.n; c += blockDim.x) {
    const R w = load<R>(t.weight_element, t.weight, parameters + c, 1);
    const R w_dot = load<R>(t.weight_element, t.weight_dot, parameters + c, 0);
    const R b_dot = load<R>(t.weight_element, t.bias_dot, parameters + c, 0);
    const R v = normal(real<R>(x[c]));
    const R v_dot = x_dot ? moved(real<R>(x_dot[c])) + p * v : R(0);
    y_dot[c] = from_double<T>(double(w_dot * v + w * v_dot + b_dot));
  }
}

// Pieces of rows: as many as fill a GPU, as large as keeps their sums small.
struct Pieces {
  int sums;
  int64_t size, count;
  explicit Pieces(const LayerNormTask& t)
      : sums(t.dbias     ? 2
             : t.dweight ? 1
                         : 0),
        size(sums == 0           ? 1
             : t.rows < 512 * 4  ? 4
             : t.rows > 512 * 64 ? 64
                                 : t.rows / 512),
        count((t.rows + size - 1) / size) {}
};

// dx and the sums over a piece of rows, or with kChange the changes of both. partial: for every piece `sums` rows.
template <class T, bool kChange>
__global__ void __launch_bounds__(kMaxThreads)
    backward(const __grid_constant__ LayerNormTask t, const __grid_constant__ Pieces pieces, Arithmetic<T>* partial,
             bool shared) {
  using R = Arithmetic<T>;
  GRADOPS_DYNAMIC_SHARED(R, kept);
  __shared__ double scratch[32];
  const int sums = pieces.sums;
  const int64_t item = blockIdx.x / pieces.count, begin = blockIdx.x % pieces.count * pieces.size;
  const int64_t end = begin + pieces.size < t.rows ? begin + pieces.size : t.rows, parameters = item * t.n;
  R* result = partial + int64_t(blockIdx.x) * sums * t.n;
  R *dw = shared ? kept : result, *db = dw + t.n;
  for (int64_t c = threadIdx.x; c < t.n; c += blockDim.x) {  // from here on a column is one thread's
    if (sums > 0) dw[c] = 0;
    if (sums > 1) db[c] = 0;
  }
  const double n = double(t.n);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = item * t.rows + i;
    const double rstd = t.stats[2 * r + 1], p = kChange ? t.stats_dot[2 * r + 1] / rstd : 0;
    const Centered<R> normal(t.stats[2 * r], rstd), moved(kChange ? t.stats_dot[2 * r] : 0, rstd);
    struct Column {
      R v, v_dot, a, a_dot;
    };
    const auto column = [&](int64_t c, R& g, R& g_dot) {
      const int64_t k = r * t.n + c;
      const R w = load<R>(t.weight_element, t.weight, parameters + c, 1);
      Column x;
      g = real<R>(static_cast<const T*>(t.g)[k]);
      x.v = normal(real<R>(static_cast<const T*>(t.x)[k]));
      x.a = g * w;
      if (!kChange) return x;
      const R w_dot = load<R>(t.weight_element, t.weight_dot, parameters + c, 0);
      g_dot = t.g_dot ? real<R>(static_cast<const T*>(t.g_dot)[k]) : R(0);
      x.v_dot = t.x_dot ? moved(real<R>(static_cast<const T*>(t.x_dot)[k])) + R(p) * x.v : R(0);
      x.a_dot = g_dot * w + g * w_dot;
      return x;
    };
    R s0 = 0, s1 = 0, s2 = 0, s3 = 0, g, g_dot;
    for (int64_t c = threadIdx.x; c < t.n; c += blockDim.x) {
      const Column x = column(c, g, g_dot);
      s0 += x.a, s1 += x.a * x.v;
      if (kChange) s2 += x.a_dot, s3 += x.a_dot * x.v + x.a * x.v_dot;
      if (sums > 0) dw[c] += kChange ? g_dot * x.v + g * x.v_dot : g * x.v;
      if (sums > 1) db[c] += kChange ? g_dot : g;
    }
    if (!t.out) continue;
    const double m = t.center ? total(double(s0), scratch) / n : 0, q = total(double(s1), scratch) / n;
    const double m_dot = kChange && t.center ? total(double(s2), scratch) / n : 0;
    const double q_dot = kChange ? total(double(s3), scratch) / n : 0;
    const R both = R(p * q + q_dot), shift = R(kChange ? p * m + m_dot : m);
    for (int64_t c = threadIdx.x; c < t.n; c += blockDim.x) {
      const Column x = column(c, g, g_dot);
      const R d = kChange ? R(p) * x.a + x.a_dot - shift - x.v_dot * R(q) - x.v * both : x.a - shift - x.v * R(q);
      static_cast<T*>(t.out)[r * t.n + c] = from_double<T>(double(R(rstd) * d));
    }
  }
  for (int64_t c = threadIdx.x; shared && c < t.n; c += blockDim.x) {
    if (sums > 0) result[c] = dw[c];
    if (sums > 1) result[t.n + c] = db[c];
  }
}

// Column by column, what the pieces of an item add up to: 32 columns a block, of whose warps each takes its share of
// the pieces.
template <class R>
__global__ void __launch_bounds__(1024) add_pieces(const R* __restrict__ partial, int64_t pieces, int sums, int64_t n,
                                                   Element element, void* dw, void* db) {
  __shared__ double part[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t item = blockIdx.x / ((n + 31) / 32), c = blockIdx.x % ((n + 31) / 32) * 32 + lane;
  void* out = blockIdx.y ? db : dw;
  double s = 0;
  for (int64_t i = warp; c < n && i < pieces; i += warps)
    s += double(partial[((item * pieces + i) * sums + blockIdx.y) * n + c]);
  part[warp][lane] = s;
  __syncthreads();
  if (warp > 0 || c >= n || !out) return;
  for (int i = 1; i < warps; ++i) s += part[i][lane];
  const int64_t k = item * n + c;
  switch (element) {
    case Element::bf16:
      static_cast<__nv_bfloat16*>(out)[k] = from_double<__nv_bfloat16>(s);
      break;
    case Element::f16:
      static_cast<__half*>(out)[k] = from_double<__half>(s);
      break;
    case Element::f32:
      static_cast<float*>(out)[k] = float(s);
      break;
    case Element::f64:
      static_cast<double*>(out)[k] = s;
  }
}

template <class T>
void run(const LayerNormTask& t, void* workspace, void* stream) {
  using R = Arithmetic<T>;
  const int64_t wide = (t.n / 4 + 31) / 32 * 32, all = t.batch * t.rows;
  const unsigned threads = unsigned(wide < 32 ? 32 : wide > kMaxThreads ? kMaxThreads : wide);
  if (t.pass == LayerNormPass::forward || t.pass == LayerNormPass::jvp) {
    if (all > 0) launch(t.pass == LayerNormPass::jvp ? change<T> : forward<T>, blocks(all), threads, 0, stream, t);
    return;
  }
  R* partial = static_cast<R*>(workspace);
  const Pieces pieces(t);
  const size_t kept = size_t(pieces.sums * t.n) * sizeof(R);
  const bool shared = kept <= 96 * 1024 && kept + 1024 <= max_shared_bytes();
  const auto kernel = t.pass == LayerNormPass::backward ? backward<T, false> : backward<T, true>;
  if (all > 0)
    launch(kernel, blocks(t.batch * pieces.count), threads, shared ? kept : 0, stream, t, pieces, partial, shared);
  const unsigned warps = pieces.count < 1 ? 1 : pieces.count > 32 ? 32 : unsigned(pieces.count);
  if (pieces.sums > 0)
    launch(add_pieces<R>, dim3(blocks(t.batch * ((t.n + 31) / 32)), unsigned(pieces.sums)), 32 * warps, 0, stream,
           partial, pieces.count, pieces.sums, t.n, t.weight_element, t.dweight, t.dbias);
}

}  // namespace

int64_t cuda::layer_norm_workspace(const LayerNormTask& t) {
  const Pieces pieces(t);
  return t.batch * pieces.count * pieces.sums * t.n * (t.element == Element::f64 ? 8 : 4);
}

void cuda::layer_norm(const LayerNormTask& t, void* workspace, void* stream) {
  with_device_type(t.element, [&](auto type) { run<decltype(type)>(t, workspace, stream); });
}

}  // namespace gradops
