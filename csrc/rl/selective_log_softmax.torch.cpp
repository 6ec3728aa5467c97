#include "rl/selective_log_softmax.h"

#include <optional>

#include "common/kept_result.h"

namespace gradops {
namespace {

using Shape = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;

Shape shape_of(const Tensor& x, int64_t dims) {
  Shape shape(static_cast<size_t>(dims));
  for (int64_t i = 0; i < dims; ++i) shape[size_t(i)] = x.size(i);
  return shape;
}

// x as the kernels read it: on the device of logits, of this type, with these sizes in front (and one more, if `inner`)
Tensor checked(const Tensor& x, const Tensor& logits, const Shape& rows, bool inner, ScalarType type,
               const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type, "selective_log_softmax: ", name, " must be ",
                  type == ScalarType::Long ? "int64" : "float64");
  STD_TORCH_CHECK(x.dim() == int64_t(rows.size()) + inner && shape_of(x, int64_t(rows.size())) == rows,
                  "selective_log_softmax: ", name, " must have the leading sizes of logits",
                  inner ? " and one dimension more" : "");
  same_device(logits, x, "selective_log_softmax: all tensors");
  return contiguous_of(x);
}

const double* doubles(const Maybe& x) { return x ? static_cast<const double*>(x->const_data_ptr()) : nullptr; }
const int64_t* integers(const Maybe& x) { return x ? static_cast<const int64_t*>(x->const_data_ptr()) : nullptr; }

struct Inputs {
  Tensor logits, index;
  Maybe keep_ids, keep_offsets;
  Shape rows_shape;
  int64_t rows = 1, cols, targets, kept = 0;
  double temperature, softcap;

