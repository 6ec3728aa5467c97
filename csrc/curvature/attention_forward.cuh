// attention_forward.cuh: outputs of attention and their changes, a tile of queries per block.
#pragma once
#include "curvature/attention_scores.cuh"

namespace gradops {
namespace {

// Keys of a tile. What a warp keeps of it in registers: scores of 16 rows, and their changes.
template <class T, bool kChange>
constexpr int kForwardKeys = kTensor<T> ? (kChange ? 32 : 64) : 64 / int(sizeof(T));
template <class T>  // columns of o in registers: where there are more, more blocks make the same scores
constexpr int kForwardCols = sizeof(T) == 8 ? 64 : 128;

struct ForwardPlan {
  int groups, stages, slices;  // of 16 rows; of tiles in shared memory; of the columns of o
  bool known;                  // are o and lse given?
};

template <class T, bool kChange>
struct ForwardShared {
  static constexpr int kKeys = kForwardKeys<T, kChange>, kWeightPitch = kKeys + 8;
  T *q = nullptr, *q_dot = nullptr, *k, *k_dot = nullptr, *v, *v_dot = nullptr;
  T* weights[2] = {};  // P, and P with S_dot: of wide numbers only
  int k_size, v_size;  // of a stage
  size_t bytes;

  __host__ __device__ ForwardShared(const AttentionTask& t, const ForwardPlan& plan, unsigned char* memory = nullptr) {
    SharedPlan shared(memory);
    const int d = int(t.d), dv = int(t.dv) < kForwardCols<T> ? int(t.dv) : kForwardCols<T>, rows = 16 * plan.groups;
    k_size = kKeys * pitch<T>(d), v_size = kKeys * pitch<T>(dv);
    if (kTensor<T>) q = shared.take<T>(rows * pitch<T>(d));
    if (kTensor<T> && kChange && t.q_dot.data) q_dot = shared.take<T>(rows * pitch<T>(d));
    k = shared.take<T>(plan.stages * k_size), v = shared.take<T>(plan.stages * v_size);
    if (kChange && t.k_dot.data) k_dot = shared.take<T>(plan.stages * k_size);
    if (kChange && t.v_dot.data) v_dot = shared.take<T>(plan.stages * v_size);
    if (!kTensor<T>)
      for (int i = 0; i <= int(kChange); ++i) weights[i] = shared.take<T>(rows * kWeightPitch);
    bytes = shared.bytes();
  }
};

template <class S>
__device__ S four_lanes(S x) {  // the sum over the lanes of a row
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <class T, bool kChange>
__global__ void __launch_bounds__(128)
    forward(const __grid_constant__ AttentionTask t, const __grid_constant__ ForwardPlan plan) {
  using S = Arithmetic<T>;
  constexpr int kKeys = kForwardKeys<T, kChange>, kFrags = kKeys / 8, kCols = kForwardCols<T>, kWide = kCols / 8;
  GRADOPS_DYNAMIC_SHARED(unsigned char, memory);
  const ForwardShared<T, kChange> shared(t, plan, memory);

  // Later queries first: with causal masks, theirs is the most work.
  const int64_t rows = 16 * plan.groups, tiles = up(t.queries, rows);
  int64_t n = blockIdx.x;
  const int64_t column = n % plan.slices * kCols;
  n /= plan.slices;
  const int64_t tile = tiles - 1 - n % tiles, item = n / tiles, head = item % t.heads, batch = item / t.heads,
                key_head = head / (t.heads / t.key_heads);
  const int cols = int(t.dv - column < kCols ? t.dv - column : kCols), d = int(t.d);
  const int64_t first = tile * rows, mine = first + threadIdx.x / 32 * 16;
  const int64_t last = first + rows < t.queries ? first + rows : t.queries,
                keys = t.causal && last < t.keys ? last : t.keys;

  const auto q = source<T>(t.q, batch, head, t.queries, d), k = source<T>(t.k, batch, key_head, t.keys, d),
             v = source<T>(t.v, batch, key_head, t.keys, cols, column);
  Source<T> q_dot{}, k_dot{}, v_dot{};
  if constexpr (kChange) {
    q_dot = source<T>(t.q_dot, batch, head, t.queries, d), k_dot = source<T>(t.k_dot, batch, key_head, t.keys, d);
    v_dot = source<T>(t.v_dot, batch, key_head, t.keys, cols, column);
  }
  OwnRows<T> own, own_dot;
  if constexpr (kTensor<T>) {
    load_tile(shared.q, q, first, int(rows)), load_tile(shared.q_dot, q_dot, first, int(rows));
    own = OwnRows<T>::shared(shared.q, int(mine - first), d);
    own_dot = OwnRows<T>::shared(shared.q_dot, int(mine - first), d);
  } else {
    own = OwnRows<T>::global(q, mine), own_dot = OwnRows<T>::global(q_dot, mine);
  }
  const auto load = [&](int64_t key, int stage) {
    load_tile(shared.k + stage * shared.k_size, k, key, kKeys);
    load_tile(shared.v + stage * shared.v_size, v, key, kKeys);
    load_tile(behind(shared.k_dot, stage * shared.k_size), k_dot, key, kKeys);
    load_tile(behind(shared.v_dot, stage * shared.v_size), v_dot, key, kKeys);
  };

  S* const lse = static_cast<S*>(t.lse) + item * t.queries;
  S most[2], sum[2] = {}, mu[2] = {};  // of this lane's two rows; sums are of its own keys until the end
  for (int r = 0; r < 2; ++r) {
    const int64_t row = mine + c_row(2 * r);
    most[r] = plan.known && row < t.queries ? lse[row] : minus_infinity<S>();
  }
  Sums<T> out[kWide] = {}, out_dot[kWide] = {};

  int stage = 0;
  if (plan.stages == 2 && keys > 0) load(0, 0);
  for (int64_t key = 0; key < keys; key += kKeys) {
    if (plan.stages == 1) {
      __syncthreads();
      load(key, 0);
    }
    wait_async();
    __syncthreads();
    const T *const tile_k = shared.k + stage * shared.k_size, *const tile_v = shared.v + stage * shared.v_size,
                   *const tile_k_dot = behind(shared.k_dot, stage * shared.k_size),
                   *const tile_v_dot = behind(shared.v_dot, stage * shared.v_size);
    if (plan.stages == 2) {
      stage = 1 - stage;
      if (key + kKeys < keys) load(key + kKeys, stage);
    }
    if (mine >= t.queries || (t.causal && key > mine + 15)) continue;

    Sums<T> s[kFrags] = {}, s_dot[kFrags] = {};
    add_scores<kChange>(s, s_dot, own, own_dot, tile_k, tile_k_dot, pitch<T>(d), d);
    const Scores<T> score(t, batch, head, mine, 16, key, kKeys);
    S top[2] = {most[0], most[1]};
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const S x = s[f].r[i] = score(s[f].r[i], c_row(i), 8 * f + c_col(i));
        if (x > top[i / 2]) top[i / 2] = x;
      }
    S base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!plan.known) {
        for (int by = 1; by < 4; by *= 2) {
          const S other = __shfl_xor_sync(0xffffffffu, top[r], by);
          if (other > top[r]) top[r] = other;
        }
      } else {
        top[r] = most[r];
      }
      base[r] = top[r] == minus_infinity<S>() ? S(0) : top[r];
    }
    if (__any_sync(0xffffffffu, top[0] != most[0] || top[1] != most[1])) {  // seldom, after the first tiles
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const S shrink = weight_of<T>(most[r] - base[r]);
        most[r] = top[r];
        sum[r] *= shrink, mu[r] *= shrink;
#pragma unroll
        for (int f = 0; f < kWide; ++f)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            out[f].r[2 * r + c] *= shrink;
            if (kChange) out_dot[f].r[2 * r + c] *= shrink;
          }
      }
    }
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const S p = weight_of<T>(s[f].r[i] - base[i / 2]);
        sum[i / 2] += p;
        s[f].r[i] = p;
        if (kChange) mu[i / 2] += s_dot[f].r[i] *= p * S(t.scale);
      }
    if constexpr (kTensor<T>) {
#pragma unroll
      for (int f = 0; f < kFrags; f += 2) {
        const FragA<T> a = left_of<T>(s[f], s[f + 1]), a_dot = left_of<T>(s_dot[f], s_dot[f + 1]);
        const int at = 8 * f * pitch<T>(cols);
        add_outputs<kChange, T>(out, out_dot, !plan.known, a, a_dot, tile_v + at, behind(tile_v_dot, at),
                                pitch<T>(cols), cols);
      }
    } else {
      constexpr int ld = ForwardShared<T, kChange>::kWeightPitch;
      T* const weights[2] = {shared.weights[0] + (mine - first) * ld,
                             shared.weights[int(kChange)] + (mine - first) * ld};
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        if (kChange) put_left<T>(weights[1] + 8 * f, ld, s_dot[f]);
        put_left<T>(weights[0] + 8 * f, ld, s[f]);
      }
      __syncwarp();
      for (int at = 0; at < kKeys; ++at)
        add_outputs<kChange, T>(out, out_dot, !plan.known, left_at<T>(weights[0] + at, ld),
                                left_at<T>(weights[1] + at, ld), tile_v + at * pitch<T>(cols),
                                behind(tile_v_dot, at * pitch<T>(cols)), pitch<T>(cols), cols);
    }
  }
  wait_async();  // for the queries, where there are no keys
  if (mine >= t.queries) return;

  S inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const S total = four_lanes(sum[r]), change_of_lse = kChange ? four_lanes(mu[r]) : S(0);
    inverse[r] = plan.known ? S(1) : total == S(0) ? S(0) : S(1) / total;
    mu[r] = change_of_lse * inverse[r];
    const int64_t row = mine + c_row(2 * r);
    if (column == 0 && threadIdx.x % 4 == 0 && row < t.queries) {
      if (!plan.known) lse[row] = most[r] + log(total);
      if (kChange) static_cast<S*>(t.mu)[item * t.queries + row] = mu[r];
    }
  }
  T* const o = static_cast<T*>(t.o) + item * t.queries * t.dv + column;
