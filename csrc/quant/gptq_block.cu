// A warp takes kRows rows of a block: lane l holds columns l, l + 32, l + 64, l + 96 of each in registers. The lane
// that owns the next column broadcasts it, every lane rounds it alike, and takes its share from the triangle of u in
// shared memory: one launch for all rows and experts of a block. Several rows per warp hide the latency of the
// divisions. Without u, a warp takes one group of one row.
#include "common/reduce.cuh"
#include "quant/gptq_block.h"

namespace gradops {
namespace {

constexpr int kWarps = 4, kRows = 2, kSlots = int(kMostGptqColumns) / 32;

struct Lesser {
  __device__ float operator()(float a, float b) const { return lesser(a, b); }
};
struct Greater {
  __device__ float operator()(float a, float b) const { return greater(a, b); }
};

// The scale of a group that a warp shares. each(f) calls f on this lane's numbers.
template <bool kInteger, class Each>
__device__ Range warp_scale(const GridTask& t, float unit, const Each& each) {
  float low = 0.f, high = 0.f;
  each([&](float v) { low = lesser(v, low), high = greater(v, high); });
  low = warp_all(low, Lesser());
  high = warp_all(high, Greater());
  make_symmetric(low, high, t);
  Range found = range_of(low, high, t, unit);
  if (t.mse == 0.f) return found;
  float best = from_bits(0x7f800000u);
  for (int i = 0; i < kShrinks; ++i) {
    const float part = 1.f - float(i) / 100.f;
    const Range range = range_of(part * low, part * high, t, unit);
    float error = 0.f;
    each([&](float v) {
      const float d = fabsf(v - round_to_grid<kInteger>(v, range.scale, range.zero, t.most).value);
      error += t.mse == 2.f ? d * d : powf(d, t.mse);
    });
    error = warp_all(error, Add());
    if (error < best) best = error, found = range;
  }
  return found;
}

// The triangle's row i starts at offset(i) and holds columns i .. cols - 1.
__host__ __device__ constexpr int triangle(int cols) { return cols * (cols + 1) / 2; }
__device__ inline int offset(int i, int cols) { return i * cols - i * (i - 1) / 2 - i; }  // of column 0 in row i

__device__ void load_triangle(const Plane& from, int64_t item, int cols, float* to) {
  const float* m = from.data + item * from.batch;
  for (int i = threadIdx.x / 32; i < cols; i += kWarps)
    for (int j = i + threadIdx.x % 32; j < cols; j += 32) to[offset(i, cols) + j] = m[i * from.row + j];
}

template <bool kFoem, bool kPull, bool kInteger>
__global__ void __launch_bounds__(32 * kWarps, 4) columns_kernel(const __grid_constant__ GptqBlock t, int64_t tiles) {
  GRADOPS_DYNAMIC_SHARED(unsigned char, memory);
  SharedPlan cut(memory);
  const int cols = int(t.cols), lane = threadIdx.x % 32;
  float* u = cut.take<float>(triangle(cols));
  float* pull = cut.take<float>(kPull ? triangle(cols) : 0);
  const int64_t item = blockIdx.x / tiles;
  load_triangle(t.u, item, cols, u);
  if constexpr (kPull) load_triangle(t.pull, item, cols, pull);
  __syncthreads();

  const int64_t row = (blockIdx.x % tiles * kWarps + threadIdx.x / 32) * kRows;
  if (row >= t.rows) return;  // whole warps
  const float unit = t.unit ? t.unit[item] : 1.f;
  const auto live = [&](int r) { return row + r < t.rows; };
  float w[kRows][kSlots], loss[kRows] = {}, scale[kRows], zero[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int j = lane + 32 * k;
      w[r][k] = live(r) && j < cols ? t.w.data[item * t.w.batch + (row + r) * t.w.row + j] : 0.f;
      scale[r] = 1.f, zero[r] = 0.f;
    }
  int64_t group = -1;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    for (int at = 0; at < 32; ++at) {
      const int i = 32 * slot + at;
      if (i >= cols) break;
      if (t.scale_in.data) {
        const int64_t next = t.group[item * t.cols + i];
        if (next != group) {
          group = next;
          const bool known = group >= 0 && group < t.groups;
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            if (live(r)) {
              const float nan = from_bits(0x7fc00000u);
              scale[r] = known ? t.scale_in.data[item * t.scale_in.batch + (row + r) * t.scale_in.row + group] : nan;
              zero[r] = known ? t.zero_in.data[item * t.zero_in.batch + (row + r) * t.zero_in.row + group] : nan;
            }
        }
      } else if (i % t.group_size == 0) {
        const int64_t end = i + t.group_size;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Range found = warp_scale<kInteger>(t.grid, unit, [&](auto f) {
#pragma unroll
            for (int k = 0; k < kSlots; ++k)
              if (lane + 32 * k >= i && lane + 32 * k < end) f(w[r][k]);
          });
          scale[r] = found.scale, zero[r] = found.zero;
          if (lane == 0 && live(r)) {
            const int64_t g = i / t.group_size;
            t.scale.at(item, row + r)[g] = scale[r], t.zero.at(item, row + r)[g] = zero[r];
          }
        }
      }
      const float *ui = u + offset(i, cols), *pi = pull + offset(i, cols), diagonal = ui[i];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float now = __shfl_sync(0xffffffffu, w[r][slot], at), away = 0.f;
        if constexpr (kFoem) {
          if (live(r)) {
            const float original = t.original.data[item * t.original.batch + (row + r) * t.original.row + i];
            if (i > 0 || t.pull_first) now -= t.beta * (now - original);
            away = t.beta * (now - original);
          }
        }
        const Rounded near = round_to_grid<kInteger>(now, scale[r], zero[r], t.grid.most);
        const float rest = now - near.value, moved = kFoem ? rest - away : rest, e = moved / diagonal;
        loss[r] += rest * rest * (0.5f / (diagonal * diagonal));
        if (lane == at && live(r)) {
          t.codes.at(item, row + r)[i] = uint8_t(near.code);
          t.q.at(item, row + r)[i] = near.value;
          if (t.e.data) t.e.at(item, row + r)[i] = e;
          if constexpr (kPull) t.latent.at(item, row + r)[i] = t.latent_rounded ? now - e * diagonal : now;
        }
#pragma unroll
        for (int k = slot; k < kSlots; ++k) {
          const int j = lane + 32 * k;
          if (j > i && j < cols) {
            w[r][k] -= e * ui[j];
            if constexpr (kPull) w[r][k] += now * pi[j];
          }
        }
      }
    }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (lane == 0 && live(r)) t.loss[item * t.rows + row + r] = loss[r];
}

