// One block per matrix: X (s x n, s <= n), A = X X^T and B = b A + c A A stay in shared
// memory as bf16 through all steps; sums are fp32. Tall matrices are transposed on the way in.
#include "linalg/newton_schulz.h"

#include "common/mma.h"
#include "common/reduce.cuh"

namespace gradops {
namespace {

using bf16 = __nv_bfloat16;

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }
__host__ __device__ constexpr int pitch(int cols) { return cols + 8; }  // elements between rows: no bank conflicts

// Four consecutive elements with one load or store.
__device__ inline void read4(const float* p, float (&v)[4]) {
  const float4 q = *reinterpret_cast<const float4*>(p);
  v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}
__device__ inline void read4(const bf16* p, float (&v)[4]) {
  const __nv_bfloat162* q = reinterpret_cast<const __nv_bfloat162*>(p);
  const float2 lo = __bfloat1622float2(q[0]), hi = __bfloat1622float2(q[1]);
  v[0] = lo.x, v[1] = lo.y, v[2] = hi.x, v[3] = hi.y;
}

// Calls f(element number, value) for this thread's share of `count` elements.
template <class T, class F>
__device__ inline void each_element(const T* p, int count, bool vector, F f) {
  if (vector) {
    for (int e = 4 * threadIdx.x; e < count; e += 4 * blockDim.x) {
      float v[4];
      read4(p + e, v);
      for (int i = 0; i < 4; ++i) f(e + i, v[i]);
    }
  } else {
    for (int e = threadIdx.x; e < count; e += blockDim.x) f(e, float(p[e]));
  }
}

__device__ inline void put_pair(bf16* at, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(at) = __floats2bfloat162_rn(x, y);
}
__device__ inline float2 get_pair(const bf16* at) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at));
}

// out = f(P P^T), symmetric: tiles of 32 x 32 on and below the diagonal, then mirrored.
// f(i, j, x, y) -> float2 sees the sums at (i, j) and (i, j + 1).
template <int S, class F>
__device__ inline void symmetric_product(const bf16* P, int ldp, int k, bf16* out, F f) {
  constexpr int kTiles = S / 32, ldo = pitch(S);
  for (int tile = threadIdx.x / 32; tile < kTiles * (kTiles + 1) / 2; tile += blockDim.x / 32) {
    int ti = 0;
    while ((ti + 1) * (ti + 2) / 2 <= tile) ++ti;
    const int tj = tile - ti * (ti + 1) / 2;
    FragC sum[2][4] = {};
    for (int kk = 0; kk < k; kk += 16) {
      FragA<bf16> a[2];
      FragB<bf16> b[2][2];
      for (int r = 0; r < 2; ++r) load_a(a[r], P + (32 * ti + 16 * r) * ldp + kk, ldp);
      for (int c = 0; c < 2; ++c) load_b_transposed(b[c], P + (32 * tj + 16 * c) * ldp + kk, ldp);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) mma(sum[r][c], a[r], b[c / 2][c % 2]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int i = 32 * ti + 16 * r + c_row(e), j = 32 * tj + 8 * c + c_col(e);
          const float2 v = f(i, j, sum[r][c].r[e], sum[r][c].r[e + 1]);
          put_pair(out + i * ldo + j, v.x, v.y);
          if (ti != tj) {
            out[j * ldo + i] = __float2bfloat16_rn(v.x);
            out[(j + 1) * ldo + i] = __float2bfloat16_rn(v.y);
          }
        }
  }
}

// X <- alpha X + B X, in place: a warp owns 16 columns and keeps them in registers.
template <int S>
__device__ inline void update(bf16* X, int ldx, int n, const bf16* B, float alpha) {
  constexpr int ldb = pitch(S);
  for (int j0 = threadIdx.x / 32 * 16; j0 < n; j0 += blockDim.x / 32 * 16) {
    FragB<bf16> x[S / 16][2];
#pragma unroll
    for (int k = 0; k < S / 16; ++k) load_b(x[k], X + 16 * k * ldx + j0, ldx);
    __syncwarp();  // all lanes have read these columns
    for (int i0 = 0; i0 < S; i0 += 16) {
      FragC sum[2] = {};
#pragma unroll
      for (int k = 0; k < S / 16; ++k) {
        FragA<bf16> b;
        load_a(b, B + i0 * ldb + 16 * k, ldb);
        mma(sum[0], b, x[k][0]);
        mma(sum[1], b, x[k][1]);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          bf16* at = X + (i0 + c_row(e)) * ldx + j0 + 8 * c + c_col(e);
          const float2 old = get_pair(at);
          put_pair(at, alpha * old.x + sum[c].r[e], alpha * old.y + sum[c].r[e + 1]);
        }
    }
  }
}

