#include "optim/harpg.h"

#include <cmath>
#include <vector>

#include "common/parallel.h"

namespace gradops {
namespace {

// Calls f(tensor, chunk of all, first number, end) for every chunk of every tensor, in threads.
template <class T, class F>
void each_chunk(const T* list, int64_t count, const F& f) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += harpg_chunks(list[i].size);
  parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    int64_t i = 0, before = 0;  // chunks of tensors before i
    for (int64_t k = begin; k < end; ++k) {
      while (k - before >= harpg_chunks(list[i].size)) before += harpg_chunks(list[i++].size);
      const int64_t first = (k - before) * kHarpgChunk, rest = list[i].size - first;
      f(i, k, first, first + (rest < kHarpgChunk ? rest : kHarpgChunk));
    }
  });
}

}  // namespace

void cpu::harpg_update(const HarpgUpdate* list, int64_t count, double* sums, double* norm, void*) {
  each_chunk(list, count,
             [=, kernel = GRADOPS_DISPATCH(harpg_update)](int64_t i, int64_t chunk, int64_t begin, int64_t end) {
               sums[chunk] = kernel(list[i], begin, end);
             });
  double total = 0;
  for (int64_t i = 0, k = 0; i < count; ++i)
    for (const int64_t end = k + harpg_chunks(list[i].size); k < end; ++k) total += sums[k];
  *norm = std::sqrt(total);
}

void cpu::harpg_apply(const HarpgApply* list, int64_t count, const HarpgStep& step, void*) {
  std::vector<double> c;
  for (int64_t i = 0; i < count; ++i) c.push_back(GRADOPS_DISPATCH(harpg_scale)(list[i], step));
  each_chunk(list, count, [&, kernel = GRADOPS_DISPATCH(harpg_apply)](int64_t i, int64_t, int64_t begin, int64_t end) {
    kernel(list[i], c[size_t(i)], begin, end);
  });
}

}  // namespace gradops
