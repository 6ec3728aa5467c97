// One block per matrix, one launch for all steps. X is s x n with s <= n (tall matrices are
// transposed on the way in and out), padded with zeros to multiples of 32.
//
// Two kernels. Resident: X and A = X X^T stay in shared memory. Streamed, for s <= 256 and any n: X
// and A stay in global memory (in practice the L2 cache) and pass through shared memory in panels,
// fetched one ahead. Both give one warp one to three 32 x 32 tiles of a product at a time, so a whole
// symmetric product is in registers before it is written; B = b A + c A A takes A's place.
#include <algorithm>
#include <string>

#include "common/async_copy.h"
#include "common/reduce.cuh"
#include "common/tile.cuh"
#include "linalg/newton_schulz.h"

namespace gradops {
namespace {

constexpr int kMostShort = 256, kMostResident = 128;  // s
constexpr int kMostLong = 0x7fffffff - 1023;          // n: columns are counted in int

__host__ __device__ constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
template <class T>  // elements between rows: 16 bytes of padding, so ldmatrix has no bank conflicts
__host__ __device__ constexpr int pitch(int cols) {
  return cols + 16 / int(sizeof(T));
}

struct Steps {
  float a[NewtonSchulzSteps::kMost], b[NewtonSchulzSteps::kMost], c[NewtonSchulzSteps::kMost];
  int steps;
};
struct Shape {
  int64_t batch;
  int s, n, S, np;  // S, np: s and n with padding
  bool tall, normalize;
};

// --- in and out -------------------------------------------------------------------------------

template <class T, class F>  // f(value) for this thread's share of the elements
__device__ void each_value(const T* p, int64_t count, F f) {
  if (count % 4 == 0 && reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0) {
    struct alignas(4 * sizeof(T)) Four {
      Pair<T> low, high;
    };
    for (int64_t e = 4 * threadIdx.x; e < count; e += 4 * blockDim.x) {
      const Four four = *reinterpret_cast<const Four*>(p + e);
      const float2 v = widen(four.low), w = widen(four.high);
      f(v.x), f(v.y), f(w.x), f(w.y);
    }
  } else {
    for (int64_t e = threadIdx.x; e < count; e += blockDim.x) f(float(p[e]));
  }
}

// Divides by the Frobenius norm, by way of the largest element: its square may not be a float.
struct Scale {
  float big = 0.f, norm = 0.f;
  __device__ float operator()(float v) const {
    if (big > 0.f) v /= big;
    return norm == 0.f ? v : v / norm;  // NaN or inf anywhere: norm is NaN
  }
};
template <class T>
__device__ Scale scale_of(const T* in, int64_t count, float* scratch) {
  Scale scale;
  float big = 0.f, squares = 0.f;
  each_value(in, count, [&](float v) { big = fmaxf(big, fabsf(v)); });
  big = block_all(big, 0.f, scratch, [](float x, float y) { return fmaxf(x, y); });
  scale.big = big;
  each_value(in, count, [&](float v) { v = scale(v), squares += v * v; });
  scale.norm = sqrtf(block_all(squares, 0.f, scratch, [](float x, float y) { return x + y; }));
  return scale;
}

template <class T, class M>
__device__ void read_in(const T* in, const Shape& shape, const Scale& scale, const M& X) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (shape.tall) {  // stored n x s: a lane takes eight rows of a column, one 16- or 32-byte run of X
    const int rows = shape.S / 32;
    for (int u = warp; u < rows * (shape.np / 8); u += warps) {
      const int i = u % rows * 32 + lane, j = u / rows * 8;
      float v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e)
        v[e] = i < shape.s && j + e < shape.n ? scale(float(in[int64_t(j + e) * shape.s + i])) : 0.f;
#pragma unroll
      for (int e = 0; e < 8; e += 2) X.put_pair(i, j + e, make_float2(v[e], v[e + 1]));
    }
  } else {
    for (int i = warp; i < shape.S; i += warps)
      for (int j = lane; j < shape.np; j += 32)
        X.put(i, j, i < shape.s && j < shape.n ? scale(float(in[int64_t(i) * shape.n + j])) : 0.f);
  }
}

