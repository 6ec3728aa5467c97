#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "linalg/nuclear_scale.h"

namespace gradops {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 16384;  // entries of one block

template <class T>
__global__ void __launch_bounds__(kThreads) dot_chunks(const T* __restrict__ m, const T* __restrict__ u,
                                                       double* __restrict__ partial, int64_t size, int64_t chunks) {
  __shared__ double scratch[32];
  const int64_t item = blockIdx.x / chunks, begin = blockIdx.x % chunks * kChunk;
  const int64_t end = begin + kChunk < size ? begin + kChunk : size;
  double s = 0;
  for (int64_t i = item * size + begin + threadIdx.x; i < item * size + end; i += kThreads)
    s += to_double(m[i]) * to_double(u[i]);
  s = block_all(s, 0., scratch, Add());
  if (threadIdx.x == 0) partial[blockIdx.x] = s;
}

__global__ void __launch_bounds__(kThreads)
    add_chunks(const double* __restrict__ partial, double* __restrict__ out, int64_t batch, int64_t chunks) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= batch) return;
  double s = 0;
  for (int64_t k = 0; k < chunks; ++k) s += partial[item * chunks + k];
  out[item] = s;
}

int64_t chunks_of(const NuclearScaleTask& t) { return (t.size + kChunk - 1) / kChunk; }

}  // namespace

int64_t cuda::nuclear_scale_workspace(const NuclearScaleTask& t) { return 8 * t.batch * chunks_of(t); }

void cuda::nuclear_scale(const NuclearScaleTask& t, void* workspace, void* stream) {
  if (t.batch == 0) return;
  double* partial = static_cast<double*>(workspace);
  const int64_t chunks = chunks_of(t);
  if (chunks > 0)
    with_device_type(t.element, [&](auto type) {
      using T = decltype(type);
      launch(dot_chunks<T>, blocks(t.batch * chunks), kThreads, 0, stream, static_cast<const T*>(t.m),
             static_cast<const T*>(t.u), partial, t.size, chunks);
    });
  launch(add_chunks, blocks((t.batch + kThreads - 1) / kThreads), kThreads, 0, stream, partial, t.out, t.batch, chunks);
}

}  // namespace gradops
