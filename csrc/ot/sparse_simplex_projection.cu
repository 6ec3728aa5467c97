// A warp per vector. The width-th largest entry is found by bisecting between numbers that occur, the threshold by
// Michelot's steps; a vector is read again from the cache for each.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "ot/sparse_simplex_projection.h"

namespace gradops {
namespace {

constexpr int kThreads = 128;
constexpr double kInfinity = __builtin_inf();

struct Smaller {
  __device__ double operator()(double a, double b) const { return a < b ? a : b; }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    project(const T* __restrict__ all, const double* __restrict__ all_z, T* __restrict__ values,
            int64_t* __restrict__ index, T* __restrict__ taus, int64_t vectors, int64_t size, int64_t width) {
  const int lane = threadIdx.x % 32;
  const int64_t v = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (v >= vectors) return;  // whole warps
  const T* x = all + v * size;
  const double z = all_z[v];
  double most = -kInfinity;
  bool good = z > 0 && z < kInfinity;
  for (int64_t i = lane; i < size; i += 32) {
    const double y = to_double(x[i]);
    most = y > most ? y : most;
    good &= y < kInfinity;
  }
  most = warp_all(most, Larger());
  good = warp_all(int(good), [](int a, int b) { return a & b; }) && most > -kInfinity;

  // Entries above `low` can matter; the width-th largest lies in [low, high], where more than width do.
  double low = most - z, high = most;
  const auto above = [&](double bound, double& next, double& last) {  // how many; the nearest on both sides
    int64_t count = 0;
    next = kInfinity, last = -kInfinity;
    for (int64_t i = lane; i < size; i += 32) {
      const double y = to_double(x[i]);
      count += y > bound;
      if (y > bound) next = y < next ? y : next;
      if (y <= bound) last = y > last ? y : last;
    }
    next = warp_all(next, Smaller()), last = warp_all(last, Larger());
    return warp_all(count, Add());
  };
  double rank = -kInfinity, next, last;
  if (good && above(low, next, last) > width) {
    low = next;
    while (low < high) {
      const double middle = low + (high - low) / 2;
      if (above(middle < high ? middle : low, next, last) >= width)
        low = next;
      else
        high = last;
    }
    rank = low;
  }
  int64_t equal = rank > -kInfinity ? width - above(rank, next, last) : 0;  // of those that are equal to it
  // sum and count of the entries above a threshold among the width largest
  double tau = -z;
  int64_t size_before = -1;
  while (good) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = lane; i < size; i += 32) {
      const double y = to_double(x[i]);
      if (y > rank && y - most > tau) sum += y - most, ++count;
    }
    sum = warp_all(sum, Add()), count = warp_all(count, Add());
    if (equal > 0 && rank - most > tau) sum += double(equal) * (rank - most), count += equal;
    const double higher = (sum - z) / double(count);
    tau = higher > tau ? higher : tau;
    if (count == size_before) break;
    size_before = count;
  }
  if (lane == 0) taus[v] = from_double<T>(good ? most + tau : __builtin_nan(""));

  const auto weight = [&](double y, bool& tied) {  // of an entry; whether it is one of the equal ones
    tied = y == rank;
    const double t = y - most - tau;
    return good && y >= rank && t > 0 ? t : 0.;
  };
  int64_t kept = 0;
  for (int64_t i = lane; i < size; i += 32) {
    bool tied;
    const double t = weight(to_double(x[i]), tied);
    kept += t > 0 && !tied;
  }
  kept = warp_all(kept, Add());
  if (equal > 0 && rank - most > tau) kept += equal;
  int64_t others = width - kept, slot = 0;
  for (int64_t begin = 0; begin < size && slot < width; begin += 32) {  // in order
    const int64_t i = begin + lane;
    bool tied = false;
    double t = i < size ? weight(to_double(x[i]), tied) : 0.;
    const unsigned before = (1u << lane) - 1, ties = __ballot_sync(0xffffffffu, t > 0 && tied);
    if (t > 0 && tied && __popc(ties & before) >= equal) t = 0;
    const int64_t ties_here = __popc(ties);
    equal = equal > ties_here ? equal - ties_here : 0;
    bool mine = t > 0;
    const unsigned rest = __ballot_sync(0xffffffffu, i < size && !mine);
    if (i < size && !mine && __popc(rest & before) < others) mine = true;
    const int64_t rest_here = __popc(rest);
    others = others > rest_here ? others - rest_here : 0;
    const unsigned taken = __ballot_sync(0xffffffffu, mine);
    if (mine) {
      const int64_t to = v * width + slot + __popc(taken & before);
      values[to] = from_double<T>(good ? t : __builtin_nan(""));
      index[to] = i;
    }
    slot += __popc(taken);
  }
}

}  // namespace

void cuda::sparse_simplex_projection(const SparseSimplexTask& t, void* stream) {
  if (t.size == 0) return;
  with_device_type(t.element, [&](auto type) {
    using T = decltype(type);
    launch(project<T>, blocks((t.vectors + kThreads / 32 - 1) / (kThreads / 32)), kThreads, 0, stream,
           static_cast<const T*>(t.x), t.z, static_cast<T*>(t.values), t.index, static_cast<T*>(t.tau), t.vectors,
           t.size, t.width);
  });
}

}  // namespace gradops
