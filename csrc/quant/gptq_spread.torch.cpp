#include "quant/gptq_spread.h"

#include <optional>

#include "common/torch_op.h"

#if GRADOPS_BACKEND_ID == 1
namespace gradops {
namespace {

void gptq_spread_(Tensor w, const Tensor& e_in, const Tensor& u, bool add, bool fresh,
                  const std::optional<Tensor>& base_in) {
  STD_TORCH_CHECK(w.dim() == 3 && e_in.dim() == 3 && u.dim() == 3, "gptq_spread_: w, e and u must have 3 dimensions");
  const ScalarType type = w.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && e_in.scalar_type() == type &&
                      u.scalar_type() == type,
                  "gptq_spread_: w, e and u must all be float32 or all float64");
  const int64_t batch = w.size(0), rows = w.size(1), cols = w.size(2), depth = e_in.size(2);
  STD_TORCH_CHECK(
      e_in.size(0) == batch && u.size(0) == batch && e_in.size(1) == rows && u.size(1) == depth && u.size(2) == cols,
      "gptq_spread_: shapes do not fit: w (b, m, n), e (b, m, k), u (b, k, n)");
  STD_TORCH_CHECK(cols <= 1 || w.stride(2) == 1, "gptq_spread_: the columns of w must lie side by side");
  STD_TORCH_CHECK(!base_in || (base_in->scalar_type() == type && base_in->dim() == 3 && base_in->size(0) == batch &&
                               base_in->size(1) == rows && base_in->size(2) == cols),
                  "gptq_spread_: base must be like w");
  const Tensor base = !base_in ? w : cols <= 1 || base_in->stride(2) == 1 ? *base_in : contiguous_of(*base_in);
  const Tensor e = depth <= 1 || e_in.stride(2) == 1 ? e_in : contiguous_of(e_in);
  cpu::gptq_spread(
      {w.mutable_data_ptr(), e.const_data_ptr(), u.const_data_ptr(), base_in ? base.const_data_ptr() : nullptr,
       w.stride(0), w.stride(1), e.stride(0), e.stride(1), u.stride(0), u.stride(1), u.stride(2), base.stride(0),
       base.stride(1), batch, rows, cols, depth, add, fresh},
      type == ScalarType::Double);
}

}  // namespace

GRADOPS_OP(gptq_spread_,
           "gptq_spread_(Tensor(a!) w, Tensor e, Tensor u, bool add, bool fresh=False, Tensor? base=None) -> ()")

}  // namespace gradops
#endif
