#include "rl/permutation_weights.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor permutation_weights(const Tensor& logp_in, const Tensor& cu_seqlens_in, const Tensor& offsets_in, double tau) {
  for (const Tensor* x : {&cu_seqlens_in, &offsets_in}) {
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) >= 1 && x->scalar_type() == ScalarType::Long,
                    "permutation_weights: cu_seqlens and offsets must be int64 of shape (pieces + 1)");
    same_device(logp_in, *x, "permutation_weights: all tensors");
  }
  STD_TORCH_CHECK(logp_in.dim() == 1, "permutation_weights: logp must have 1 dimension, got ", logp_in.dim());
  const Scope scope(logp_in);
  const Tensor logp = contiguous_of(logp_in), cu_seqlens = contiguous_of(cu_seqlens_in),
               offsets = contiguous_of(offsets_in);
  const int64_t answers = cu_seqlens.size(0) - 1;
  const Element stored = element(logp, "permutation_weights: logp");
  Tensor weights = empty(logp, {answers}, stored == Element::f64 ? ScalarType::Double : ScalarType::Float);
  const Workspace means(logp, 8 * answers);
  backend::permutation_weights(
      {logp.const_data_ptr(), static_cast<const int64_t*>(cu_seqlens.const_data_ptr()),
       static_cast<const int64_t*>(offsets.const_data_ptr()), weights.mutable_data_ptr(),
       static_cast<double*>(means.data()), stored, logp.size(0), answers, offsets.size(0) - 1, tau},
      scope.stream());
  return weights;
}

}  // namespace

GRADOPS_OP(permutation_weights,
           "permutation_weights(Tensor logp, Tensor cu_seqlens, Tensor offsets, float tau) -> Tensor")

}  // namespace gradops