template <class T, class M>
__device__ void write_out(T* out, const Shape& shape, const M& X) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (shape.tall) {
    const int rows = shape.S / 32;
    for (int u = warp; u < rows * (shape.np / 8); u += warps) {
      const int i = u % rows * 32 + lane, j = u / rows * 8;
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        const float2 v = X.get_pair(i, j + e);
        if (i < shape.s && j + e < shape.n) out[int64_t(j + e) * shape.s + i] = T(v.x);
        if (i < shape.s && j + e + 1 < shape.n) out[int64_t(j + e + 1) * shape.s + i] = T(v.y);
      }
    }
  } else {
    for (int i = warp; i < shape.s; i += warps)
      for (int j = lane; j < shape.n; j += 32) out[int64_t(i) * shape.n + j] = T(X.get(i, j));
  }
}

// --- tiles of a product, dealt to warps ----------------------------------------------------------

// Where in the product the tiles of this warp are.
template <int kTiles>
struct Deal {
  int row[kTiles], col[kTiles];  // row -1: no tile

  __device__ static Deal lower(int rows) {  // on and below the diagonal of rows x rows
    Deal d;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int tile = threadIdx.x / 32 + t * (blockDim.x / 32);
      int i = 0;
      while ((i + 1) * (i + 2) / 2 <= tile) ++i;
      d.row[t] = i < rows ? 32 * i : -1;
      d.col[t] = 32 * (tile - i * (i + 1) / 2);
    }
    return d;
  }
  __device__ static Deal all(int rows, int cols) {
    Deal d;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int tile = threadIdx.x / 32 + t * (blockDim.x / 32);
      d.row[t] = tile < rows * cols ? 32 * (tile % rows) : -1;
      d.col[t] = 32 * (tile / rows);
    }
    return d;
  }
};

// A = tiles, or A = b A + c tiles where B replaces A; mirrored.
template <bool kFirst, class T, int kTiles, class M>
__device__ void put_symmetric(Tile<T> (&tiles)[kTiles], const Deal<kTiles>& deal, const M& A, float b, float c) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if (deal.row[t] < 0) continue;
    const M home = A.block(deal.row[t], deal.col[t]), mirror = A.block(deal.col[t], deal.row[t]);
    tiles[t].each_pair([&](int i, int j, float2 v) {
      if constexpr (!kFirst) {
        const float2 old = home.get_pair(i, j);
        v = make_float2(b * old.x + c * v.x, b * old.y + c * v.y);
      }
      home.put_pair(i, j, v);
      if (deal.row[t] != deal.col[t]) mirror.put(j, i, v.x), mirror.put(j + 1, i, v.y);
    });
  }
}

// X = a X + tiles
template <class T, int kTiles, class M>
__device__ void put_update(Tile<T> (&tiles)[kTiles], const Deal<kTiles>& deal, const M& X, float a) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if (deal.row[t] < 0) continue;
    const M home = X.block(deal.row[t], deal.col[t]);
    tiles[t].each_pair([&](int i, int j, float2 v) {
      const float2 old = home.get_pair(i, j);
      home.put_pair(i, j, make_float2(a * old.x + v.x, a * old.y + v.y));
    });
  }
}

// --- resident ------------------------------------------------------------------------------------

template <class Store, int kParts>
struct ResidentPlan {
  Matrix<Store, kParts> X, A;
  float* scratch;
  __host__ __device__ ResidentPlan(SharedPlan& plan, int S, int np)
      : X{plan.take<Store>(kParts * S * pitch<Store>(np)), pitch<Store>(np), S * pitch<Store>(np)},
        A{plan.take<Store>(kParts * S * pitch<Store>(S)), pitch<Store>(S), S * pitch<Store>(S)},
        scratch(plan.take<float>(32)) {}
};

// tiles = P Q or P Q^T, all in shared memory
template <bool kTransposed, class T, int kParts, int kTiles>
__device__ void multiply(Tile<T> (&tiles)[kTiles], const Deal<kTiles>& deal, const Matrix<T, kParts>& P,
                         const Matrix<T, kParts>& Q, int k) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if (deal.row[t] < 0) continue;
    tiles[t].clear();
    add_product<kTransposed>(tiles[t], P.block(deal.row[t], 0),
                             kTransposed ? Q.block(deal.col[t], 0) : Q.block(0, deal.col[t]), k);
  }
}

