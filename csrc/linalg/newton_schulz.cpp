#include "linalg/newton_schulz.h"

#include <stdexcept>

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {
namespace {

const NewtonSchulzEngine& engine_for(Element element, NewtonSchulzProducts products) {
  const auto full = GRADOPS_DISPATCH(newton_schulz_full);
  if (products == NewtonSchulzProducts::full) return full(element);
  using Pick = const NewtonSchulzEngine& (*)(Element, int);
  const Pick pick = GRADOPS_DISPATCH_BF16(newton_schulz_bf16);
  if (!pick) throw std::runtime_error("newton_schulz: no bf16 products on this machine");
  if (element != Element::bf16 && element != Element::f32)
    throw std::runtime_error("newton_schulz: bf16 products take bf16 or f32 input");
  return pick(element, products == NewtonSchulzProducts::bf16x3 ? 2 : 1);
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace

NewtonSchulzSteps newton_schulz_steps(const double* coefficients, int64_t count) {
  NewtonSchulzSteps steps;
  if (count % 3 != 0 || count / 3 > steps.kMost)
    throw std::invalid_argument("newton_schulz: coefficients must be 3 per step, for at most 32 steps");
  for (; steps.steps < count / 3; ++steps.steps, coefficients += 3) {
    steps.a[steps.steps] = coefficients[0];
    steps.b[steps.steps] = coefficients[1];
    steps.c[steps.steps] = coefficients[2];
  }
  return steps;
}

// Enough matrices keep every thread busy with one of its own, in its own cache. Fewer than that are
// taken one after the other, and the threads share each phase.
void cpu::newton_schulz(const void* in, void* out, Element element, int64_t batch, int64_t rows, int64_t cols,
                        const NewtonSchulzSteps& steps, bool normalize, NewtonSchulzProducts products, void*) {
  if (batch == 0 || rows == 0 || cols == 0) return;
  const NewtonSchulzEngine& engine = engine_for(element, products);
  const auto task = [=, &steps](int64_t item) {
    const int64_t offset = item * rows * cols * element_size(element);
    return NewtonSchulzTask{static_cast<const char*>(in) + offset,
                            static_cast<char*>(out) + offset,
                            element,
                            rows,
                            cols,
                            &steps,
                            normalize};
  };
  const NewtonSchulzTask first = task(0);
  const int phases = engine.phases(first);
  const int64_t shared = round_up(engine.workspace_bytes(first), 4096);
  const int64_t own = round_up(engine.scratch_bytes(first), 4096);

  const int64_t short_side = rows < cols ? rows : cols;
  if (batch >= 2 * num_threads() || num_threads() == 1 || short_side < 128) {
    parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      char* memory = thread_scratch(shared + own);
      for (int64_t item = begin; item < end; ++item) {
        const NewtonSchulzTask t = task(item);
        if (engine.run_all) {
          engine.run_all(t, memory, memory + shared);
          continue;
        }
        for (int phase = 0; phase < phases; ++phase)
          engine.run(t, memory, memory + shared, phase, 0, engine.units(t, phase));
      }
    });
    return;
  }
  // The caller's scratch comes first: asked again for less, thread_scratch gives the same memory.
  char* memory = thread_scratch(own + shared) + own;
  for (int64_t item = 0; item < batch; ++item) {
    const NewtonSchulzTask t = task(item);
    for (int phase = 0; phase < phases; ++phase)
      parallel_for(0, engine.units(t, phase), 1,
                   [&](int64_t begin, int64_t end) { engine.run(t, memory, thread_scratch(own), phase, begin, end); });
  }
}

}  // namespace gradops
