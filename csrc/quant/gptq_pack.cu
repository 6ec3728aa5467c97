// One thread per 32 codes. Neighbouring threads take neighbouring rows, which makes accesses to transposed words
// coalesced, while each reads or writes a whole 32-byte sector of codes.
#include "common/cuda_launch.h"
#include "quant/bit_stream.h"
#include "quant/gptq_pack.h"

namespace gradops {
namespace {

constexpr int kThreads = 128;

template <int b, bool kPack>
__global__ void __launch_bounds__(kThreads)
    stream_kernel(const __grid_constant__ PackTask t, int64_t chunks, int64_t packed) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = index % t.rows;
  const int64_t chunk = index / t.rows % chunks, item = index / t.rows / chunks;
  if (item >= t.batch) return;
  const int64_t word = chunk * b, left = t.cols - 32 * chunk;
  uint8_t* codes = t.codes + (item * t.rows + row) * t.cols + 32 * chunk;
  uint32_t* words = t.words + item * t.rows * packed + (t.transposed ? word * t.rows + row : row * packed + word);
  const int64_t step = t.transposed ? t.rows : 1;
  uint32_t full[b] = {};
  if constexpr (kPack) pack_chunk<b>(codes, left, full);
#pragma unroll
  for (int k = 0; k < b; ++k)
    if (word + k < packed) {
      if constexpr (kPack)
        words[k * step] = full[k];
      else
        full[k] = words[k * step];
    }
  if constexpr (!kPack) unpack_chunk<b>(full, left, codes);
}

template <bool kPack>
void run(const PackTask& t, void* stream) {
  if (t.batch == 0 || t.rows == 0 || t.cols == 0) return;
  const int64_t chunks = (t.cols + 31) / 32;
  with_bits(t.bits, [&](auto bits) {
    launch(stream_kernel<decltype(bits)::value, kPack>, blocks((t.batch * t.rows * chunks + kThreads - 1) / kThreads),
           kThreads, 0, stream, t, chunks, packed_cols(t.cols, t.bits));
  });
}

}  // namespace

void cuda::gptq_pack(const PackTask& t, void* stream) { run<true>(t, stream); }
void cuda::gptq_unpack(const PackTask& t, void* stream) { run<false>(t, stream); }

}  // namespace gradops