// kThreads is 128 for S <= 64, 256 for S <= 128: one or two tiles are then enough for every warp.
template <class T, class Store, int kParts, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == 128               ? 4
                                            : sizeof(Store) * kParts == 2 ? 2
                                                                          : 1)
    resident_kernel(const T* __restrict__ in_all, T* __restrict__ out_all, const __grid_constant__ Shape shape,
                    const __grid_constant__ Steps steps) {
  constexpr int kTiles = kThreads / 128;
  GRADOPS_DYNAMIC_SHARED(unsigned char, memory);
  SharedPlan cut(memory);
  const int S = shape.S, np = shape.np, rows = S / 32;
  const ResidentPlan<Store, kParts> plan(cut, S, np);
  const Matrix<Store, kParts> X = plan.X, A = plan.A;
  const int64_t count = int64_t(shape.s) * shape.n;
  const T* in = in_all + blockIdx.x * count;

  read_in(in, shape, shape.normalize ? scale_of(in, count, plan.scratch) : Scale(), X);
  __syncthreads();

  Tile<Store> tiles[kTiles];
  const int width = kTiles * (kThreads / 32) / rows * 32;  // columns of X updated at a time
  for (int step = 0; step < steps.steps; ++step) {
    const auto lower = Deal<kTiles>::lower(rows);
    multiply<true>(tiles, lower, X, X, np);
    put_symmetric<true>(tiles, lower, A, 0.f, 0.f);
    __syncthreads();
    multiply<true>(tiles, lower, A, A, S);
    __syncthreads();  // A has been read
    put_symmetric<false>(tiles, lower, A, steps.b[step], steps.c[step]);
    __syncthreads();
    for (int j = 0; j < np; j += width) {
      const auto deal = Deal<kTiles>::all(rows, min(width, np - j) / 32);
      multiply<false>(tiles, deal, A, X.block(0, j), S);
      __syncthreads();  // these columns have been read
      put_update(tiles, deal, X.block(0, j), steps.a[step]);
    }
    __syncthreads();
  }
  write_out(out_all + blockIdx.x * count, shape, X);
}

// --- streamed ------------------------------------------------------------------------------------

constexpr int kStreamThreads = 384, kStreamWidth = 128;  // columns of X updated at a time, at most

template <class Store, int kParts, bool kLarge>  // kLarge: S > 128
struct StreamPlan {
  // Of the summed dimension in one panel. Two pairs of panels take up to 76 KB.
  static constexpr int kDepth = (kLarge ? 64 : 128) / (kParts * int(sizeof(Store)));
  static constexpr int kLeft = pitch<Store>(kDepth), kRight = pitch<Store>(kStreamWidth);
  Store *left_panels, *right_panels;
  float* scratch;
  int S;
  __host__ __device__ StreamPlan(SharedPlan& plan, int S)
      : left_panels(plan.take<Store>(2 * kParts * S * kLeft)),
        right_panels(plan.take<Store>(2 * kParts * kDepth * kRight)),
        scratch(plan.take<float>(32)),
        S(S) {}
  __device__ Matrix<Store, kParts> left(int half) const {
    return {left_panels + half * kParts * S * kLeft, kLeft, S * kLeft};
  }
  __device__ Matrix<Store, kParts> right(int half) const {
    return {right_panels + half * kParts * kDepth * kRight, kRight, kDepth * kRight};
  }
};

// Starts copying rows x cols from global memory; at most kMost columns.
template <int kMost, class T, int kParts>
__device__ void fetch(const Matrix<T, kParts>& to, const Matrix<T, kParts, int64_t>& from, int rows, int cols) {
  constexpr int kEach = 16 / int(sizeof(T)), kRow = kMost / kEach;
#pragma unroll
  for (int q = 0; q < kParts; ++q)
    for (int v = threadIdx.x; v < rows * kRow; v += kStreamThreads) {
      const int i = v / kRow, j = v % kRow * kEach;
      if (j < cols) copy_async(to.at(q, i, j), from.at(q, i, j));
    }
}

// tiles = P P^T, or P Q (Q: k x cols) if not kGram; P and Q in global memory.
template <bool kGram, class T, int kParts, int kTiles, class Plan>
__device__ void stream(Tile<T> (&tiles)[kTiles], const Deal<kTiles>& deal, const Plan& plan,
                       const Matrix<T, kParts, int64_t>& P, const Matrix<T, kParts, int64_t>& Q, int S, int k,
                       int cols) {
  constexpr int kDepth = Plan::kDepth;
  const auto get = [&](int k0) {
    const int half = k0 / kDepth % 2, depth = min(kDepth, k - k0);
    fetch<kDepth>(plan.left(half), P.block(0, k0), S, depth);
    if (!kGram) fetch<kStreamWidth>(plan.right(half), Q.block(k0, 0), depth, cols);
  };
#pragma unroll
  for (int t = 0; t < kTiles; ++t) tiles[t].clear();
  get(0);
  for (int k0 = 0; k0 < k; k0 += kDepth) {
    wait_async();
    __syncthreads();  // this panel is here; the other one has been used
    if (k0 + kDepth < k) get(k0 + kDepth);
    const int half = k0 / kDepth % 2, depth = min(kDepth, k - k0);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (deal.row[t] < 0) continue;
      const auto left = plan.left(half).block(deal.row[t], 0);
      if constexpr (kGram)
        add_product<true>(tiles[t], left, plan.left(half).block(deal.col[t], 0), depth);
      else
        add_product<false>(tiles[t], left, plan.right(half).block(0, deal.col[t]), depth);
    }
  }
}

