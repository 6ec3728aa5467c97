// A block computes a square of h, on or below the diagonal where h is symmetric; a last kernel mirrors it.
// bf16 and f16 are multiplied on tensor cores; f32, f64 and differences (in float, double) on the CUDA
// cores, so no product is rounded. Sums of kFlush tokens are made in float and added to h.
#include "common/async_copy.h"
#include "common/device_number.cuh"
#include "common/mma.h"
#include "quant/hessian_update.h"

namespace gradops {
namespace {

constexpr int kThreads = 256;
template <class A>
constexpr int64_t kFlush = sizeof(A) == 8 ? 512 : 4096;

struct Counts {
  int64_t* tokens;  // per item: how many count
  int64_t* rows;    // and which, or null: all
};

// One block per item. n_new, the number of tokens that count, and their list in order.
__global__ void __launch_bounds__(kThreads)
    select_tokens(const bool* __restrict__ mask, const int64_t* __restrict__ n_seen, int64_t* __restrict__ n_new,
                  Counts counts, int64_t tokens) {
  __shared__ int per_warp[kThreads / 32];
  const int64_t item = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t count = mask ? 0 : tokens;
  if (mask)
    for (int64_t first = 0; first < tokens; first += kThreads) {
      const int64_t t = first + threadIdx.x;
      const bool mine = t < tokens && mask[item * tokens + t];
      const unsigned votes = __ballot_sync(0xffffffffu, mine);
      if (lane == 0) per_warp[warp] = __popc(votes);
      __syncthreads();
      int before = 0, all = 0;
      for (int w = 0; w < kThreads / 32; ++w) before += w < warp ? per_warp[w] : 0, all += per_warp[w];
      if (mine) counts.rows[item * tokens + count + before + __popc(votes & ((1u << lane) - 1))] = t;
      count += all;
      __syncthreads();
    }
  if (threadIdx.x == 0) counts.tokens[item] = count, n_new[item] = n_seen[item] + count;
}

// One item, as the kernels see it.
struct Item {
  int64_t n, tokens, seen;
  const int64_t* rows;
  __device__ Item(const int64_t* n_seen, const Counts& counts, int64_t item, int64_t n, int64_t all_tokens)
      : n(n),
        tokens(counts.tokens[item]),
        seen(n_seen[item]),
        rows(counts.rows ? counts.rows + item * all_tokens : nullptr) {}
  __device__ int64_t row(int64_t t) const { return rows ? rows[t] : t; }
  __device__ double beta(bool first) const { return first ? double(seen) / double(seen + tokens) : 1.; }
  __device__ double scale() const { return 2. / double(seen + tokens); }
};

// Square u of a grid of `side` by `side`: all, or those on and below the diagonal, row by row.
__device__ inline void square_at(int64_t u, int64_t side, bool lower, int64_t& i, int64_t& j) {
  if (!lower) {
    i = u / side, j = u % side;
    return;
  }
  i = int64_t((sqrt(8. * double(u) + 1.) - 1.) / 2.);
  while (i * (i + 1) / 2 > u) --i;
  while ((i + 1) * (i + 2) / 2 <= u) ++i;
  j = u - i * (i + 1) / 2;
}

// --- tensor cores: symmetric, bf16 and f16 -------------------------------------------------------

constexpr int kSquare = 128, kDepth = 32, kPitch = kSquare + 8;  // odd in units of 16 bytes: no bank conflicts

template <class T>
struct TensorPlan {
  T* panels;
  __host__ __device__ explicit TensorPlan(SharedPlan& plan) : panels(plan.take<T>(4 * kDepth * kPitch)) {}
  __device__ T* left(int64_t half) const { return panels + half * 2 * kDepth * kPitch; }
  __device__ T* right(int64_t half) const { return left(half) + kDepth * kPitch; }
};

// kDepth tokens of kSquare features to shared memory, a row per token; zeros where there are none.
template <class T>
__device__ void fetch(T* to, const T* x, const Item& item, int64_t token, int64_t feature, bool aligned) {
  constexpr int kEach = 8, kRow = kSquare / kEach;
#pragma unroll 1  // addresses of one copy at a time: registers
  for (int v = threadIdx.x; v < kDepth * kRow; v += kThreads) {
    const int k = v / kRow, f = v % kRow * kEach;
    T* target = to + k * kPitch + f;
    const bool row = token + k < item.tokens;
    const T* from = x + (row ? item.row(token + k) * item.n : 0) + feature + f;
    if (row && aligned && feature + f + kEach <= item.n) {
      copy_async(target, from);
    } else {
      for (int e = 0; e < kEach; ++e) target[e] = row && feature + f + e < item.n ? from[e] : T(0.f);
    }
  }
}

// Eight warps, 64 x 32 of the square each.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 2)
    tensor_product(const T* __restrict__ x_all, A* __restrict__ h_all, const int64_t* __restrict__ n_seen,
                   Counts counts, int64_t n, int64_t all_tokens, int64_t side, bool aligned) {
  GRADOPS_DYNAMIC_SHARED(unsigned char, memory);
  SharedPlan cut(memory);
  const TensorPlan<T> plan(cut);
  const int64_t squares = side * (side + 1) / 2, number = blockIdx.x / squares;
  const Item item(n_seen, counts, number, n, all_tokens);
  const T* x = x_all + number * all_tokens * n;
  A* h = h_all + number * n * n;
  int64_t bi, bj;
  square_at(blockIdx.x % squares, side, true, bi, bj);
  const int warp = threadIdx.x / 32, top = warp % 2 * 64, start = warp / 2 * 32;
  const auto get = [&](int64_t k, int64_t half) {
    fetch(plan.left(half), x, item, k, bi * kSquare, aligned);
    fetch(plan.right(half), x, item, k, bj * kSquare, aligned);
  };
  for (int64_t chunk = 0; chunk < item.tokens; chunk += kFlush<A>) {
    const int64_t end = chunk + kFlush<A> < item.tokens ? chunk + kFlush<A> : item.tokens;
    FragC sum[4][4] = {};
    __syncthreads();  // the panels of the last chunk have been used
    get(chunk, 0);
    for (int64_t k = chunk, half = 0; k < end; k += kDepth, half = 1 - half) {
      wait_async();
      __syncthreads();  // these panels are here; the other ones have been used
      if (k + kDepth < end) get(k + kDepth, 1 - half);
#pragma unroll 1
      for (int kk = 0; kk < kDepth; kk += 16) {
        FragB<T> b[2][2];
#pragma unroll
        for (int c = 0; c < 2; ++c) load_b(b[c], plan.right(half) + kk * kPitch + start + 16 * c, kPitch);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          FragA<T> a;
          load_a_transposed(a, plan.left(half) + kk * kPitch + top + 16 * r, kPitch);
#pragma unroll
          for (int c = 0; c < 4; ++c) mma(sum[r][c], a, b[c / 2][c % 2]);
        }
      }
    }
    const A beta = A(item.beta(chunk == 0)), scale = A(item.scale());
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        __syncwarp();  // else all loads of h would come first, and need registers
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t i = bi * kSquare + top + 16 * r + c_row(e), j = bj * kSquare + start + 8 * c + c_col(e);
          if (i < n && j < n) h[i * n + j] = beta * h[i * n + j] + scale * A(sum[r][c].r[e]);
        }
      }
  }
}

