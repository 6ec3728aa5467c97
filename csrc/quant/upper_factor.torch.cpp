#include "quant/upper_factor.h"

#include "common/torch_op.h"

#if GRADOPS_BACKEND_ID == 1
namespace gradops {
namespace {

std::tuple<Tensor, Tensor, Tensor> upper_factor(const Tensor& h_in, bool factored) {
  const ScalarType type = h_in.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "upper_factor: h must be float32 or float64");
  STD_TORCH_CHECK(h_in.dim() == 3 && h_in.size(1) == h_in.size(2), "upper_factor: h must have shape (b, n, n)");
  const int64_t batch = h_in.size(0), n = h_in.size(1);
  STD_TORCH_CHECK(n <= kMostUpperColumns, "upper_factor: h has more than ", kMostUpperColumns, " columns");
  const Tensor h = n <= 1 || h_in.stride(2) == 1 ? h_in : contiguous_of(h_in);
  Tensor factor = empty(h, {batch, n, n}, type), inverse = empty(h, {batch, n, n}, type);
  Tensor failed = empty(h, {batch}, ScalarType::Bool);
  bool* const flags = static_cast<bool*>(failed.mutable_data_ptr());
  for (int64_t i = 0; i < batch; ++i) flags[i] = false;
  cpu::upper_factor({h.const_data_ptr(), h.stride(0), h.stride(1), batch, n, factored, factor.mutable_data_ptr(),
                     inverse.mutable_data_ptr(), flags},
                    type == ScalarType::Double);
  return {factor, inverse, failed};
}

}  // namespace

GRADOPS_OP(upper_factor, "upper_factor(Tensor h, bool factored) -> (Tensor, Tensor, Tensor)")

}  // namespace gradops
#endif