constexpr int threads_for(int S) { return S <= 64 ? 128 : 256; }
struct Arrays {  // of one block, in shared memory
  bf16 *X, *A, *B;
  __host__ __device__ Arrays(SharedPlan& plan, int S, int np)
      : X(plan.take<bf16>(S * pitch(np))), A(plan.take<bf16>(S * pitch(S))), B(plan.take<bf16>(S * pitch(S))) {}
};
size_t shared_for(int S, int np) {
  SharedPlan plan;
  Arrays(plan, S, np);
  return plan.bytes();
}

// S: s rounded up to 32; np: n rounded up to 32. kTall: the matrix is stored n x s.
template <class T, int S, bool kTall>
__global__ void __launch_bounds__(threads_for(S), S <= 64 ? 4 : 1)
newton_schulz_kernel(const T* __restrict__ in_all, T* __restrict__ out_all, int s, int n, int np,
                     const __grid_constant__ NewtonSchulzSteps steps, float eps) {
  GRADOPS_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ float scratch[32];
  SharedPlan plan(memory);
  const Arrays arrays(plan, S, np);
  bf16 *X = arrays.X, *A = arrays.A, *B = arrays.B;
  const int ldx = pitch(np), count = s * n, fast = kTall ? s : n;
  const T* in = in_all + size_t(blockIdx.x) * count;
  T* out = out_all + size_t(blockIdx.x) * count;
  const bool vector = fast % 4 == 0 && reinterpret_cast<uintptr_t>(in_all) % 16 == 0;
  const auto place = [=](int e) { return kTall ? e % s * ldx + e / s : e / n * ldx + e % n; };

  // Frobenius norm. Dividing by the largest element first keeps 1e30 and 1e-30 in range.
  float big = 0.f, squares = 0.f;
  each_element(in, count, vector, [&](int, float v) { big = fmaxf(big, fabsf(v)); });
  big = block_all(big, 0.f, scratch, [](float a, float b) { return fmaxf(a, b); });
  each_element(in, count, vector, [&](int, float v) { v = big > 0.f ? v / big : v; squares += v * v; });
  squares = block_all(squares, 0.f, scratch, [](float a, float b) { return a + b; });
  const float norm = sqrtf(squares), small = eps / big;  // zeros stay zero: small is infinite

  for (int e = threadIdx.x; e < S * ldx; e += blockDim.x) X[e] = __float2bfloat16_rn(0.f);
  __syncthreads();
  each_element(in, count, vector, [&](int e, float v) {
    X[place(e)] = __float2bfloat16_rn(big > 0.f ? v / big / (norm + small) : v);
  });
  __syncthreads();

  for (int step = 0; step < steps.steps; ++step) {
    const float a = float(steps.a[step]), b = float(steps.b[step]), c = float(steps.c[step]);
    symmetric_product<S>(X, ldx, np, A, [](int, int, float x, float y) { return make_float2(x, y); });
    __syncthreads();
    symmetric_product<S>(A, pitch(S), S, B, [=](int i, int j, float x, float y) {
      const float2 old = get_pair(A + i * pitch(S) + j);
      return make_float2(b * old.x + c * x, b * old.y + c * y);
    });
    __syncthreads();
    update<S>(X, ldx, np, B, a);
    __syncthreads();
  }

  for (int e = threadIdx.x; e < count; e += blockDim.x) {
    if constexpr (std::is_same_v<T, float>) out[e] = __bfloat162float(X[place(e)]);
    else out[e] = X[place(e)];
  }
}

template <class T, int S>
void run(const void* in, void* out, int64_t batch, bool tall, int s, int n, NewtonSchulzSteps steps,
         float eps, void* stream) {
  const int np = round_up(n, 32);
  launch(tall ? newton_schulz_kernel<T, S, true> : newton_schulz_kernel<T, S, false>, blocks(batch),
         threads_for(S), shared_for(S, np), stream, static_cast<const T*>(in), static_cast<T*>(out), s,
         n, np, steps, eps);
}

}  // namespace

void cuda::newton_schulz(const void* in, void* out, Element element, int64_t batch, int64_t rows, int64_t cols,
                         const NewtonSchulzSteps& steps, bool, NewtonSchulzProducts, void* stream) {
  const bool is_bf16 = element == Element::bf16;
  const float eps = 0;
  if (batch == 0 || rows == 0 || cols == 0) return;
  const bool tall = rows > cols;
  const int64_t s = tall ? cols : rows, n = tall ? rows : cols;
  const int S = s > 128 ? 0 : round_up(int(s), 32);
  if (S == 0 || n > 4096 || shared_for(S, round_up(int(n), 32)) > max_shared_bytes())
    throw std::runtime_error("newton_schulz: the matrix is too large for one block");
  const auto pick = [&](auto type) {
    using T = decltype(type);
    return S == 32 ? run<T, 32> : S == 64 ? run<T, 64> : S == 96 ? run<T, 96> : run<T, 128>;
  };
  (is_bf16 ? pick(bf16()) : pick(float()))(in, out, batch, tall, int(s), int(n), steps, eps, stream);
}

}  // namespace gradops
