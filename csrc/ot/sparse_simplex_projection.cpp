#include "ot/sparse_simplex_projection.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {

void cpu::sparse_simplex_projection(const SparseSimplexTask& t, void*) {
  for (int64_t v = 0; v < t.vectors; ++v)
    if (!(t.z[v] > 0 && t.z[v] - t.z[v] == 0)) refuse_value("z", "be finite and positive", std::to_string(t.z[v]));
  if (t.size == 0) return;
  parallel_for(0, t.vectors, 16384 / t.size + 1,
               [&, kernel = GRADOPS_DISPATCH(sparse_simplex_rows)](int64_t begin, int64_t end) {
                 double* scratch = reinterpret_cast<double*>(thread_scratch(12 * t.size));
                 kernel(t, begin, end, scratch, reinterpret_cast<int32_t*>(scratch + t.size));
               });
}

}  // namespace gradops
