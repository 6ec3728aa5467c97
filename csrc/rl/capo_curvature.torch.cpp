#include "rl/capo_curvature.h"

#include <cmath>
#include <optional>

#include "rl/capo_tensors.h"

namespace gradops {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

CapoResults results(const Three& out) {
  return {std::get<0>(out).mutable_data_ptr(), std::get<1>(out).mutable_data_ptr(),
          std::get<2>(out).mutable_data_ptr()};
}
Three three(const Tensor& like, int64_t n, ScalarType real) {
  return {empty(like, {n}, real), empty(like, {n}, real), empty(like, {n}, real)};
}

Three capo_curvature(const Tensor& hidden, const Tensor& probs, const Tensor& action, const Tensor& advantages,
                     const std::optional<Tensor>& token_ids, const std::optional<Tensor>& exp_avg,
                     const std::optional<Tensor>& exp_avg_sq, double beta1, double beta2, double eps, int64_t step) {
  const Scope scope(hidden);
  const CapoInput in("capo_curvature", hidden, probs, action, advantages);
  CapoAdam adam{};
  std::optional<CapoRows> rows;
  if (token_ids.has_value()) {
    STD_TORCH_CHECK(exp_avg.has_value() && exp_avg_sq.has_value(), "capo_curvature: moments must come with token_ids");
    rows.emplace("capo_curvature", in, *token_ids, *exp_avg, *exp_avg_sq);
    const double c1 = 1 - std::pow(beta1, double(step) + 1), c2 = 1 - std::pow(beta2, double(step) + 1);
    adam = {rows->ids(),
            exp_avg->const_data_ptr(),
            exp_avg_sq->const_data_ptr(),
            exp_avg->size(0),
            beta1 / c1,
            (1 - beta1) / c1,
            beta2 / c2,
            (1 - beta2) / c2,
            eps};
  }
  Three out = three(hidden, hidden.size(0), in.real);
  backend::capo_curvature(in.tokens(), adam, results(out), scope.stream());
  return out;
}

Three capo_curvature_sgd(const Tensor& hidden_in, const Tensor& logp, const Tensor& sum_p2, const Tensor& sum_p3,
                         const Tensor& advantages) {
  const Scope scope(hidden_in);
  const ScalarType real = real_of(hidden_in);
  STD_TORCH_CHECK(hidden_in.dim() == 2, "capo_curvature_sgd: hidden must have 2 dimensions, got ", hidden_in.dim());
  const Tensor hidden = contiguous_of(hidden_in);
  const int64_t n = hidden.size(0);
  const auto column = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == n && x.scalar_type() == real, "capo_curvature_sgd: ", name,
                    " must have one number per token, of the dtype that goes with hidden");
    same_device(hidden, x, "capo_curvature_sgd: all tensors");
    return contiguous_of(x);
  };
  const Tensor l = column(logp, "logp"), p2 = column(sum_p2, "sum_p2"), p3 = column(sum_p3, "sum_p3"),
               a = column(advantages, "advantages");
  const CapoTokens tokens{hidden.const_data_ptr(),
                          nullptr,
                          nullptr,
                          a.const_data_ptr(),
                          element(hidden, "capo_curvature_sgd: hidden"),
                          n,
                          0,
                          hidden.size(1)};
  Three out = three(hidden, n, real);
  backend::capo_curvature_sgd(tokens, {l.const_data_ptr(), p2.const_data_ptr(), p3.const_data_ptr()}, results(out),
                              scope.stream());
  return out;
}

}  // namespace

GRADOPS_OP(capo_curvature,
           "capo_curvature(Tensor hidden, Tensor probs, Tensor action_index, Tensor advantages, Tensor? token_ids, "
           "Tensor? exp_avg, Tensor? exp_avg_sq, float beta1, float beta2, float eps, int step) "
           "-> (Tensor, Tensor, Tensor)")
GRADOPS_OP(capo_curvature_sgd,
           "capo_curvature_sgd(Tensor hidden, Tensor logp, Tensor sum_p2, Tensor sum_p3, Tensor advantages) "
           "-> (Tensor, Tensor, Tensor)")

}  // namespace gradops
