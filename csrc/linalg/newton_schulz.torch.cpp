#include "linalg/newton_schulz.h"

#include <vector>

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor newton_schulz(const Tensor& x_in, std::vector<double> coefficients, bool normalize, int64_t products,
                     int64_t restart) {
  STD_TORCH_CHECK(x_in.dim() >= 2, "newton_schulz: x must have at least 2 dimensions, got ", x_in.dim());
  NewtonSchulzSteps steps = newton_schulz_steps(coefficients.data(), int64_t(coefficients.size()));
  STD_TORCH_CHECK(products >= 0 && products <= 2, "newton_schulz: products must be 0, 1 or 2, got ", products);
  STD_TORCH_CHECK(restart >= 0 && restart <= steps.kMost, "newton_schulz: restart must be 0 to ", steps.kMost);
  STD_TORCH_CHECK(restart == 0 || (products == 0 && GRADOPS_BACKEND_ID == 1),
                  "newton_schulz: restart goes with full products on the CPU");
  steps.restart = int(restart);
  const Scope scope(x_in);
  const Tensor x = contiguous_of(x_in);
  Tensor y = new_like(x);
  const int64_t rows = x.size(-2), cols = x.size(-1), batch = x.numel() == 0 ? 0 : x.numel() / (rows * cols);
  const Element type = element(x, "newton_schulz: x");
  const NewtonSchulzProducts how = NewtonSchulzProducts(products);
#if GRADOPS_BACKEND_ID == 1
  cpu::newton_schulz(x.const_data_ptr(), y.mutable_data_ptr(), type, batch, rows, cols, steps, normalize, how);
#else
  const Tensor workspace =
      empty(x, {cuda::newton_schulz_workspace_bytes(type, batch, rows, cols, how)}, ScalarType::Byte);
  cuda::newton_schulz(x.const_data_ptr(), y.mutable_data_ptr(), type, batch, rows, cols, steps, normalize, how,
                      workspace.mutable_data_ptr(), scope.stream());
#endif
  return y;
}

}  // namespace

GRADOPS_OP(newton_schulz,
           "newton_schulz(Tensor x, float[] coefficients, bool normalize, int products, int restart=0) "
           "-> Tensor")

}  // namespace gradops
