#include "linalg/nuclear_scale.h"

#include "common/parallel.h"

namespace gradops {
namespace {
constexpr int64_t kChunk = 32768;  // entries that one thread sums; the chunks are added in order
int64_t chunks_of(const NuclearScaleTask& t) { return (t.size + kChunk - 1) / kChunk; }
}  // namespace

int64_t cpu::nuclear_scale_workspace(const NuclearScaleTask& t) { return 8 * t.batch * chunks_of(t); }

void cpu::nuclear_scale(const NuclearScaleTask& t, void* workspace, void*) {
  const auto dot = GRADOPS_DISPATCH(nuclear_scale_dot);
  double* partial = static_cast<double*>(workspace);
  const int64_t chunks = chunks_of(t), bytes = t.size * element_size(t.element);
  const int64_t grain = t.size < kChunk ? kChunk / (t.size > 0 ? t.size : 1) : 1;
  parallel_for(0, t.batch * chunks, grain, [&](int64_t b, int64_t e) {
    for (int64_t k = b; k < e; ++k) {
      const int64_t item = k / chunks, begin = k % chunks * kChunk;
      partial[k] = dot(static_cast<const char*>(t.m) + item * bytes, static_cast<const char*>(t.u) + item * bytes,
                       t.element, begin, begin + kChunk < t.size ? begin + kChunk : t.size);
    }
  });
  for (int64_t i = 0; i < t.batch; ++i) {
    t.out[i] = 0;
    for (int64_t k = 0; k < chunks; ++k) t.out[i] += partial[i * chunks + k];
  }
}

}  // namespace gradops
