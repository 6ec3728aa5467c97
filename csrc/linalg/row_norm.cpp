#include "linalg/row_norm.h"

#include "common/parallel.h"

namespace gradops {
namespace {

// Column sums are made per chunk of rows and then added in order, so they do not depend on the
// number of threads. A chunk is at least 128 KiB of work.
int64_t chunk_rows(int64_t cols) { return cols > 0 ? (32768 + cols - 1) / cols : 1; }

struct Workspace {
  double *partial, *mean, *mean_after, *inverse;
  int64_t chunks;
  Workspace(const RowNormTask& t, double* memory)
      : partial(memory),
        mean(partial + chunks_of(t) * t.cols),
        mean_after(mean + t.cols),
        inverse(mean_after + t.cols),
        chunks(chunks_of(t)) {}
  static int64_t chunks_of(const RowNormTask& t) { return (t.rows + chunk_rows(t.cols) - 1) / chunk_rows(t.cols); }
  static int64_t bytes(const RowNormTask& t) { return 8 * ((chunks_of(t) + 2) * t.cols + t.rows); }
};

template <class F>
void each_chunk(const RowNormTask& t, const Workspace& w, const F& f) {
  const int64_t size = chunk_rows(t.cols);
  parallel_for(0, w.chunks, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) f(i, i * size, i * size + size < t.rows ? i * size + size : t.rows);
  });
}

void average(const RowNormTask& t, const Workspace& w, double* mean) {
  for (int64_t c = 0; c < t.cols; ++c) mean[c] = 0;
  for (int64_t i = 0; i < w.chunks; ++i)
    for (int64_t c = 0; c < t.cols; ++c) mean[c] += w.partial[i * t.cols + c];
  for (int64_t c = 0; c < t.cols; ++c) mean[c] /= double(t.rows);
}

}  // namespace

int64_t cpu::row_norm_workspace(const RowNormTask& t) { return t.center ? Workspace::bytes(t) : 0; }

void cpu::row_norm(const RowNormTask& t, void* workspace, void*) {
  if (t.batch == 0 || t.rows == 0 || t.cols == 0) return;
  if (!t.center) {
    const RowNormRows all{t.x, t.y, t.element, t.cols, t.eps};
    parallel_for(0, t.batch * t.rows, chunk_rows(t.cols),
                 [&, kernel = GRADOPS_DISPATCH(row_norm_plain)](int64_t b, int64_t e) { kernel(all, b, e); });
    return;
  }
  const Workspace w(t, static_cast<double*>(workspace));
  const auto sum = GRADOPS_DISPATCH(row_norm_sum);
  const auto measure = GRADOPS_DISPATCH(row_norm_measure);
  const auto write = GRADOPS_DISPATCH(row_norm_write);
  for (int64_t i = 0; i < t.batch; ++i) {
    const int64_t offset = i * t.rows * t.cols * element_size(t.element);
    const RowNormRows rows{static_cast<const char*>(t.x) + offset, static_cast<char*>(t.y) + offset, t.element, t.cols,
                           t.eps};
    each_chunk(t, w, [&](int64_t k, int64_t b, int64_t e) { sum(rows, b, e, w.partial + k * t.cols); });
    average(t, w, w.mean);
    each_chunk(
        t, w, [&](int64_t k, int64_t b, int64_t e) { measure(rows, b, e, w.mean, w.inverse, w.partial + k * t.cols); });
    average(t, w, w.mean_after);
    each_chunk(t, w, [&](int64_t, int64_t b, int64_t e) { write(rows, b, e, w.mean, w.inverse, w.mean_after); });
  }
}

}  // namespace gradops