  Inputs(const Tensor& logits_in, const Tensor& index_in, const Maybe& ids, const Maybe& offsets, double temperature,
         double softcap)
      : logits(logits_in), index(index_in), temperature(temperature), softcap(softcap) {
    STD_TORCH_CHECK(logits.dim() >= 1, "selective_log_softmax: logits must have at least 1 dimension");
    STD_TORCH_CHECK(temperature > 0 && softcap >= 0,
                    "selective_log_softmax: temperature must be positive, softcap positive or 0");
    rows_shape = shape_of(logits, logits.dim() - 1);
    logits = contiguous_of(logits);
    index = checked(index, logits, rows_shape, true, ScalarType::Long, "index");
    for (const int64_t n : rows_shape) rows *= n;
    cols = logits.size(-1), targets = index.size(-1);
    STD_TORCH_CHECK(bool(ids) == bool(offsets), "selective_log_softmax: keep_ids and keep_offsets go together");
    if (!ids) return;
    keep_ids = checked(*ids, logits, {}, true, ScalarType::Long, "keep_ids");
    keep_offsets = checked(*offsets, logits, {}, true, ScalarType::Long, "keep_offsets");
    STD_TORCH_CHECK(offsets->numel() == rows + 1, "selective_log_softmax: keep_offsets must have ", rows + 1,
                    " entries, one more than rows of logits, got ", offsets->numel());
    kept = ids->numel();
  }
  LogSoftmaxInputs pointers() const {
    return {logits.const_data_ptr(),
            element(logits, "selective_log_softmax: logits"),
            rows,
            cols,
            targets,
            integers(index),
            integers(keep_ids),
            integers(keep_offsets),
            kept,
            temperature,
            softcap};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> selective_log_softmax(const Tensor& logits, const Tensor& index,
                                                                         const Maybe& keep_ids,
                                                                         const Maybe& keep_offsets, double temperature,
                                                                         double softcap, bool entropy, bool moments,
                                                                         bool partial) {
  const Scope scope(logits);
  const Inputs in(logits, index, keep_ids, keep_offsets, temperature, softcap);
  const auto output = [&](bool wanted, int64_t inner) {
    Shape shape = in.rows_shape;
    if (inner >= 0) shape.push_back(inner);
    if (!wanted) shape.push_back(0);
    return empty(in.logits, shape, ScalarType::Double);
  };
  Tensor logp = output(true, in.targets), lse = output(true, -1), h = output(entropy, -1), p2 = output(moments, -1),
         p3 = output(moments, -1);
  const auto at = [](Tensor& x, bool wanted) { return wanted ? static_cast<double*>(x.mutable_data_ptr()) : nullptr; };
  const LogSoftmaxTask task{in.pointers(),  partial,         at(logp, true), at(lse, true),
                            at(h, entropy), at(p2, moments), at(p3, moments)};
  if (in.rows > 0) {
    const Workspace memory(in.logits, backend::selective_log_softmax_workspace(task));
    backend::selective_log_softmax(task, memory.data(), scope.stream());
  }
  return {logp, lse, h, p2, p3};
}

// Writes the gradient over `out`, which may be in.logits.
void backward(const Inputs& in, Tensor& out, const Tensor& lse, const Maybe& entropy, const Maybe& grad_logp,
              const Maybe& grad_lse, const Maybe& grad_entropy, void* stream) {
  const auto take = [&](const Maybe& x, bool inner, const char* name) {
    return x ? Maybe(checked(*x, in.logits, in.rows_shape, inner, ScalarType::Double, name)) : x;
  };
  const Maybe l = take(lse, false, "lse"), h = take(entropy, false, "entropy"),
              g_logp = take(grad_logp, true, "grad_logp"), g_lse = take(grad_lse, false, "grad_lse"),
              g_entropy = take(grad_entropy, false, "grad_entropy");
  STD_TORCH_CHECK(!g_logp || g_logp->size(-1) == in.targets,
                  "selective_log_softmax: grad_logp must have the shape of index");
  STD_TORCH_CHECK(!g_entropy || h, "selective_log_softmax: grad_entropy needs entropy");
  const LogSoftmaxGradTask task{in.pointers(),   out.mutable_data_ptr(), doubles(l),        doubles(h),
                                doubles(g_logp), doubles(g_lse),         doubles(g_entropy)};
  if (in.rows == 0) return;
  const Workspace memory(in.logits, backend::selective_log_softmax_backward_workspace(task));
  backend::selective_log_softmax_backward(task, memory.data(), stream);
}

Tensor selective_log_softmax_backward(const Tensor& logits, const Tensor& index, const Maybe& keep_ids,
                                      const Maybe& keep_offsets, const Tensor& lse, const Maybe& entropy,
                                      const Maybe& grad_logp, const Maybe& grad_lse, const Maybe& grad_entropy,
                                      double temperature, double softcap) {
  const Scope scope(logits);
  const Inputs in(logits, index, keep_ids, keep_offsets, temperature, softcap);
  Tensor out = new_result_like(in.logits);
  backward(in, out, lse, entropy, grad_logp, grad_lse, grad_entropy, scope.stream());
  return out;
}

void selective_log_softmax_backward_(Tensor logits, const Tensor& index, const Maybe& keep_ids,
                                     const Maybe& keep_offsets, const Tensor& lse, const Maybe& entropy,
                                     const Maybe& grad_logp, const Maybe& grad_lse, const Maybe& grad_entropy,
                                     double temperature, double softcap) {
  STD_TORCH_CHECK(logits.is_contiguous(), "selective_log_softmax_backward_: logits must be contiguous");
  const Scope scope(logits);
  const Inputs in(logits, index, keep_ids, keep_offsets, temperature, softcap);
  backward(in, logits, lse, entropy, grad_logp, grad_lse, grad_entropy, scope.stream());
}

}  // namespace

// All results are float64. What is not wanted comes back with a last size of 0.
GRADOPS_OP(selective_log_softmax,
           "selective_log_softmax(Tensor logits, Tensor index, Tensor? keep_ids, Tensor? keep_offsets, "
           "float temperature, float softcap, bool entropy, bool moments, bool partial) "
           "-> (Tensor logp, Tensor lse, Tensor entropy, Tensor sum_p2, Tensor sum_p3)")
GRADOPS_OP(selective_log_softmax_backward,
           "selective_log_softmax_backward(Tensor logits, Tensor index, Tensor? keep_ids, Tensor? keep_offsets, "
           "Tensor lse, Tensor? entropy, Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, "
           "float temperature, float softcap) -> Tensor")
GRADOPS_OP(selective_log_softmax_backward_,
           "selective_log_softmax_backward_(Tensor(a!) logits, Tensor index, Tensor? keep_ids, Tensor? keep_offsets, "
           "Tensor lse, Tensor? entropy, Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, "
           "float temperature, float softcap) -> ()")

}  // namespace gradops
