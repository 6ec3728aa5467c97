#include "rl/one_token_rollout.h"

#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

std::vector<int64_t> shape_of(const Tensor& x, int64_t dims) {
  std::vector<int64_t> shape(size_t(dims), 0);
  for (int64_t i = 0; i < dims; ++i) shape[size_t(i)] = x.size(i);
  return shape;
}

// Contiguous int64 numbers of the shape of logits without its last dimension, with `more` in its place if not -1.
Tensor ids(const Tensor& x, const Tensor& logits, int64_t more, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, "one_token_rollout: ", name, " must be int64");
  same_device(logits, x, "one_token_rollout: logits and all ids");
  std::vector<int64_t> shape = shape_of(logits, logits.dim() - 1);
  if (more >= 0) shape.push_back(more);
  STD_TORCH_CHECK(shape_of(x, x.dim()) == shape, "one_token_rollout: ", name, " does not fit the shape of logits");
  return contiguous_of(x);
}

int64_t rows_of(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() >= 1, "one_token_rollout: logits must have at least 1 dimension");
  STD_TORCH_CHECK(logits.size(-1) > 0, "one_token_rollout: logits must have at least one column");
  return logits.numel() / logits.size(-1);
}

ScalarType loss_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_numbers(double temperature, int64_t k) {
  STD_TORCH_CHECK(temperature > 0 && k >= 0, "one_token_rollout: temperature must be positive, k not negative");
}

std::tuple<Tensor, Tensor, Tensor> one_token_rollout(const Tensor& logits_in, const Tensor& targets_in,
                                                     std::optional<Tensor> seeds_in, double temperature, double beta,
                                                     int64_t k) {
  const int64_t rows = rows_of(logits_in);
  check_numbers(temperature, k);
  STD_TORCH_CHECK(seeds_in.has_value() == (k > 0), "one_token_rollout: seeds are for the sampled form, k > 0");
  const Scope scope(logits_in);
  const Tensor logits = contiguous_of(logits_in);
  const Tensor targets = ids(targets_in, logits, -1, "targets");
  std::vector<int64_t> shape = shape_of(logits, logits.dim() - 1);
  Tensor loss = empty(logits, shape, loss_type(logits));
  shape.push_back(3);
  Tensor state = empty(logits, shape, ScalarType::Double);
  shape.back() = k;
  Tensor samples = empty(logits, shape, ScalarType::Long);
  OneTokenRolloutTask task{};
  task.logits = logits.const_data_ptr();
  task.element = element(logits, "one_token_rollout: logits");
  task.rows = rows, task.cols = logits.size(-1);
  task.targets = targets.const_data_ptr<int64_t>();
  task.temperature = temperature, task.beta = beta;
  const Tensor seeds = k ? ids(*seeds_in, logits, -1, "seeds") : targets;
  task.seeds = seeds.const_data_ptr<int64_t>();
  task.samples = samples.mutable_data_ptr<int64_t>(), task.k = k;
  task.loss = loss.mutable_data_ptr();
  task.state = state.mutable_data_ptr<double>();
  backend::one_token_rollout(task, scope.stream());
  return {loss, state, samples};
}

Tensor one_token_rollout_backward(const Tensor& logits_in, const Tensor& targets_in, const Tensor& samples_in,
                                  const Tensor& state_in, const Tensor& grad_in, double temperature, double beta) {
  const int64_t rows = rows_of(logits_in), k = samples_in.dim() ? samples_in.size(-1) : 0;
  check_numbers(temperature, k);
  const Scope scope(logits_in);
  const Tensor logits = contiguous_of(logits_in), state = contiguous_of(state_in), grad = contiguous_of(grad_in);
  const Tensor targets = ids(targets_in, logits, -1, "targets"), samples = ids(samples_in, logits, k, "samples");
  same_device(logits, state, "one_token_rollout_backward: logits and state");
  same_device(logits, grad, "one_token_rollout_backward: logits and grad");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Double && state.numel() == 3 * rows,
                  "one_token_rollout_backward: state must be that of the forward call");
  STD_TORCH_CHECK(grad.scalar_type() == loss_type(logits) && grad.numel() == rows,
                  "one_token_rollout_backward: grad must have the dtype and the shape of the loss");
  Tensor out = new_like(logits);
  OneTokenRolloutBackwardTask task{};
  task.logits = logits.const_data_ptr();
  task.element = element(logits, "one_token_rollout_backward: logits");
  task.rows = rows, task.cols = logits.size(-1);
  task.targets = targets.const_data_ptr<int64_t>();
  task.temperature = temperature, task.beta = beta;
  task.samples = samples.const_data_ptr<int64_t>(), task.k = k;
  task.state = state.const_data_ptr<double>();
  task.grad = grad.const_data_ptr();
  task.grad_logits = out.mutable_data_ptr();
  backend::one_token_rollout_backward(task, scope.stream());
  return out;
}

}  // namespace

GRADOPS_OP(one_token_rollout,
           "one_token_rollout(Tensor logits, Tensor targets, Tensor? seeds, float temperature, float beta, int k) "
           "-> (Tensor, Tensor, Tensor)")
GRADOPS_OP(one_token_rollout_backward,
           "one_token_rollout_backward(Tensor logits, Tensor targets, Tensor samples, Tensor state, Tensor grad, "
           "float temperature, float beta) -> Tensor")

}  // namespace gradops
