// A block takes 32 outputs, a lane each, so that reads of words are coalesced; its warps share the inputs, 32 at a time
// (whole words, however many bits), and their sums are added in a fixed order.
#include "common/device_number.cuh"
#include "quant/bit_stream.h"
#include "quant/dequant_linear.h"

namespace gradops {
namespace {

constexpr int kMostWarps = 16, kSlab = 32;

__device__ inline int64_t group_of(const PackedWeight& w, int64_t input) {
  if (input >= w.in) input = w.in - 1;
  const int64_t g = w.g_idx ? w.g_idx[input] : input / w.group_size;
  return g < 0 ? 0 : g < w.groups ? g : w.groups - 1;
}

template <int b>
__device__ inline uint32_t code_at(const uint32_t (&words)[b], int i) {
  const int word = i * b / 32, shift = i * b % 32;
  uint32_t code = words[word] >> shift;
  if (shift + b > 32) code |= words[word + 1] << (32 - shift);
  return code & ((1u << b) - 1);
}

struct Grid {
  float zero, scale;
};
template <int b>
__device__ inline Grid grid_of(const PackedWeight& w, int64_t group, int64_t col) {
  const int64_t bit = col * b, packed = (w.out * b + 31) / 32;
  const uint32_t* words = w.zeros + group * packed + bit / 32;
  const int shift = int(bit % 32);
  uint32_t code = words[0] >> shift;
  if (shift + b > 32) code |= words[1] << (32 - shift);
  return {float((code & ((1u << b) - 1)) + w.zero_offset),
          float(number_at(w.scale_type, w.scales, group * w.out + col))};
}

template <int b>
__device__ inline void load_slab(const PackedWeight& w, int64_t slab, int64_t col, uint32_t (&words)[b]) {
  const int64_t all = (w.in * b + 31) / 32;
#pragma unroll
  for (int k = 0; k < b; ++k) words[k] = slab * b + k < all ? w.words[(slab * b + k) * w.out + col] : 0;
}

template <class T, int b, int R>
__global__ void __launch_bounds__(32 * kMostWarps) linear_kernel(const __grid_constant__ DequantLinearTask t) {
  __shared__ float shared[kMostWarps][R][kSlab];
  const PackedWeight& w = t.w;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t out = int64_t(blockIdx.x) * 32 + lane, col = out < w.out ? out : w.out - 1;
  const int64_t row = int64_t(blockIdx.y) * R, slabs = (w.in + kSlab - 1) / kSlab;
  const int64_t begin = slabs * warp / warps, end = slabs * (warp + 1) / warps;
  const T* x = static_cast<const T*>(t.x) + row * w.in;
  float sum[R] = {};
  uint32_t next[b];
  if (begin < end) load_slab<b>(w, begin, col, next);
  for (int64_t slab = begin; slab < end; ++slab) {
    uint32_t words[b];
#pragma unroll
    for (int k = 0; k < b; ++k) words[k] = next[k];
    if (slab + 1 < end) load_slab<b>(w, slab + 1, col, next);
    const int64_t input = slab * kSlab + lane;
    const int group = int(group_of(w, input));
    __syncwarp();  // the last slab's x has been read
#pragma unroll
    for (int r = 0; r < R; ++r)
      shared[warp][r][lane] = row + r < t.rows && input < w.in ? float(to_double(x[r * w.in + input])) : 0.f;
    __syncwarp();
    const int first = __shfl_sync(0xffffffffu, group, 0);
    if (__all_sync(0xffffffffu, group == first)) {
      const Grid grid = grid_of<b>(w, first, col);
      float part[R] = {};
#pragma unroll
      for (int i = 0; i < kSlab; ++i) {
        const float value = float(code_at<b>(words, i)) - grid.zero;
#pragma unroll
        for (int r = 0; r < R; ++r) part[r] += value * shared[warp][r][i];
      }
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r] += grid.scale * part[r];
    } else {
#pragma unroll
      for (int i = 0; i < kSlab; ++i) {
        const Grid grid = grid_of<b>(w, __shfl_sync(0xffffffffu, group, i), col);
        const float value = grid.scale * (float(code_at<b>(words, i)) - grid.zero);
#pragma unroll
        for (int r = 0; r < R; ++r) sum[r] += value * shared[warp][r][i];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < R; ++r) shared[warp][r][lane] = sum[r];
  __syncthreads();
  if (out >= w.out) return;
  for (int r = warp; r < R && row + r < t.rows; r += warps) {
    double y = t.bias ? number_at(t.bias_type, t.bias, out) : 0.;
    for (int k = 0; k < warps; ++k) y += shared[k][r][lane];
    static_cast<T*>(t.y)[(row + r) * w.out + out] = from_double<T>(y);
  }
}

template <class T, int b>
__global__ void __launch_bounds__(128) weight_kernel(const __grid_constant__ DequantWeightTask t) {
  const PackedWeight& w = t.w;
  const int64_t index = int64_t(blockIdx.x) * 128 + threadIdx.x, col = index % w.out, slab = index / w.out;
  if (slab * kSlab >= w.in) return;
  uint32_t words[b];
  load_slab<b>(w, slab, col, words);
  int64_t group = -1;
  Grid grid{};
#pragma unroll
  for (int i = 0; i < kSlab; ++i) {
    const int64_t input = slab * kSlab + i;
    if (input < w.in) {
      const int64_t g = group_of(w, input);
      if (g != group) grid = grid_of<b>(w, g, col), group = g;
      static_cast<T*>(t.to)[input * w.out + col] =
          from_double<T>(grid.scale * (float(code_at<b>(words, i)) - grid.zero));
    }
  }
}

}  // namespace

int64_t cuda::dequant_linear_workspace(const DequantLinearTask&) { return 0; }

void cuda::dequant_linear(const DequantLinearTask& t, void*, void* stream) {
  if (t.rows == 0 || t.w.out == 0) return;
  with_device_type(t.type, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8)
      with_bits(t.w.bits, [&](auto bits) {
        constexpr int b = decltype(bits)::value, kMost = 8;
        const unsigned columns = blocks((t.w.out + 31) / 32);
        const int64_t slabs = (t.w.in + kSlab - 1) / kSlab;
        const int threads = 32 * int(slabs < 1 ? 1 : slabs < kMostWarps ? slabs : kMostWarps);
        if (t.rows == 1) return launch(linear_kernel<T, b, 1>, columns, threads, 0, stream, t);
        // the second dimension of a grid is short
        for (int64_t row = 0; row < t.rows; row += kMost * 65535) {
          DequantLinearTask part = t;
          part.rows = t.rows - row < kMost * 65535 ? t.rows - row : kMost * 65535;
          part.x = static_cast<const T*>(t.x) + row * t.w.in;
          part.y = static_cast<T*>(t.y) + row * t.w.out;
          launch(linear_kernel<T, b, kMost>, dim3(columns, unsigned((part.rows + kMost - 1) / kMost)), threads, 0,
                 stream, part);
        }
      });
  });
}

void cuda::dequant_weight(const DequantWeightTask& t, void* stream) {
  if (t.w.in == 0 || t.w.out == 0) return;
  with_device_type(t.type, [&](auto type) {
    with_bits(t.w.bits, [&](auto bits) {
      launch(weight_kernel<decltype(type), decltype(bits)::value>,
             blocks(((t.w.in + kSlab - 1) / kSlab * t.w.out + 127) / 128), 128, 0, stream, t);
    });
  });
}

}  // namespace gradops
