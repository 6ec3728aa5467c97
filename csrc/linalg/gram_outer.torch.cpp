#include "linalg/gram_outer.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

struct Layers {
  std::vector<Tensor> kept;
  std::vector<OuterLayer> layers;
  int64_t samples;

  Layers(const std::vector<Tensor>& x, const std::vector<Tensor>& g, const std::vector<bool>& bias) {
    STD_TORCH_CHECK(!x.empty() && g.size() == x.size() && bias.size() == x.size(),
                    "gram_outer: x, g and bias must have one entry per layer, and at least one");
    samples = x[0].size(0);
    for (size_t i = 0; i < x.size(); ++i) {
      STD_TORCH_CHECK(x[i].dim() == 3 && g[i].dim() == 3 && x[i].size(0) == samples && g[i].size(0) == samples &&
                          g[i].size(1) == x[i].size(1),
                      "gram_outer: x must be (B, T, d) and g (B, T, p) for each layer");
      same_device(x[0], x[i], "gram_outer: all x and g");
      same_device(x[0], g[i], "gram_outer: all x and g");
      kept.push_back(contiguous_of(x[i]));
      kept.push_back(contiguous_of(g[i]));
      const Tensor &a = kept[2 * i], &b = kept[2 * i + 1];
      if (a.size(1) == 0) continue;  // gives nothing
      layers.push_back({a.const_data_ptr(), b.const_data_ptr(), element(a, "gram_outer: x"),
                        element(b, "gram_outer: g"), a.size(1), a.size(2), b.size(2), bias[i]});
    }
  }
};

Tensor gram_outer(std::vector<Tensor> x, std::vector<Tensor> g, std::vector<bool> bias) {
  STD_TORCH_CHECK(!x.empty(), "gram_outer: x must hold at least one layer");
  const Scope scope(x[0]);
  const Layers all(x, g, bias);
  Tensor out = empty(x[0], {all.samples, all.samples}, ScalarType::Double);
  if (all.samples == 0) return out;
  const GramOuterTask task{all.layers.data(), int64_t(all.layers.size()), all.samples,
                           static_cast<double*>(out.mutable_data_ptr())};
  const Workspace memory(out, backend::gram_outer_workspace(task));
  backend::gram_outer(task, memory.data(), scope.stream());
  return out;
}

}  // namespace

GRADOPS_OP(gram_outer, "gram_outer(Tensor[] x, Tensor[] g, bool[] bias) -> Tensor")

#if GRADOPS_BACKEND_ID == 1
namespace {

Tensor gram_outer_blocks(const Tensor& x, const Tensor& g, bool bias) {
  const Layers all({x}, {g}, {bias});
  Tensor out = empty(x, {all.samples, all.samples}, ScalarType::Double);
  if (all.samples == 0) return out;
  double* const data = static_cast<double*>(out.mutable_data_ptr());
  if (all.layers.empty() || (x.size(2) == 0 && !bias) || g.size(2) == 0) {
    for (int64_t i = 0; i < all.samples * all.samples; ++i) data[i] = 0;
    return out;
  }
  const GramOuterTask task{all.layers.data(), 1, all.samples, data};
  const Workspace memory(out, cpu::gram_outer_blocks_workspace(task));
  cpu::gram_outer_blocks(task, memory.data());
  return out;
}

}  // namespace

GRADOPS_OP(gram_outer_blocks, "gram_outer_blocks(Tensor x, Tensor g, bool bias) -> Tensor")
#endif

}  // namespace gradops