// --- CUDA cores ----------------------------------------------------------------------------------

// T: float or double. A thread has kRuns x kRuns runs of 4 x 4 sums.
template <class T>
struct CorePlan {
  static constexpr int kRuns = sizeof(T) == 8 ? 1 : 2, kSide = 64 * kRuns, kDeep = 16;
  static constexpr int kEach = kDeep * kSide / kThreads;  // elements of a panel that a thread fetches
  T *left, *right;
  __host__ __device__ explicit CorePlan(SharedPlan& plan)
      : left(plan.take<T>(kDeep * kSide)), right(plan.take<T>(kDeep * kSide)) {}
};
template <class T>
struct alignas(16) Four {
  T v[4];
};

template <class In, class T, class A>
__global__ void __launch_bounds__(kThreads, 1)
    core_product(const In* __restrict__ x_all, const In* __restrict__ x_q_all, A* __restrict__ h_all,
                 const int64_t* __restrict__ n_seen, Counts counts, int64_t n, int64_t all_tokens, int64_t side) {
  using Plan = CorePlan<T>;
  constexpr int kRuns = Plan::kRuns, kSide = Plan::kSide, kDeep = Plan::kDeep, kEach = Plan::kEach;
  GRADOPS_DYNAMIC_SHARED(unsigned char, memory);
  SharedPlan cut(memory);
  const Plan plan(cut);
  const bool symmetric = !x_q_all;
  const int64_t squares = symmetric ? side * (side + 1) / 2 : side * side, number = blockIdx.x / squares;
  const Item item(n_seen, counts, number, n, all_tokens);
  const In* x = x_all + number * all_tokens * n;
  const In* x_q = symmetric ? nullptr : x_q_all + number * all_tokens * n;
  A* h = h_all + number * n * n;
  int64_t bi, bj;
  square_at(blockIdx.x % squares, side, symmetric, bi, bj);
  const int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;

  // What this thread fetches: one feature of every kStep-th token.
  constexpr int kStep = kThreads / kSide;
  const int first = threadIdx.x / kSide;
  const int64_t i = bi * kSide + threadIdx.x % kSide, j = bj * kSide + threadIdx.x % kSide;
  T next_left[kEach], next_right[kEach];
  const auto fetch_next = [&](int64_t token) {
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
      const int64_t t = token + first + s * kStep;
      const bool row = t < item.tokens;
      const int64_t offset = row ? item.row(t) * n : 0;
      next_left[s] = row && i < n ? T(to_double(x[offset + i])) : T(0);
      if (symmetric) {
        next_right[s] = row && j < n ? T(to_double(x[offset + j])) : T(0);
      } else {
        if (row && i < n) next_left[s] -= T(to_double(x_q[offset + i]));
        next_right[s] = row && j < n ? T(to_double(x_q[offset + j])) : T(0);
      }
    }
  };
  for (int64_t chunk = 0; chunk < item.tokens; chunk += kFlush<A>) {
    const int64_t end = chunk + kFlush<A> < item.tokens ? chunk + kFlush<A> : item.tokens;
    T sum[4 * kRuns][4 * kRuns] = {};
    fetch_next(chunk);
    for (int64_t k = chunk; k < end; k += kDeep) {
      __syncthreads();  // the panels have been used
#pragma unroll
      for (int s = 0; s < kEach; ++s) {
        plan.left[threadIdx.x + s * kThreads] = next_left[s];
        plan.right[threadIdx.x + s * kThreads] = next_right[s];
      }
      __syncthreads();  // the panels are here
      if (k + kDeep < end) fetch_next(k + kDeep);
#pragma unroll 2
      for (int kk = 0; kk < kDeep; ++kk) {
        Four<T> a[kRuns], b[kRuns];
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
          a[r] = *reinterpret_cast<const Four<T>*>(plan.left + kk * kSide + ty + 64 * r);
          b[r] = *reinterpret_cast<const Four<T>*>(plan.right + kk * kSide + tx + 64 * r);
        }
#pragma unroll
        for (int i = 0; i < 4 * kRuns; ++i)
#pragma unroll
          for (int j = 0; j < 4 * kRuns; ++j) sum[i][j] += a[i / 4].v[i % 4] * b[j / 4].v[j % 4];
      }
    }
    const A beta = A(item.beta(chunk == 0)), scale = A(item.scale());
