// attention_backward.cuh: gradients of attention and their changes. One kernel for both sides: its blocks own a tile of
// keys and go over the queries (dk, dv), or own a tile of queries and go over the keys (dq). All its products are sums
// over the other side's rows, so a block's results are its own.
#pragma once
#include "curvature/attention_scores.cuh"

namespace gradops {
namespace {

template <class T>  // columns of an output that a warp has in registers
constexpr int kBackwardCols = sizeof(T) == 8 ? 32 : 64;
template <class T, bool kChange>  // columns of scores that it makes at a time
constexpr int kBackwardChunk = kTensor<T> && !kChange     ? 32
                               : 64 / int(sizeof(T)) < 16 ? 8
                                                          : 16;

constexpr int kMostColumns = 8;  // of warps, see below

// Warps: `groups` of 16 own rows, times `columns` that share them: of the scores each makes some, of the outputs too.
struct BackwardPlan {
  int groups, columns, others, stages;  // others: rows of a tile of the other side
};

template <class S>
struct alignas(16) RowNumbers {  // of one query
  S lse, mu, d, d_dot;
};

template <class T, bool kChange, bool kOwnKeys>
struct BackwardShared {
  using Row = RowNumbers<Arithmetic<T>>;
  T *own_a = nullptr, *own_a_dot = nullptr, *own_b = nullptr, *own_b_dot = nullptr;
  T *a, *a_dot = nullptr, *b, *b_dot = nullptr;
  T *p = nullptr, *p_dot = nullptr, *ds, *ds_dot = nullptr;
  Row* row;
  int a_size, b_size, weight_pitch;
  size_t bytes;

