// cuda_team.cuh: the team of one transport problem on CUDA (ot/team.h): a thread block, a warp per column.
//
// Sums that scatter over rows take one piece per warp: every warp adds its own columns, one after the other, into
// numbers of its own (the rows of a column differ, so its lanes never meet), and pieces are added in order. No atomics,
// no lists by rows to keep up to date with the supports, and the same bits every time; the price is a vector of n per
// warp.
#pragma once
#include "common/reduce.cuh"
#include "ot/column_scan.h"
#include "ot/team.h"

namespace gradops {
namespace {

// Functions of their own, and loops left as they are: the solvers call them in a hundred places, and ptxas takes
// minutes over what would become of it.
__device__ __noinline__ double warp_sum(double v) { return warp_all(v, Add()); }
__device__ __noinline__ double warp_largest(double v) { return warp_all(v, Larger()); }
__device__ __noinline__ double block_sum(double v, double* scratch) { return block_all(v, 0., scratch, Add()); }
__device__ __noinline__ double block_largest(double v, double* scratch) {
  return block_all(v, -double(INFINITY), scratch, Larger());
}

struct CudaLanes {  // one warp
  template <class F>
  __device__ void each(int64_t count, const F& f) const {
#pragma unroll 1
    for (int64_t k = threadIdx.x % 32; k < count; k += 32) f(k);
  }
  template <class F>
  __device__ double sum(int64_t count, const F& f) const {
    double s = 0;
    each(count, [&](int64_t k) { s += f(k); });
    return warp_sum(s);
  }
  template <class F>
  __device__ double largest(int64_t count, const F& f) const {
    double s = -double(INFINITY);
    each(count, [&](int64_t k) {
      const double v = f(k);
      s = v > s ? v : s;
    });
    return warp_largest(s);
  }
  template <class F>
  __device__ double span(int64_t count, const F& f, double& least, double& most) const {
    double s = 0, low = double(INFINITY), high = -low;
    each(count, [&](int64_t k) {
      const double v = f(k);
      s += v;
      low = v < low ? v : low;
      high = v > high ? v : high;
    });
    least = -warp_largest(-low), most = warp_largest(high);
    return warp_sum(s);
  }
  template <class F>
  __device__ double above(int64_t count, const F& x, double level, int64_t& number) const {
    double s = 0;
    double many = 0;
    each(count, [&](int64_t k) {
      const double v = x(k) - level;
      if (v > 0) s += v, many += 1;
    });
    number = int64_t(warp_sum(many));
    return warp_sum(s);
  }
  __device__ double load_above(int64_t count, const double* x, const int32_t* at, const double* less, double* to,
                               double level, int64_t& number) const {
    each(count, [=](int64_t k) { to[k] = x[at ? at[k] : k] - less[k]; });
    return above(count, Values{to}, level, number);  // a lane reads what it wrote
  }
  __device__ double sum_at(int64_t count, const double* x, const int32_t* at) const {
    return sum(count, [=](int64_t k) { return x[at[k]]; });
  }
  template <class F>
  __device__ void add_at(int64_t count, const int32_t* at, const F& f, double* to) const {
    each(count, [&](int64_t k) { to[at[k]] += f(k); });
  }
  __device__ void count_at(int64_t count, const int32_t* at, const double* x, double* to) const {
    each(count, [&](int64_t k) { to[2 * at[k]] += x[k], to[2 * at[k] + 1] += 1; });
  }
  // A lane reads before any lane writes, 32 entries at a time: entries may move to the front of their own array.
  template <class L, class W, class P>
  __device__ int64_t keep(int64_t count, const L& load, const W& wanted, const P& put) const {
    const int lane = threadIdx.x % 32;
    int64_t place = 0;
#pragma unroll 1
    for (int64_t begin = 0; begin < count; begin += 32) {
      const int64_t k = begin + lane;
      const auto v = load(k < count ? k : count - 1);
      const bool keeps = k < count && wanted(v);
      const unsigned all = __ballot_sync(0xffffffffu, keeps);
      __syncwarp();
      if (keeps) put(v, place + __popc(all & ((1u << lane) - 1)));
      place += __popc(all);
    }
    return place;
  }
  template <class F>
  __device__ void once(const F& f) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) f();
    __syncwarp();
  }
  __device__ void wait() const { __syncwarp(); }
};

class CudaTeam {
 public:
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kTogether = 1;  // other warps run while one waits

  __device__ explicit CudaTeam(double* scratch) : scratch_(scratch) {}  // shared memory, a number per warp

  template <class F>
  __device__ void each(int64_t count, const F& f) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < count; i += kThreads) f(i);
    __syncthreads();
  }
  template <class F>
  __device__ double sum(int64_t count, const F& f) const {
    double s = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < count; i += kThreads) s += f(i);
    return block_sum(s, scratch_);
  }
  template <class F>
  __device__ double largest(int64_t count, const F& f) const {
    double s = -double(INFINITY);
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const double v = f(i);
      s = v > s ? v : s;
    }
    return block_largest(s, scratch_);
  }
  template <class F>
  __device__ void columns(int64_t count, int64_t, const F& f) const {
#pragma unroll 1
    for (int64_t j = threadIdx.x / 32; j < count; j += kWarps) f(j, CudaLanes());
    __syncthreads();
  }
  template <class F>
  __device__ void once(const F& f) const {
    __syncthreads();
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  static_assert(kWarps == 8);
  __device__ int64_t pieces(int64_t, int64_t) const { return kWarps; }

  // Lanes run over rows: a matrix is read in pieces of a few columns' width, which the warps of a block share, as they
  // work on neighbouring columns.
  __device__ void scan(const ColumnScan& t) const {
    columns(t.cost.m, 0, [&](int64_t j, const CudaLanes& lanes) {
      const double low = t.low[j];
      int64_t found = 0;
      if (low < double(INFINITY))
        found = lanes.keep(
            t.cost.n, [&](int64_t i) { return Row{int32_t(i), cost_at(t.cost, i, j)}; },
            [&](Row v) { return !(t.alpha[v.row] - v.cost <= low); },
            [&](Row v, int64_t place) {
              const int64_t to = j * t.capacity + place;
              if (place < t.capacity) t.index[to] = v.row, t.value[to] = v.cost - t.shift;
            });
      lanes.once([&] { t.count[j] = int32_t(found); });
    });
  }
  // The largest entry alone would take all the mass: no threshold is below that.
  __device__ void bounds(const ColumnScan& t, const double* scaled_mass, int64_t) const {
    columns(t.cost.m, 0, [&](int64_t j, const CudaLanes& lanes) {
      const double top = lanes.largest(t.cost.n, [&](int64_t i) { return t.alpha[i] - cost_at(t.cost, i, j); });
      const double low = top - scaled_mass[j];
      lanes.once([&] { t.low[j] = low - (fabs(low) * 0x1p-52 + 0x1p-1022); });
    });
  }

 private:
  struct Row {
    int32_t row;
    double cost;
  };
  double* scratch_;
};

}  // namespace
}  // namespace gradops
