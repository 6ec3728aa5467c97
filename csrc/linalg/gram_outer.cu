// Two launches for up to 16 layers: the products of all pairs of rows of every x and g, then their contraction.
#include "common/cuda_launch.h"
#include "linalg/gram_outer.h"
#include "linalg/gram_tiles.cuh"

namespace gradops {
namespace {

constexpr int kLayers = kMatrices / 2;
constexpr int64_t kRoom = int64_t(1) << 22;  // sums after which a launch takes no more layers

struct LayerTable {
  Table matrices;  // x and g of the first layer, of the second, ...
  int64_t tokens[kLayers];
  bool bias[kLayers];
};

__device__ double product_at(const TiledMatrix& m, const double* sums, int64_t row, int64_t col) {
  const int64_t i = row / kTile, j = col / kTile;
  return over_slices(m, sums_at(m, sums, 0, i * (i + 1) / 2 + j, row % kTile * m.edge + col % kTile));
}

// A thread owns an entry of the lower triangle and its mirror image; sums run over layers and tokens in order.
__global__ void __launch_bounds__(kThreads)
    contract(const __grid_constant__ LayerTable table, const double* __restrict__ sums, double* __restrict__ out,
             int64_t samples, bool add) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x, a = n / samples, b = n % samples;
  if (a >= samples || b > a) return;
  double total = add ? out[n] : 0;
  for (int layer = 0; 2 * layer < table.matrices.count; ++layer) {
    const TiledMatrix &x = table.matrices.at[2 * layer], &g = table.matrices.at[2 * layer + 1];
    const int64_t tokens = table.tokens[layer];
    const double shift = table.bias[layer] ? 1 : 0;
    double sum = 0;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t s = 0; s < tokens; ++s) {
        const int64_t p = a * tokens + t, q = b * tokens + s, row = p > q ? p : q, col = p > q ? q : p;
        sum += product_at(g, sums, row, col) * (product_at(x, sums, row, col) + shift);
      }
    total += sum;
  }
  out[n] = out[b * samples + a] = total;
}

// Calls f(table, first) for the layers, as many as a table holds at a time; once at least.
template <class F>
void each_table(const GramOuterTask& t, const F& f) {
  int64_t l = 0;
  bool first = true;
  do {
    LayerTable table;
    for (int i = 0; i < kLayers && l < t.count && table.matrices.sums < kRoom; ++i, ++l) {
      const OuterLayer& layer = t.layers[l];
      table.matrices.add(layer.x, layer.x_element, 1, t.samples * layer.tokens, layer.d);
      table.matrices.add(layer.g, layer.g_element, 1, t.samples * layer.tokens, layer.p);
      table.tokens[i] = layer.tokens;
      table.bias[i] = layer.bias;
    }
    f(table, first);
    first = false;
  } while (l < t.count);
}

}  // namespace

int64_t cuda::gram_outer_workspace(const GramOuterTask& t) {
  int64_t most = 0;
  each_table(t, [&](const LayerTable& table, bool) { most = table.matrices.sums > most ? table.matrices.sums : most; });
  return 8 * most;
}

void cuda::gram_outer(const GramOuterTask& t, void* workspace, void* stream) {
  if (t.samples == 0) return;
  double* sums = static_cast<double*>(workspace);
  each_table(t, [&](const LayerTable& table, bool first) {
    if (table.matrices.count)
      launch(sum_tiles<double>, blocks(table.matrices.blocks), kThreads, 0, stream, table.matrices, sums);
    launch(contract, blocks(up(t.samples * t.samples, kThreads)), kThreads, 0, stream, table, sums, t.out, t.samples,
           !first);
  });
}

}  // namespace gradops