  __host__ __device__ BackwardShared(const AttentionTask& t, const BackwardPlan& plan,
                                     unsigned char* memory = nullptr) {
    SharedPlan shared(memory);
    const bool q_dot = kChange && t.q_dot.data, k_dot = kChange && t.k_dot.data, v_dot = kChange && t.v_dot.data,
               g_dot = kChange && t.g_dot.data;
    const int a_pitch = pitch<T>(int(t.d)), b_pitch = pitch<T>(int(t.dv)), rows = 16 * plan.groups;
    if (kTensor<T>) {
      own_a = shared.take<T>(rows * a_pitch), own_b = shared.take<T>(rows * b_pitch);
      if (kOwnKeys ? k_dot : q_dot) own_a_dot = shared.take<T>(rows * a_pitch);
      if (kOwnKeys ? v_dot : g_dot) own_b_dot = shared.take<T>(rows * b_pitch);
    }
    a_size = plan.others * a_pitch, b_size = plan.others * b_pitch;
    a = shared.take<T>(plan.stages * a_size), b = shared.take<T>(plan.stages * b_size);
    if (kOwnKeys ? q_dot : k_dot) a_dot = shared.take<T>(plan.stages * a_size);
    if (kOwnKeys ? g_dot : v_dot) b_dot = shared.take<T>(plan.stages * b_size);
    weight_pitch = plan.others + 8;
    ds = shared.take<T>(rows * weight_pitch);
    if (kChange) ds_dot = shared.take<T>(rows * weight_pitch);
    if (kOwnKeys) p = shared.take<T>(rows * weight_pitch);
    if (kOwnKeys && kChange) p_dot = shared.take<T>(rows * weight_pitch);
    row = shared.take<Row>(kOwnKeys ? plan.stages * plan.others : rows);
    bytes = shared.bytes();
  }
};

// Writes a warp's outputs, where they are wanted.
template <class T>
__device__ void put_outputs(void* to, Sums<T> (&sums)[kBackwardCols<T> / 8], Arithmetic<T> factor, int64_t item,
                            int64_t first, int64_t rows, int64_t cols, int64_t column) {
  if (to == nullptr) return;
  T* const out = static_cast<T*>(to) + item * rows * cols + column;
  each_sum<T>(sums, first, rows, int(cols - column),
              [&](Arithmetic<T> sum, int64_t row, int col) { out[row * cols + col] = T(sum * factor); });
}

// Its own side has matrices a and b: keys k and v, queries q and g. The scores are own a times the other side's a.
template <class T, bool kChange, bool kOwnKeys>
__global__ void __launch_bounds__(256)
    backward(const __grid_constant__ AttentionTask t, const __grid_constant__ BackwardPlan plan,
             const RowNumbers<Arithmetic<T>>* __restrict__ numbers) {
  using S = Arithmetic<T>;
  constexpr int kChunk = kBackwardChunk<T, kChange>, kFrags = kChunk / 8, kWide = kBackwardCols<T> / 8;
  GRADOPS_DYNAMIC_SHARED(unsigned char, memory);
  const BackwardShared<T, kChange, kOwnKeys> shared(t, plan, memory);

  const int64_t own_rows = kOwnKeys ? t.keys : t.queries, other_rows = kOwnKeys ? t.queries : t.keys,
                own_heads = kOwnKeys ? t.key_heads : t.heads, shared_by = t.heads / t.key_heads;
  const int rows = 16 * plan.groups, d = int(t.d), dv = int(t.dv), warp = threadIdx.x / 32;
  const int64_t tiles = up(own_rows, rows), item = blockIdx.x / tiles, head = item % own_heads,
                batch = item / own_heads;
  int64_t tile = blockIdx.x % tiles;
  if (!kOwnKeys) tile = tiles - 1 - tile;  // the most work first, with causal masks
  const int64_t first = tile * rows, mine = first + warp % plan.groups * 16;
  const int my_row = int(mine - first), part = warp / plan.groups;
  const int64_t column = int64_t(part) * kBackwardCols<T>;

  // The other side's rows that matter.
  const int64_t most = first + rows < own_rows ? first + rows : own_rows;
  const int64_t begin = kOwnKeys && t.causal ? first / plan.others * plan.others : 0,
                end = !kOwnKeys && t.causal && most < t.keys ? most : other_rows;

  const auto load_numbers = [&](RowNumbers<S>* to, int64_t query_head, int64_t query, int count) {
    const RowNumbers<S>* const from = numbers + (batch * t.heads + query_head) * t.queries + query;
    constexpr int kPieces = sizeof(RowNumbers<S>) / 16;
    for (int i = threadIdx.x; i < count * kPieces; i += blockDim.x) {
      if (query + i / kPieces < t.queries)
        copy_async(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(from) + i);
      else
        reinterpret_cast<uint4*>(to)[i] = {};
    }
  };
  const HeadRows none{};
  const HeadRows &q_dot = kChange ? t.q_dot : none, &k_dot = kChange ? t.k_dot : none,
                 &v_dot = kChange ? t.v_dot : none, &g_dot = kChange ? t.g_dot : none;
  const auto own_source = [&](const HeadRows& keys, const HeadRows& queries, int cols) {
    return source<T>(kOwnKeys ? keys : queries, batch, head, own_rows, cols);
  };
  OwnRows<T> own_a, own_a_dot, own_b, own_b_dot;
  const auto own = [&](OwnRows<T>& to, T* memory, const Source<T>& from) {
    if constexpr (kTensor<T>) {
      load_tile(memory, from, first, rows);
      to = OwnRows<T>::shared(memory, my_row, from.cols);
    } else {
      to = OwnRows<T>::global(from, mine);
    }
  };
  own(own_a, shared.own_a, own_source(t.k, t.q, d)), own(own_b, shared.own_b, own_source(t.v, t.g, dv));
  own(own_a_dot, shared.own_a_dot, own_source(k_dot, q_dot, d));
  own(own_b_dot, shared.own_b_dot, own_source(v_dot, g_dot, dv));
  if (!kOwnKeys) load_numbers(shared.row, head, first, rows);

  struct Place {  // of the other side
    int64_t head, row;
  };
  const int64_t first_head = kOwnKeys ? head * shared_by : head / shared_by, heads = kOwnKeys ? shared_by : 1;
  const auto next = [&](const Place& at) {
    return at.row + plan.others < end ? Place{at.head, at.row + plan.others} : Place{at.head + 1, begin};
  };
  const auto load = [&](const Place& at, int stage) {
    const auto other = [&](T* to, const HeadRows& keys, const HeadRows& queries, int cols) {
      load_tile(to, source<T>(kOwnKeys ? queries : keys, batch, at.head, other_rows, cols), at.row, plan.others);
    };
    other(shared.a + stage * shared.a_size, t.k, t.q, d), other(shared.b + stage * shared.b_size, t.v, t.g, dv);
    other(behind(shared.a_dot, stage * shared.a_size), k_dot, q_dot, d);
    other(behind(shared.b_dot, stage * shared.b_size), v_dot, g_dot, dv);
    if (kOwnKeys) load_numbers(shared.row + stage * plan.others, at.head, at.row, plan.others);
  };

  Sums<T> out_a[kWide] = {}, out_a_dot[kWide] = {}, out_b[kWide] = {}, out_b_dot[kWide] = {};
  const int a_cols = d - int(column), b_cols = dv - int(column);
  const bool gradient = t.dq || t.dk || t.dv_;
  int stage = 0;
  const Place start{first_head, begin};
  if (plan.stages == 2 && begin < end) load(start, 0);
  for (Place at = start, after; begin < end && at.head < first_head + heads; at = after) {
    after = next(at);
    if (plan.stages == 1) {
      __syncthreads();
      load(at, 0);
    }
    wait_async();
    __syncthreads();
    const T *const a = shared.a + stage * shared.a_size, *const b = shared.b + stage * shared.b_size,
                   *const a_dot = behind(shared.a_dot, stage * shared.a_size),
                   *const b_dot = behind(shared.b_dot, stage * shared.b_size);
    const RowNumbers<S>* const row_numbers = shared.row + (kOwnKeys ? stage * plan.others : 0);
    if (plan.stages == 2) {
      stage = 1 - stage;
      if (after.head < first_head + heads) load(after, stage);
    }

    const int my_weights = my_row * shared.weight_pitch;
    T *const p = behind(shared.p, my_weights), *const p_dot = behind(shared.p_dot, my_weights),
             *const ds = shared.ds + my_weights, *const ds_dot = behind(shared.ds_dot, my_weights);
    const bool unseen = t.causal && (kOwnKeys ? at.row + plan.others <= mine : at.row > mine + 15),
               active = mine < own_rows && !unseen;
    for (int chunk = part * kChunk; active && chunk < plan.others; chunk += plan.columns * kChunk) {
      Sums<T> s[kFrags] = {}, s_dot[kFrags] = {}, dp[kFrags] = {}, dp_dot[kFrags] = {};
      const int a_at = chunk * pitch<T>(d), b_at = chunk * pitch<T>(dv);
      add_scores<kChange>(s, s_dot, own_a, own_a_dot, a + a_at, behind(a_dot, a_at), pitch<T>(d), d);
      add_scores<kChange>(dp, dp_dot, own_b, own_b_dot, b + b_at, behind(b_dot, b_at), pitch<T>(dv), dv);
      const Scores<T> score(t, batch, kOwnKeys ? at.head : head, kOwnKeys ? at.row + chunk : mine,
                            kOwnKeys ? kChunk : 16, kOwnKeys ? mine : at.row + chunk, kOwnKeys ? 16 : kChunk);
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        // s becomes P, s_dot its change, dp becomes dS, dp_dot its change.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int mine_at = c_row(i), other_at = 8 * f + c_col(i);
          const RowNumbers<S> row = row_numbers[kOwnKeys ? chunk + other_at : my_row + mine_at];
          const S x = score(s[f].r[i], kOwnKeys ? other_at : mine_at, kOwnKeys ? mine_at : other_at);
          const S weight = x == minus_infinity<S>() ? S(0) : weight_of<T>(x - row.lse), slope = dp[f].r[i] - row.d;
          s[f].r[i] = weight;
          dp[f].r[i] = weight * slope;
          if (kChange) {
            const S change = weight * (S(t.scale) * s_dot[f].r[i] - row.mu);
            s_dot[f].r[i] = change;
            dp_dot[f].r[i] = change * slope + weight * (dp_dot[f].r[i] - row.d_dot);
          }
        }
        const int to = chunk + 8 * f;
        put_left<T>(ds + to, shared.weight_pitch, dp[f]);
        if (kChange) put_left<T>(ds_dot + to, shared.weight_pitch, dp_dot[f]);
        if (kOwnKeys) put_left<T>(p + to, shared.weight_pitch, s[f]);
        if (kOwnKeys && kChange) put_left<T>(p_dot + to, shared.weight_pitch, s_dot[f]);
      }
    }
    __syncthreads();
    for (int k = 0; active && k < plan.others; k += kStep<T>) {
      const auto outputs = [&](auto& out, auto& out_dot, const T* left, const T* left_dot, const T* y, const T* y_dot,
                               int ld, int cols) {
        if (cols <= 0) return;
        const int right = k * ld + int(column);
        const Left<T> l = left_at<T>(left + k, shared.weight_pitch);
        Left<T> l_dot = {};
        if (kChange) l_dot = left_at<T>(left_dot + k, shared.weight_pitch);
        add_outputs<kChange, T>(out, out_dot, gradient, l, l_dot, y + right, behind(y_dot, right), ld, cols);
      };
      outputs(out_a, out_a_dot, ds, ds_dot, a, a_dot, pitch<T>(d), a_cols);
      if (kOwnKeys) outputs(out_b, out_b_dot, p, p_dot, b, b_dot, pitch<T>(dv), b_cols);
    }
  }
  wait_async();  // of what its own side loaded, where the other side is empty

