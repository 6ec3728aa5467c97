#include "quant/gptq_spread.h"

#include "common/torch_op.h"

#if GRADOPS_BACKEND_ID == 1
namespace gradops {
namespace {

void gptq_spread_(Tensor w, const Tensor& e_in, const Tensor& u_in, bool add) {
  STD_TORCH_CHECK(w.dim() == 3 && e_in.dim() == 3 && u_in.dim() == 3,
                  "gptq_spread_: w, e and u must have 3 dimensions");
  for (const Tensor* x : {static_cast<const Tensor*>(&w), &e_in, &u_in})
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, "gptq_spread_: w, e and u must be float32");
  const int64_t batch = w.size(0), rows = w.size(1), cols = w.size(2), depth = e_in.size(2);
  STD_TORCH_CHECK(e_in.size(0) == batch && u_in.size(0) == batch && e_in.size(1) == rows && u_in.size(1) == depth &&
                      u_in.size(2) == cols,
                  "gptq_spread_: shapes do not fit: w (b, m, n), e (b, m, k), u (b, k, n)");
  STD_TORCH_CHECK(cols <= 1 || w.stride(2) == 1, "gptq_spread_: the columns of w must lie side by side");
  const Tensor e = depth <= 1 || e_in.stride(2) == 1 ? e_in : torch::stable::contiguous(e_in);
  cpu::gptq_spread({static_cast<float*>(w.mutable_data_ptr()), static_cast<const float*>(e.const_data_ptr()),
                    static_cast<const float*>(u_in.const_data_ptr()), w.stride(0), w.stride(1), e.stride(0),
                    e.stride(1), u_in.stride(0), u_in.stride(1), u_in.stride(2), batch, rows, cols, depth, add});
}

}  // namespace

GRADOPS_OP(gptq_spread_, "gptq_spread_(Tensor(a!) w, Tensor e, Tensor u, bool add) -> ()")

}  // namespace gradops
#endif