// Rows without u: a warp per row goes through its groups.
template <bool kInteger>
__global__ void __launch_bounds__(32 * kWarps) round_kernel(const __grid_constant__ GptqBlock t) {
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= t.batch * t.rows) return;
  const int64_t item = index / t.rows, row = index % t.rows;
  const float *w = t.w.data + item * t.w.batch + row * t.w.row, unit = t.unit ? t.unit[item] : 1.f;
  const int64_t width = t.scale_in.data ? t.cols : t.group_size;
  float loss = 0.f;
  for (int64_t first = 0; first < t.cols; first += width) {
    const int64_t end = first + width < t.cols ? first + width : t.cols;
    Range range{1.f, 0.f};
    if (!t.scale_in.data) {
      range = warp_scale<kInteger>(t.grid, unit, [&](auto f) {
        for (int64_t c = first + lane; c < end; c += 32) f(w[c]);
      });
      if (lane == 0) {
        t.scale.at(item, row)[first / width] = range.scale;
        t.zero.at(item, row)[first / width] = range.zero;
      }
    }
    for (int64_t c = first + lane; c < end; c += 32) {
      if (t.scale_in.data) {
        const int64_t group = t.group[item * t.cols + c];
        const bool known = group >= 0 && group < t.groups;
        const float nan = from_bits(0x7fc00000u);
        range.scale = known ? t.scale_in.data[item * t.scale_in.batch + row * t.scale_in.row + group] : nan;
        range.zero = known ? t.zero_in.data[item * t.zero_in.batch + row * t.zero_in.row + group] : nan;
      }
      const Rounded near = round_to_grid<kInteger>(w[c], range.scale, range.zero, t.grid.most);
      t.codes.at(item, row)[c] = uint8_t(near.code);
      t.q.at(item, row)[c] = near.value;
      loss += 0.5f * (w[c] - near.value) * (w[c] - near.value);
    }
  }
  loss = warp_all(loss, Add());
  if (lane == 0) t.loss[index] = loss;
}

template <bool kInteger>
void run(const GptqBlock& t, void* stream) {
  const int64_t warps = t.batch * t.rows;
  if (!t.u.data) {
    launch(round_kernel<kInteger>, blocks((warps + kWarps - 1) / kWarps), 32 * kWarps, 0, stream, t);
    return;
  }
  const int64_t tiles = (t.rows + kWarps * kRows - 1) / (kWarps * kRows);
  const bool foem = t.original.data, pull = t.pull.data;
  SharedPlan plan;
  plan.take<float>(triangle(int(t.cols)));
  plan.take<float>(pull ? triangle(int(t.cols)) : 0);
  const auto kernel = foem   ? pull ? columns_kernel<true, true, kInteger> : columns_kernel<true, false, kInteger>
                      : pull ? columns_kernel<false, true, kInteger>
                             : columns_kernel<false, false, kInteger>;
  launch(kernel, blocks(t.batch * tiles), 32 * kWarps, plan.bytes(), stream, t, tiles);
}

}  // namespace

void cuda::gptq_block(const GptqBlock& t, void* stream) {
  if (t.batch == 0 || t.rows == 0) return;
  t.grid.grid == Grid::integer ? run<true>(t, stream) : run<false>(t, stream);
}

}  // namespace gradops