// Where a block keeps its X and A.
template <class Store, int kParts>
struct Workspace {
  Matrix<Store, kParts, int64_t> X, A;
  __host__ __device__ Workspace(void* memory, const Shape& shape, int64_t slot) {
    const int64_t S = shape.S, size_of_X = S * shape.np;
    Store* p = static_cast<Store*>(memory) + slot * size(shape);
    X = {p, shape.np, size_of_X};
    A = {p + kParts * size_of_X, shape.S, S * S};
  }
  __host__ __device__ static int64_t size(const Shape& shape) {
    return int64_t(kParts) * shape.S * (int64_t(shape.np) + shape.S);
  }
};

// Blocks take matrices in turn, so the workspace is as large as the GPU, not as the batch.
template <class T, class Store, int kParts, bool kLarge>
__global__ void __launch_bounds__(kStreamThreads, kLarge ? 1 : 2)
    streamed_kernel(const T* __restrict__ in_all, T* __restrict__ out_all, void* workspace,
                    const __grid_constant__ Shape shape, const __grid_constant__ Steps steps) {
  constexpr int kTiles = kLarge ? 3 : 1, kWarps = kStreamThreads / 32;  // 36 tiles are half of 256 x 256
  GRADOPS_DYNAMIC_SHARED(unsigned char, memory);
  SharedPlan cut(memory);
  const int S = shape.S, rows = S / 32;
  const StreamPlan<Store, kParts, kLarge> plan(cut, S);
  const Workspace<Store, kParts> mine(workspace, shape, blockIdx.x);
  const auto X = mine.X, A = mine.A;
  const int64_t count = int64_t(shape.s) * shape.n;

  Tile<Store> tiles[kTiles];
  const int width = 32 * min(kStreamWidth / 32, (kLarge ? 2 : 1) * kWarps / rows);  // keeps most warps busy
  for (int64_t item = blockIdx.x; item < shape.batch; item += gridDim.x) {
    const T* in = in_all + item * count;
    read_in(in, shape, shape.normalize ? scale_of(in, count, plan.scratch) : Scale(), X);
    __syncthreads();
    for (int step = 0; step < steps.steps; ++step) {
      const auto lower = Deal<kTiles>::lower(rows);
      stream<true>(tiles, lower, plan, X, X, S, shape.np, 0);
      put_symmetric<true>(tiles, lower, A, 0.f, 0.f);
      __syncthreads();
      stream<true>(tiles, lower, plan, A, A, S, S, 0);
      put_symmetric<false>(tiles, lower, A, steps.b[step], steps.c[step]);
      __syncthreads();
      for (int j = 0; j < shape.np; j += width) {
        const int cols = min(width, shape.np - j);
        const auto deal = Deal<kTiles>::all(rows, cols / 32);
        stream<false>(tiles, deal, plan, A, X.block(0, j), S, S, cols);
        put_update(tiles, deal, X.block(0, j), steps.a[step]);
        __syncthreads();
      }
    }
    write_out(out_all + item * count, shape, X);  // a thread reads what it will write in the next read_in: no barrier
  }
}

// --- host ----------------------------------------------------------------------------------------

Shape shape_of(int64_t batch, int64_t rows, int64_t cols, bool normalize) {
  const bool tall = rows > cols;
  const int64_t s = tall ? cols : rows, n = tall ? rows : cols;
  return {batch, int(s), int(n), int(round_up(s, 32)), int(round_up(n, 32)), tall, normalize};
}

template <class Store, int kParts>
bool is_resident(const Shape& shape) {
  if (shape.s > kMostResident || shape.np > 8192) return false;
  SharedPlan plan;
  ResidentPlan<Store, kParts>(plan, shape.S, shape.np);
  return plan.bytes() <= max_shared_bytes();
}