  put_outputs<T>(kOwnKeys ? t.dk : t.dq, out_a, S(t.scale), item, mine, own_rows, d, column);
  if (kChange) put_outputs<T>(kOwnKeys ? t.dk_dot : t.dq_dot, out_a_dot, S(t.scale), item, mine, own_rows, d, column);
  if (kOwnKeys) put_outputs<T>(t.dv_, out_b, S(1), item, mine, own_rows, dv, column);
  if (kOwnKeys && kChange) put_outputs<T>(t.dv_dot, out_b_dot, S(1), item, mine, own_rows, dv, column);
}

template <class T, bool kChange, bool kOwnKeys>
void run_backward(const AttentionTask& t, const RowNumbers<Arithmetic<T>>* numbers, void* stream) {
  const int64_t rows = kOwnKeys ? t.keys : t.queries, others = kOwnKeys ? t.queries : t.keys,
                items = t.batch * (kOwnKeys ? t.key_heads : t.heads);
  if (items * rows == 0 || !(kOwnKeys ? t.dk || t.dv_ || t.dk_dot || t.dv_dot : t.dq || t.dq_dot)) return;
  constexpr int kChunk = kBackwardChunk<T, kChange>;
  const int64_t widest = t.d > t.dv ? t.d : t.dv;
  const int columns = widest ? int(up(widest, kBackwardCols<T>)) : 1;
  BackwardPlan plan{columns > 4 ? 1 : columns > 2 ? 2 : 4, columns, 64, 2};
  if (others < 64) plan.others = int(up(others ? others : 1, kChunk)) * kChunk;
  const auto bytes = [&] { return BackwardShared<T, kChange, kOwnKeys>(t, plan).bytes; };
  const size_t room = max_shared_bytes();
  // Smaller tiles of the other side, then no fetching ahead, then fewer rows of one's own.
  while (columns > kMostColumns || bytes() > room) {
    if (plan.others > kChunk)
      plan.others = int(up(plan.others / 2, kChunk)) * kChunk;
    else if (plan.stages > 1)
      plan.stages = 1;
    else if (plan.groups > 1)
      plan.groups /= 2;
    else
      refuse_columns(t);
  }
  launch(backward<T, kChange, kOwnKeys>, blocks(up(rows, 16 * plan.groups) * items), 32 * plan.groups * plan.columns,
         bytes(), stream, t, plan, numbers);
}

}  // namespace
}  // namespace gradops
