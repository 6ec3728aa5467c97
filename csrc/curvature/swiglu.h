// swiglu: y = silu(gate) * up, its gradient, and the changes of both along changes of the inputs. Torch-free interface.
// Nothing but the inputs is needed for any of them.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct SwigluRows {  // cols numbers each, `stride` numbers apart; null: of `up` ones, of others zeros
  const void* data = nullptr;
  int64_t stride = 0;
};
struct SwigluTask {
  Element element;
  int64_t rows, cols;  // what is written is contiguous
  SwigluRows gate, up, g, gate_dot, up_dot, g_dot;
  // With `backward` the gradients in gate and up along g; else y, which is the first alone. Null: not wanted.
  bool backward;
  void *value[2], *change[2];
};
// Numbers [begin, end) of rows * cols.
GRADOPS_DECLARE(void, swiglu, const SwigluTask&, int64_t begin, int64_t end)

namespace cpu {
void swiglu(const SwigluTask&, void* = nullptr);
}
namespace cuda {
void swiglu(const SwigluTask&, void* stream);
}
}  // namespace gradops