template <class T, class Store, int kParts>
struct Kernels {
  // As many as run at a time; fewer where padding (s far below 32) would make the workspace many
  // times as large as the input.
  static int64_t stream_blocks(const Shape& shape) {
    const int64_t running = int64_t(multiprocessors()) * (shape.s > kMostResident ? 1 : 2);
    const int64_t input = int64_t(shape.s) * shape.n * int64_t(sizeof(T));
    const int64_t slot = Workspace<Store, kParts>::size(shape) * int64_t(sizeof(Store));
    return std::min({shape.batch, running, std::max<int64_t>(1, shape.batch * input / slot * 4)});
  }
  static int64_t workspace_bytes(const Shape& shape) {
    if (is_resident<Store, kParts>(shape)) return 0;
    return stream_blocks(shape) * Workspace<Store, kParts>::size(shape) * int64_t(sizeof(Store));
  }
  static void run(const T* in, T* out, const Shape& shape, const Steps& steps, void* workspace, void* stream) {
    SharedPlan plan;
    if (is_resident<Store, kParts>(shape)) {
      ResidentPlan<Store, kParts>(plan, shape.S, shape.np);
      const bool few = shape.S <= 64;
      launch(few ? resident_kernel<T, Store, kParts, 128> : resident_kernel<T, Store, kParts, 256>, blocks(shape.batch),
             few ? 128 : 256, plan.bytes(), stream, in, out, shape, steps);
    } else {
      const bool large = shape.s > kMostResident;
      if (large)
        StreamPlan<Store, kParts, true>(plan, shape.S);
      else
        StreamPlan<Store, kParts, false>(plan, shape.S);
      launch(large ? streamed_kernel<T, Store, kParts, true> : streamed_kernel<T, Store, kParts, false>,
             blocks(stream_blocks(shape)), kStreamThreads, plan.bytes(), stream, in, out, workspace, shape, steps);
    }
  }
};

// f(T(), Kernels<...>()) for the element type and the way it is multiplied.
template <class F>
auto pick(Element element, NewtonSchulzProducts products, F f) {
  using bf16 = __nv_bfloat16;
  if (element == Element::bf16) return f(bf16(), Kernels<bf16, bf16, 1>());
  if (element == Element::f16) return f(__half(), Kernels<__half, __half, 1>());
  if (products == NewtonSchulzProducts::bf16) return f(float(), Kernels<float, bf16, 1>());
  if (products == NewtonSchulzProducts::bf16x3) return f(float(), Kernels<float, bf16, 2>());
  return f(float(), Kernels<float, float, 1>());
}

}  // namespace

bool cuda::newton_schulz_fits(Element element, int64_t rows, int64_t cols) {
  return element != Element::f64 && std::min(rows, cols) <= kMostShort && std::max(rows, cols) <= kMostLong;
}

int64_t cuda::newton_schulz_workspace_bytes(Element element, int64_t batch, int64_t rows, int64_t cols,
                                            NewtonSchulzProducts products) {
  if (batch == 0 || rows == 0 || cols == 0 || !newton_schulz_fits(element, rows, cols)) return 0;
  const Shape shape = shape_of(batch, rows, cols, false);
  return pick(element, products, [&](auto, auto kernels) { return kernels.workspace_bytes(shape); });
}

void cuda::newton_schulz(const void* in, void* out, Element element, int64_t batch, int64_t rows, int64_t cols,
                         const NewtonSchulzSteps& given, bool normalize, NewtonSchulzProducts products, void* workspace,
                         void* stream) {
  if (batch == 0 || rows == 0 || cols == 0) return;
  if (element == Element::f64) throw std::runtime_error("newton_schulz: no CUDA kernel for float64");
  if (!newton_schulz_fits(element, rows, cols))
    throw std::runtime_error("newton_schulz: the smaller side is " + std::to_string(std::min(rows, cols)) +
                             ", the CUDA kernel takes at most " + std::to_string(kMostShort));
  Steps steps;
  for (int i = 0; i < given.steps; ++i)
    steps.a[i] = float(given.a[i]), steps.b[i] = float(given.b[i]), steps.c[i] = float(given.c[i]);
  steps.steps = given.steps;
  const Shape shape = shape_of(batch, rows, cols, normalize);
  pick(element, products, [&](auto type, auto kernels) {
    using T = decltype(type);
    kernels.run(static_cast<const T*>(in), static_cast<T*>(out), shape, steps, workspace, stream);
  });
}

}  // namespace gradops
