#include "ot/router.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result router(const Tensor& logits_in, bool experts_choose, int64_t width, int64_t capacity, int64_t steps,
              double gamma, double lr) {
  STD_TORCH_CHECK(logits_in.dim() >= 2, "router: logits must have at least 2 dimensions, got ", logits_in.dim());
  const int64_t tokens = logits_in.size(-2), experts = logits_in.size(-1);
  STD_TORCH_CHECK(experts >= 1, "router: logits must have at least one expert");
  STD_TORCH_CHECK(tokens < (int64_t(1) << 31) && experts < (int64_t(1) << 31), "router: logits is too large");
  STD_TORCH_CHECK(width >= 1 && (experts_choose || width <= experts), "router: bad width ", width);
  STD_TORCH_CHECK(gamma > 0, "router: gamma must be positive, got ", gamma);
  const Scope scope(logits_in);
  const Tensor logits = contiguous_of(logits_in);
  const ScalarType type = logits.scalar_type(), wide = type == ScalarType::Double ? type : ScalarType::Float;
  std::vector<int64_t> lead;
  int64_t groups = 1;
  for (int64_t d = 0; d + 2 < logits.dim(); ++d) lead.push_back(logits.size(d)), groups *= logits.size(d);
  const auto make = [&](std::vector<int64_t> tail, ScalarType dtype) {
    tail.insert(tail.begin(), lead.begin(), lead.end());
    return empty(logits, tail, dtype);
  };
  const std::vector<int64_t> slots{experts_choose ? experts : tokens, width};
  const Element e = element(logits, "router: logits");
  Tensor indices = make(slots, ScalarType::Long), weights = make(slots, type), plan = make(slots, wide);
  Tensor load = make({experts}, ScalarType::Long), taken = make({tokens}, ScalarType::Long);
  Tensor overflow = make({tokens}, ScalarType::Long), dropped = make({}, ScalarType::Long);
  Tensor residual = make({}, ScalarType::Double), value = make({}, ScalarType::Double);
  const auto integers = [](Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); };
  const auto doubles = [](Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); };
  const RouterTask task{logits.const_data_ptr(),
                        e,
                        groups,
                        tokens,
                        experts,
                        experts_choose,
                        width,
                        capacity,
                        steps,
                        gamma,
                        lr,
                        integers(indices),
                        weights.mutable_data_ptr(),
                        plan.mutable_data_ptr(),
                        integers(load),
                        integers(taken),
                        integers(overflow),
                        integers(dropped),
                        doubles(residual),
                        doubles(value)};
  if (groups > 0) {
    const Workspace memory(logits, backend::router_workspace(task));
    backend::router(task, memory.data(), scope.stream());
  }
  return {indices, weights, plan, load, taken, overflow, dropped, residual, value};
}

}  // namespace

GRADOPS_OP(router,
           "router(Tensor logits, bool experts_choose, int width, int capacity, int n_steps, float gamma, float lr) -> "
           "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")

}  // namespace gradops