#pragma unroll
    for (int r = 0; r < 4 * kRuns; ++r) {
      __syncwarp();  // else all loads of h would come first, and need registers
#pragma unroll
      for (int c = 0; c < 4 * kRuns; ++c) {
        const int64_t row = bi * kSide + ty + r / 4 * 64 + r % 4, col = bj * kSide + tx + c / 4 * 64 + c % 4;
        if (row < n && col < n) h[row * n + col] = beta * h[row * n + col] + scale * A(sum[r][c]);
      }
    }
  }
}

// --- mirror --------------------------------------------------------------------------------------

template <class A>
__global__ void __launch_bounds__(kThreads)
    mirror(A* __restrict__ h_all, const int64_t* __restrict__ tokens, int64_t n, int64_t side) {
  constexpr int kTile = 32;
  __shared__ A tile[kTile][kTile + 1];
  const int64_t squares = side * (side + 1) / 2, number = blockIdx.x / squares;
  if (tokens[number] == 0) return;
  A* h = h_all + number * n * n;
  int64_t bi, bj;
  square_at(blockIdx.x % squares, side, true, bi, bj);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int r = warp; r < kTile; r += kThreads / 32) {
    const int64_t i = bi * kTile + r, j = bj * kTile + lane;
    if (i < n && j < n && j <= i) tile[r][lane] = h[i * n + j];
  }
  __syncthreads();
  for (int r = warp; r < kTile; r += kThreads / 32) {
    const int64_t j = bj * kTile + r, i = bi * kTile + lane;  // h[j][i] above the diagonal
    if (i < n && j < n && j < i) h[j * n + i] = tile[lane][r];
  }
}