#pragma unroll
  for (int f = 0; f < kWide; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = (mine + c_row(i)) * t.dv + 8 * f + c_col(i);
      if (mine + c_row(i) >= t.queries || 8 * f + c_col(i) >= cols) continue;
      const S x = plan.known ? S(o[at]) : out[f].r[i] * inverse[i / 2];
      if (!plan.known) o[at] = T(x);
      if (kChange)
        static_cast<T*>(t.o_dot)[item * t.queries * t.dv + column + at] =
            T(out_dot[f].r[i] * inverse[i / 2] - mu[i / 2] * x);
    }
}

template <class T, bool kChange>
void run_forward(const AttentionTask& t, bool known, void* stream) {
  if (t.batch * t.heads * t.queries == 0) return;
  ForwardPlan plan{4, 2, t.dv > kForwardCols<T> ? int(up(t.dv, kForwardCols<T>)) : 1, known};
  const auto bytes = [&] { return ForwardShared<T, kChange>(t, plan).bytes; };
  const size_t room = max_shared_bytes();
  while (bytes() > room) {
    if (plan.stages == 2)
      plan.stages = 1;
    else if (plan.groups > 1)
      plan.stages = 2, plan.groups /= 2;
    else
      refuse_columns(t);
  }
  launch(forward<T, kChange>, blocks(up(t.queries, 16 * plan.groups) * t.batch * t.heads * plan.slices),
         32 * plan.groups, bytes(), stream, t, plan);
}

}  // namespace
}  // namespace gradops
