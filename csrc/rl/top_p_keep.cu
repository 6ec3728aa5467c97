// One block per row; the edge of the nucleus is found by bisection, with sums in a fixed order.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "rl/top_p_keep.h"

namespace gradops {
namespace {

// Integers in the order of the numbers, and back
template <class A, class Int>
union Bits {
  A number;
  Int key;
};
template <class T>
struct Order {  // of float, and of what fits in it
  using Number = float;
  using Int = int32_t;
};
template <>
struct Order<double> {
  using Number = double;
  using Int = int64_t;
};
template <class T>
__device__ inline int64_t key_of(double x) {
  using Int = typename Order<T>::Int;
  Bits<typename Order<T>::Number, Int> b;
  b.number = static_cast<typename Order<T>::Number>(x + 0.);  // no -0
  constexpr Int kSign = Int(1) << (sizeof(Int) * 8 - 1);
  return b.key >= 0 ? b.key : ~(b.key & ~kSign);
}
template <class T>
__device__ inline double number_of(int64_t key) {
  using Int = typename Order<T>::Int;
  constexpr Int kSign = Int(1) << (sizeof(Int) * 8 - 1);
  Bits<typename Order<T>::Number, Int> b;
  b.key = key >= 0 ? Int(key) : Int(~Int(key) | kSign);
  return double(b.number);
}

template <class T>
__global__ void __launch_bounds__(256) rows_mask(const TopPTask t) {
  __shared__ double scratch[32];
  __shared__ int equals[32];
  const double infinity = double(INFINITY);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t r = blockIdx.x; r < t.rows; r += gridDim.x) {
    const T* x = static_cast<const T*>(t.logits) + r * t.cols;
    bool* mask = t.mask + r * t.cols;
    const int64_t least_count = t.min_keep < t.cols ? t.min_keep : t.cols;
    double top = -infinity, lowest = infinity, nan = 0;
    for (int64_t i = threadIdx.x; i < t.cols; i += blockDim.x) {
      const double v = to_double(x[i]);
      top = v > top ? v : top, nan += v != v;
      lowest = v > -infinity && v < lowest ? v : lowest;
    }
    top = block_all(top, -infinity, scratch, Larger());
    lowest = -block_all(-lowest, -infinity, scratch, Larger());
    nan = block_all(nan, 0., scratch, Add());
    if (nan > 0 || top == -infinity || top == infinity) {  // no softmax: nothing is left out
      for (int64_t i = threadIdx.x; i < t.cols; i += blockDim.x) mask[i] = true;
      continue;
    }
    const auto weight = [=](double v) { return sizeof(T) == 8 ? exp(v - top) : double(expf(float(v - top))); };
    double mass = 0, count = 0;
    const auto sum_from = [&](double least) {  // to mass and count, of the entries of at least `least`
      mass = count = 0;
      for (int64_t i = threadIdx.x; i < t.cols; i += blockDim.x) {
        const double v = to_double(x[i]);
        if (v >= least) mass += weight(v), count += 1;
      }
      mass = block_all(mass, 0., scratch, Add()), count = block_all(count, 0., scratch, Add());
    };
    const bool all = t.p >= 1;  // that are not masked
    sum_from(-infinity);
    const double goal = all ? 0 : t.p * mass;
    const auto enough = [&] { return mass >= goal && count >= double(least_count); };
    // Of `low` and all above there is enough, strictly above there is not.
    int64_t low = key_of<T>(-infinity), high = key_of<T>(all ? lowest : top) + (all ? 0 : 1);
    double above_mass = 0, above_count = 0;
    if (all) {
      sum_from(lowest);
      above_mass = mass, above_count = count;
    }
    while (!all && low + 1 < high) {
      const int64_t middle = low + int64_t((uint64_t(high) - uint64_t(low)) / 2);
      sum_from(number_of<T>(middle));
      if (enough())
        low = middle;
      else
        high = middle, above_mass = mass, above_count = count;
    }
    const double edge = number_of<T>(low), at_edge = weight(edge);
    // how many of those on the edge are still needed: lower ids first
    mass = above_mass, count = above_count;
    int64_t needed = 0;
    if (!enough()) {
      const double by_mass = at_edge > 0 ? ceil((goal - mass) / at_edge) : 0;
      needed = int64_t(by_mass > double(least_count) - count ? by_mass : double(least_count) - count);
      if (needed < 1) needed = 1;
    }
    for (int64_t first = 0; first < t.cols; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      const double v = i < t.cols ? to_double(x[i]) : double(INFINITY);
      const unsigned same = __ballot_sync(0xffffffffu, v == edge);
      __syncthreads();  // the last round's counts have been read
      if (lane == 0) equals[warp] = __popc(same);
      __syncthreads();
      int64_t before = __popc(same & ((1u << lane) - 1)), total = 0;
      for (int w = 0; w < int(blockDim.x) / 32; ++w) {
        if (w < warp) before += equals[w];
        total += equals[w];
      }
      if (i < t.cols) mask[i] = v > edge || (v == edge && before < needed);
      needed -= total;
    }
    __syncthreads();
  }
}

}  // namespace

void cuda::top_p_keep(const TopPTask& t, void* stream) {
  if (t.rows == 0 || t.cols == 0) return;
  with_device_type(t.element, [&](auto type) {
    launch(rows_mask<decltype(type)>, blocks(t.rows < (1 << 20) ? t.rows : (1 << 20)), t.cols > 4096 ? 256 : 64, 0,
           stream, t);
  });
}

}  // namespace gradops
