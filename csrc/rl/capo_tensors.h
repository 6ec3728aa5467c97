// capo_tensors.h: checks of the tensors that CAPO's ops share. For *.torch.cpp only.
#pragma once
#include "common/torch_op.h"
#include "rl/capo_curvature.h"

namespace gradops {

inline ScalarType real_of(const Tensor& hidden) {
  return hidden.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct CapoInput {
  ScalarType real;
  Element stored;
  Tensor hidden, probs, action, advantages;

  CapoInput(const char* op, const Tensor& hidden_in, const Tensor& probs_in, const Tensor& action_in,
            const Tensor& advantages_in)
      : real(real_of(hidden_in)),
        stored(element(hidden_in, "capo: hidden")),
        hidden(contiguous_of(hidden_in)),
        probs(contiguous_of(probs_in)),
        action(contiguous_of(action_in)),
        advantages(contiguous_of(advantages_in)) {
    STD_TORCH_CHECK(hidden.dim() == 2 && probs.dim() == 2 && action.dim() == 1 && advantages.dim() == 1, op,
                    ": hidden and probs must have 2 dimensions, action_index and advantages 1");
    const int64_t n = hidden.size(0);
    STD_TORCH_CHECK(probs.size(0) == n && action.size(0) == n && advantages.size(0) == n, op,
                    ": hidden, probs, action_index and advantages must have one row per token");
    STD_TORCH_CHECK(probs.scalar_type() == real && advantages.scalar_type() == real, op,
                    ": probs and advantages must be float64 if hidden is, else float32");
    STD_TORCH_CHECK(action.scalar_type() == ScalarType::Long, op, ": action_index must be int64");
    for (const Tensor* x : {&probs, &action, &advantages}) same_device(hidden, *x, op);
  }
  CapoTokens tokens() const {
    return {hidden.const_data_ptr(),
            probs.const_data_ptr(),
            static_cast<const int64_t*>(action.const_data_ptr()),
            advantages.const_data_ptr(),
            stored,
            hidden.size(0),
            probs.size(1),
            hidden.size(1)};
  }
};

struct CapoRows {
  Tensor token_ids;

  CapoRows(const char* op, const CapoInput& in, const Tensor& ids, const Tensor& exp_avg, const Tensor& exp_avg_sq)
      : token_ids(contiguous_of(ids)) {
    STD_TORCH_CHECK(token_ids.dim() == 2 && token_ids.size(0) == in.probs.size(0) &&
                        token_ids.size(1) == in.probs.size(1) && token_ids.scalar_type() == ScalarType::Long,
                    op, ": token_ids must be int64, of the shape of probs");
    same_device(in.hidden, token_ids, op);
    for (const Tensor* x : {&exp_avg, &exp_avg_sq}) {
      STD_TORCH_CHECK(x->dim() == 2 && x->size(1) == in.hidden.size(1) && x->size(0) == exp_avg.size(0) &&
                          x->scalar_type() == in.real && x->is_contiguous(),
                      op, ": exp_avg and exp_avg_sq must be contiguous (U, H), float64 if hidden is, else float32");
      same_device(in.hidden, *x, op);
    }
  }
  const int64_t* ids() const { return static_cast<const int64_t*>(token_ids.const_data_ptr()); }
};

}  // namespace gradops
