#include "quant/hessian_update.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {
namespace {

const ProductEngine& engine_for(const HessianTask& all) {
  using Pick = const ProductEngine& (*)(Element, Element, bool);
  const Pick bf16 = GRADOPS_DISPATCH_BF16(hessian_update_bf16);
  // Two or three products of bf16 are faster than one of float with tiles, but not without them.
  const bool one_product = all.element == Element::bf16 && !all.x_q;
  const bool worth = one_product || (all.split && all.element != Element::f64 && best_isa() >= Isa::amx);
  if (bf16 && worth) return bf16(all.element, all.h_element, !all.x_q);
  return GRADOPS_DISPATCH(hessian_update_full)(all.element, all.h_element);
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The tokens of item i that count; `list` has room for all.
ProductTask item_task(const HessianTask& all, int64_t i, int64_t* list) {
  const int64_t x_bytes = all.tokens * all.n * element_size(all.element);
  ProductTask t{};
  t.x = static_cast<const char*>(all.x) + i * x_bytes;
  t.x_q = all.x_q ? static_cast<const char*>(all.x_q) + i * x_bytes : nullptr;
  t.element = all.element, t.h_element = all.h_element, t.n = all.n, t.tokens = all.tokens;
  t.h = static_cast<char*>(all.h) + i * all.n * all.n * element_size(all.h_element);
  if (all.mask) {
    t.rows = list, t.tokens = 0;
    for (int64_t k = 0; k < all.tokens; ++k)
      if (all.mask[i * all.tokens + k]) list[t.tokens++] = k;
  }
  const double before = double(all.n_seen[i]), after = before + double(t.tokens);
  all.n_new[i] = all.n_seen[i] + t.tokens;
  t.beta = after > 0 ? before / after : 1, t.scale = after > 0 ? 2 / after : 0;
  return t;
}

}  // namespace

int64_t cpu::hessian_update_workspace(const HessianTask& all) { return all.mask ? 8 * all.batch * all.tokens : 0; }

// Enough items keep every thread busy with one of its own. Fewer are taken one after the other, and
// the threads share each phase.
void cpu::hessian_update(const HessianTask& all, void* workspace, void*) {
  for (int64_t i = 0; i < all.batch; ++i)
    if (all.n_seen[i] < 0) refuse_value("n_seen", "not be negative", all.n_seen[i]);
  const ProductEngine& engine = engine_for(all);
  const auto task = [&](int64_t i) { return item_task(all, i, static_cast<int64_t*>(workspace) + i * all.tokens); };
  const auto empty = [](const ProductTask& t) { return t.tokens == 0 || t.n == 0; };
  if (num_threads() == 1 || all.batch >= 2 * num_threads()) {
    parallel_for(0, all.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const ProductTask t = task(i);
        if (empty(t)) continue;
        const int64_t shared = round_up(engine.workspace_bytes(t), 4096);
        char* memory = thread_scratch(shared + engine.scratch_bytes(t));
        for (int phase = 0; phase < engine.phases(t); ++phase)
          engine.run(t, memory, memory + shared, phase, 0, engine.units(t, phase));
      }
    });
    return;
  }
  for (int64_t i = 0; i < all.batch; ++i) {
    const ProductTask t = task(i);
    if (empty(t)) continue;
    // The caller's scratch comes first: asked again for less, thread_scratch gives the same memory.
    const int64_t own = round_up(engine.scratch_bytes(t), 4096);
    char* memory = thread_scratch(own + engine.workspace_bytes(t)) + own;
    for (int phase = 0; phase < engine.phases(t); ++phase)
      parallel_for(0, engine.units(t, phase), 1,
                   [&](int64_t begin, int64_t end) { engine.run(t, memory, thread_scratch(own), phase, begin, end); });
  }
}

}  // namespace gradops
