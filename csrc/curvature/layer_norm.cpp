#include "curvature/layer_norm.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {
namespace {

// Sums of every piece of rows, then weights of the type that is computed in where they are not, and a row of zeros.
struct Workspace {
  Element real;
  int64_t pieces, sums, partial, parameters, bytes;

  explicit Workspace(const LayerNormTask& t)
      : real(t.element == Element::f64 ? Element::f64 : Element::f32),
        pieces((t.rows + layer_norm_piece(t.rows) - 1) / layer_norm_piece(t.rows)),
        sums(t.dbias     ? 2
             : t.dweight ? 1
                         : 0),
        partial(t.batch * pieces * sums * t.n * element_size(real)),
        parameters(t.batch * t.n * element_size(real)),
        bytes(partial + 4 * parameters + t.n * element_size(real)) {}
};

const char* at(const void* p, int64_t i, int64_t size) { return p ? static_cast<const char*>(p) + i * size : nullptr; }
char* at(void* p, int64_t i, int64_t size) { return p ? static_cast<char*>(p) + i * size : nullptr; }

}  // namespace

int64_t cpu::layer_norm_workspace(const LayerNormTask& t) { return Workspace(t).bytes; }

void cpu::layer_norm(const LayerNormTask& t, void* workspace, void*) {
  const Workspace plan(t);
  const int64_t row = t.n * element_size(t.element), real_row = t.n * element_size(plan.real);
  char* memory = static_cast<char*>(workspace) + plan.partial;
  const auto widen = GRADOPS_DISPATCH(layer_norm_widen);
  const auto ready = [&](bool used, const void* given, double otherwise) -> const void* {
    if (!used || (given && t.weight_element == plan.real)) return given;
    widen(given, t.weight_element, otherwise, memory, plan.real, t.batch * t.n);
    memory += plan.parameters;
    return memory - plan.parameters;
  };
  const bool first_order = t.pass == LayerNormPass::forward || t.pass == LayerNormPass::backward;
  const void *weight = ready(true, t.weight, 1), *weight_dot = ready(!first_order, t.weight_dot, 0);
  const void* bias = ready(t.pass == LayerNormPass::forward, t.bias, 0);
  const void* bias_dot = ready(t.pass == LayerNormPass::jvp, t.bias_dot, 0);
  widen(nullptr, plan.real, 0, memory, plan.real, t.n);

  const auto forward = GRADOPS_DISPATCH(layer_norm_forward), jvp = GRADOPS_DISPATCH(layer_norm_jvp);
  const auto backward = t.pass == LayerNormPass::backward ? GRADOPS_DISPATCH(layer_norm_backward)
                                                          : GRADOPS_DISPATCH(layer_norm_backward_jvp);
  const int64_t piece = layer_norm_piece(t.rows), grain = 32768 / (piece * t.n + 1) + 1;
  parallel_for(0, t.batch * plan.pieces, grain, [&](int64_t first, int64_t last) {
    char* buffers = element_size(t.element) == 2 ? thread_scratch(kLayerNormBuffers * real_row) : nullptr;
    for (int64_t i = first; i < last; ++i) {
      const int64_t item = i / plan.pieces, rows = item * t.rows, begin = i % plan.pieces * piece;
      const int64_t end = begin + piece < t.rows ? begin + piece : t.rows;
      const LayerNormRows r{at(t.x, rows, row),
                            at(t.x_dot, rows, row),
                            at(t.g, rows, row),
                            at(t.g_dot, rows, row),
                            at(weight, item, real_row),
                            at(weight_dot, item, real_row),
                            at(bias, item, real_row),
                            at(bias_dot, item, real_row),
                            t.stats + 2 * rows,
                            t.stats_dot ? t.stats_dot + 2 * rows : nullptr,
                            at(t.out, rows, row),
                            t.element,
                            t.n,
                            t.eps,
                            t.center,
                            memory,
                            buffers};
      if (t.pass == LayerNormPass::forward) {
        forward(r, begin, end);
      } else if (t.pass == LayerNormPass::jvp) {
        jvp(r, begin, end);
      } else {
        char* sums = at(workspace, i * plan.sums, real_row);
        backward(r, begin, end, plan.sums > 0 ? sums : nullptr, plan.sums > 1 ? sums + real_row : nullptr);
      }
    }
  });

  const auto total = GRADOPS_DISPATCH(layer_norm_total);
  const auto add_pieces = [&](int64_t which, void* out) {
    if (!out) return;
    for (int64_t item = 0; item < t.batch; ++item)
      parallel_for(0, t.n, 32768 / (plan.pieces + 1) + 1, [&](int64_t begin, int64_t end) {
        total(at(workspace, item * plan.pieces * plan.sums + which, real_row), plan.real, plan.pieces, plan.sums * t.n,
              at(out, item, t.n * element_size(t.weight_element)), t.weight_element, begin, end);
      });
  };
  add_pieces(0, t.dweight);
  add_pieces(1, t.dbias);
}

}  // namespace gradops
