#include "rl/plackett_luce_logprob.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor run(const Tensor& scores_in, const Tensor& permutation_in, bool gradient) {
  STD_TORCH_CHECK(scores_in.dim() >= 1 && permutation_in.dim() == scores_in.dim(),
                  "plackett_luce_logprob: scores and permutation must have as many dimensions, at least 1");
  const Element stored = element(scores_in, "plackett_luce_logprob: scores");
  STD_TORCH_CHECK(element_size(stored) >= 4, "plackett_luce_logprob: scores must be float32 or float64");
  STD_TORCH_CHECK(permutation_in.scalar_type() == ScalarType::Long, "plackett_luce_logprob: permutation must be int64");
  same_device(scores_in, permutation_in, "plackett_luce_logprob: scores and permutation");
  const Scope scope(scores_in);
  const Tensor scores = contiguous_of(scores_in), permutation = contiguous_of(permutation_in);
  std::vector<int64_t> shape(size_t(scores.dim() - 1));
  int64_t rows = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    rows *= shape[i] = scores.size(int64_t(i));
    STD_TORCH_CHECK(permutation.size(int64_t(i)) == shape[i],
                    "plackett_luce_logprob: scores and permutation must have the same leading dimensions");
  }
  if (gradient) shape.push_back(scores.size(-1));
  Tensor out = empty(scores, shape, scores.scalar_type());
  const PlackettLuce task{scores.const_data_ptr(),
                          static_cast<const int64_t*>(permutation.const_data_ptr()),
                          out.mutable_data_ptr(),
                          stored,
                          rows,
                          scores.size(-1),
                          permutation.size(-1),
                          gradient};
  STD_TORCH_CHECK(task.k < (int64_t(1) << 31), "plackett_luce_logprob: permutation is too long");
  const Workspace memory(scores, backend::plackett_luce_workspace(task));
  backend::plackett_luce(task, memory.data(), scope.stream());
  return out;
}

Tensor plackett_luce_logprob(const Tensor& scores, const Tensor& permutation) {
  return run(scores, permutation, false);
}
Tensor plackett_luce_gradient(const Tensor& scores, const Tensor& permutation) {
  return run(scores, permutation, true);
}

}  // namespace

GRADOPS_OP(plackett_luce_logprob, "plackett_luce_logprob(Tensor scores, Tensor permutation) -> Tensor")
GRADOPS_OP(plackett_luce_gradient, "plackett_luce_gradient(Tensor scores, Tensor permutation) -> Tensor")

}  // namespace gradops
