// One warp per row, 32 places at a time: scans over the lanes, in double and in a fixed order.
#include <cmath>

#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "rl/plackett_luce_logprob.h"

namespace gradops {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;
constexpr double kLowest = -0x1.fffffffffffffp1023;

struct Least {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

struct LogSum {  // log of a sum of exponentials: m + log r, m the largest of them
  double m, r;
  __device__ LogSum operator+(LogSum o) const {
    const double most = Larger()(m, o.m);
    return {most, r * exp(m - most) + o.r * exp(o.m - most)};
  }
};
// The LogSum of this lane and those before it.
__device__ LogSum scan(LogSum v, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const LogSum before{__shfl_up_sync(kAll, v.m, step), __shfl_up_sync(kAll, v.r, step)};
    if (lane >= step) v = before + v;
  }
  return v;
}
// q = a q_before + b, composed over this lane and those before it.
struct Affine {
  double a, b;
};
__device__ Affine scan(Affine v, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const double a = __shfl_up_sync(kAll, v.a, step), b = __shfl_up_sync(kAll, v.b, step);
    if (lane >= step) v = {v.a * a, v.a * b + v.b};
  }
  return v;
}

struct Places {  // of one row, in the workspace
  double *most, *sum, *weight;
  int32_t* of_item;
  __host__ __device__ Places(const PlackettLuce& t, void* workspace, int64_t row) {
    double* p = static_cast<double*>(workspace) + row * 3 * t.k;
    most = p, sum = p + t.k, weight = p + 2 * t.k;
    of_item = reinterpret_cast<int32_t*>(static_cast<double*>(workspace) + t.rows * 3 * t.k) + row * t.n;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) rows(const __grid_constant__ PlackettLuce t, void* workspace) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, n = t.n;
  if (row >= t.rows) return;  // whole warps
  const T* scores = static_cast<const T*>(t.scores) + row * n;
  const int64_t* permutation = t.permutation + row * t.k;
  T* out = static_cast<T*>(t.out) + (t.gradient ? row * n : row);
  const Places at(t, workspace, row);

  int64_t ranked = t.k, bad = t.k;
  for (int64_t i = lane; i < t.k; i += 32) {
    if (permutation[i] < 0) ranked = Least()(ranked, i);
    if (permutation[i] >= n) bad = Least()(bad, i);
  }
  ranked = warp_all(ranked, Least());
  bad = warp_all(bad, Least());
  if (bad < ranked || ranked == 0) {  // whole warps
    const double value = bad < ranked ? double(NAN) : 0.;
    for (int64_t j = lane; j < (t.gradient ? n : 1); j += 32) out[j] = T(value);
    return;
  }
  for (int64_t j = lane; j < n; j += 32) at.of_item[j] = -1;
  __syncwarp();
  for (int64_t i = lane; i < ranked; i += 32) at.of_item[permutation[i]] = int32_t(i);
  __syncwarp();

  LogSum all{kLowest, 0};  // of what is left behind the places done so far
  for (int64_t j = lane; j < n; j += 32)
    if (at.of_item[j] < 0) all.m = Larger()(double(scores[j]), all.m);
  all.m = warp_all(all.m, Larger());
  for (int64_t j = lane; j < n; j += 32)
    if (at.of_item[j] < 0) all.r += exp(double(scores[j]) - all.m);
  all.r = warp_all(all.r, Add());

  double total = 0;
  for (int64_t end = ranked; end > 0; end -= 32) {
    const int64_t i = end - 1 - lane;
    const double s = i >= 0 ? double(scores[permutation[i]]) : 0;
    const bool out_of_play = i < 0 || s == -double(INFINITY);
    LogSum v{out_of_play ? kLowest : s, out_of_play ? 0. : 1.};
    if (s != s) v = {0, s};
    v = all + scan(v, lane);
    all = {__shfl_sync(kAll, v.m, 31), __shfl_sync(kAll, v.r, 31)};
    if (i < 0) continue;
    total += (s - v.m) - log(v.r == 0 ? 1. : v.r);
    if (t.gradient) at.most[i] = v.m, at.sum[i] = v.r;
  }
  if (!t.gradient) {
    total = warp_all(total, Add());
    if (lane == 0) *out = T(total);
    return;
  }

  __syncwarp();
  double q = 0;
  for (int64_t begin = 0; begin < ranked; begin += 32) {
    const int64_t i = begin + lane;
    Affine v{1, 0};
    if (i < ranked) v = {i > 0 ? exp(at.most[i] - at.most[i - 1]) * at.sum[i] / at.sum[i - 1] : 0., 1};
    v = scan(v, lane);
    q = v.a * q + v.b;
    if (i < ranked) at.weight[i] = q / at.sum[i];
    q = __shfl_sync(kAll, q, 31);
  }
  __syncwarp();
  for (int64_t j = lane; j < n; j += 32) {
    const int32_t place = at.of_item[j];
    const int64_t i = place < 0 ? ranked - 1 : place;
    out[j] = T((place < 0 ? 0. : 1.) - exp(double(scores[j]) - at.most[i]) * at.weight[i]);
  }
}

}  // namespace

int64_t cuda::plackett_luce_workspace(const PlackettLuce& t) { return t.rows * (24 * t.k + 4 * t.n); }

void cuda::plackett_luce(const PlackettLuce& t, void* workspace, void* stream) {
  if (t.rows == 0) return;
  const unsigned grid = blocks((t.rows + kThreads / 32 - 1) / (kThreads / 32));
  if (t.element == Element::f64)
    launch(rows<double>, grid, kThreads, 0, stream, t, workspace);
  else
    launch(rows<float>, grid, kThreads, 0, stream, t, workspace);
}

}  // namespace gradops