// --- host ----------------------------------------------------------------------------------------

template <class In, class A>
void run(const HessianTask& t, const Counts& counts, void* stream) {
  using T = Arithmetic<In>;
  const In *x = static_cast<const In*>(t.x), *x_q = static_cast<const In*>(t.x_q);
  A* h = static_cast<A*>(t.h);
  const auto lower = [](int64_t side) { return side * (side + 1) / 2; };
  SharedPlan plan;
  bool done = false;
  if constexpr (sizeof(In) == 2) {
    if (!x_q) {
      const int64_t side = (t.n + kSquare - 1) / kSquare;
      const bool aligned = t.n % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
      TensorPlan<In>{plan};
      launch(tensor_product<In, A>, blocks(t.batch * lower(side)), kThreads, plan.bytes(), stream, x, h, t.n_seen,
             counts, t.n, t.tokens, side, aligned);
      done = true;
    }
  }
  if (!done) {
    const int64_t side = (t.n + CorePlan<T>::kSide - 1) / CorePlan<T>::kSide;
    CorePlan<T>{plan};
    launch(core_product<In, T, A>, blocks(t.batch * (x_q ? side * side : lower(side))), kThreads, plan.bytes(), stream,
           x, x_q, h, t.n_seen, counts, t.n, t.tokens, side);
  }
  if (x_q) return;
  const int64_t side = (t.n + 31) / 32;
  launch(mirror<A>, blocks(t.batch * lower(side)), kThreads, 0, stream, h, counts.tokens, t.n, side);
}

}  // namespace

int64_t cuda::hessian_update_workspace(const HessianTask& t) { return 8 * t.batch * (1 + (t.mask ? t.tokens : 0)); }

void cuda::hessian_update(const HessianTask& t, void* workspace, void* stream) {
  if (t.batch == 0) return;
  Counts counts{static_cast<int64_t*>(workspace), nullptr};
  if (t.mask) counts.rows = counts.tokens + t.batch;
  launch(select_tokens, blocks(t.batch), kThreads, 0, stream, t.mask, t.n_seen, t.n_new, counts, t.tokens);
  if (t.n == 0 || t.tokens == 0) return;
  with_device_type(t.element, [&](auto type) {
    using In = decltype(type);
    if (t.h_element == Element::f64)
      run<In, double>(t, counts, stream);
    else if constexpr (sizeof(In) < 8)
      run<In, float>(t, counts, stream);
  });
}

}  // namespace gradops
