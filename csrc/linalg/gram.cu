#include "common/cuda_launch.h"
#include "linalg/gram.h"
#include "linalg/gram_tiles.cuh"

namespace gradops {
namespace {

// g = the sum over all blocks of J and all slices, or g += that.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_slices(const __grid_constant__ Table table, const T* __restrict__ sums, T* __restrict__ g, bool add) {
  const TiledMatrix& first = table.at[0];  // its tiles are those of all
  const int64_t item = blockIdx.x / first.pairs, pair = blockIdx.x % first.pairs, rows = first.rows;
  const Pair at = pair_of(pair);
  g += item * rows * rows;
  for (int e = threadIdx.x; e < first.edge * first.edge; e += kThreads) {
    const int64_t row = at.i * kTile + e / first.edge, col = at.j * kTile + e % first.edge;
    if (row >= rows || col > row) continue;
    T total = add ? g[row * rows + col] : T(0);
    for (int i = 0; i < table.count; ++i) {
      const TiledMatrix& m = table.at[i];
      total += over_slices(m, sums_at(m, sums, item, pair, e));
    }
    g[row * rows + col] = g[col * rows + row] = total;
  }
}

// Calls f(table, first) for the blocks of J, as many as a table holds at a time.
template <class F>
void each_table(const GramTask& t, const F& f) {
  for (int64_t b = 0; b < t.count; b += kMatrices) {
    Table table;
    for (int64_t i = b; i < t.count && i < b + kMatrices; ++i)
      table.add(t.blocks[i].j, t.blocks[i].element, t.batch, t.rows, t.blocks[i].cols);
    f(table, b == 0);
  }
}

template <class T>
void run(const GramTask& t, void* workspace, void* stream) {
  T* sums = static_cast<T*>(workspace);
  each_table(t, [&](const Table& table, bool first) {
    launch(sum_tiles<T>, blocks(table.blocks), kThreads, 0, stream, table, sums);
    launch(add_slices<T>, blocks(t.batch * table.at[0].pairs), kThreads, 0, stream, table, sums, static_cast<T*>(t.g),
           !first);
  });
}

}  // namespace

int64_t cuda::gram_workspace(const GramTask& t) {
  int64_t most = 0;
  each_table(t, [&](const Table& table, bool) { most = table.sums > most ? table.sums : most; });
  return most * (t.wide ? 8 : 4);
}

void cuda::gram(const GramTask& t, void* workspace, void* stream) {
  if (t.batch == 0 || t.rows == 0) return;
  t.wide ? run<double>(t, workspace, stream) : run<float>(t, workspace, stream);
}

}  // namespace gradops
