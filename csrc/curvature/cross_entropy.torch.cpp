#include "curvature/cross_entropy.h"

#include <optional>

#include "common/kept_result.h"

namespace gradops {
namespace {

using Maybe = std::optional<Tensor>;

// x as the kernels read it: on z's device, of this type, with the sizes of z or, if !whole, those in front
Tensor checked(const Tensor& x, const Tensor& z, bool whole, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type, "cross_entropy: ", name,
                  " must have the type of z, or be int64 (target) or ", "float64 (numbers of rows)");
  bool fits = x.dim() == z.dim() - !whole;
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == z.size(i);
  STD_TORCH_CHECK(fits, "cross_entropy: ", name, " must have the shape of z",
                  whole ? "" : " but for its last dimension");
  same_device(z, x, "cross_entropy: all tensors");
  return contiguous_of(x);
}
Tensor per_row(const Tensor& x, const Tensor& z, const char* name) {
  return checked(x, z, false, ScalarType::Double, name);
}
const double* doubles(const Maybe& x) { return x ? static_cast<const double*>(x->const_data_ptr()) : nullptr; }

struct Rows {
  Tensor z;
  Maybe u;
  int64_t cols, rows;

  Rows(const Tensor& z_in, const Maybe& u_in, const char* name) : z(z_in) {
    STD_TORCH_CHECK(z.dim() >= 1 && z.size(-1) >= 1, "cross_entropy: z must have entries in its last dimension");
    z = contiguous_of(z);
    if (u_in) u = checked(*u_in, z, true, z.scalar_type(), name);
    cols = z.size(-1), rows = z.numel() / cols;
  }
  Tensor row_numbers() const {
    std::vector<int64_t> shape(size_t(z.dim() - 1));
    for (size_t i = 0; i < shape.size(); ++i) shape[i] = z.size(int64_t(i));
    return empty(z, shape, ScalarType::Double);
  }
  const void* change() const { return u ? u->const_data_ptr() : nullptr; }
  Element type() const { return element(z, "cross_entropy: z"); }
};

struct Losses : Rows {
  Tensor target;
  int64_t ignore_index;
  double label_smoothing;

  Losses(const Tensor& z_in, const Maybe& z_dot, const Tensor& target_in, int64_t ignore_index, double label_smoothing)
      : Rows(z_in, z_dot, "z_dot"),
        target(checked(target_in, z, false, ScalarType::Long, "target")),
        ignore_index(ignore_index),
        label_smoothing(label_smoothing) {}
  CrossEntropyRows pointers() const {
    return {
        z.const_data_ptr(), change(),       type(), rows, cols, static_cast<const int64_t*>(target.const_data_ptr()),
        ignore_index,       label_smoothing};
  }
};

std::tuple<Tensor, Tensor> sums(const Losses& in, const Maybe& known_lse, void* stream) {
  Tensor loss = in.row_numbers(), lse = in.row_numbers();
  const CrossEntropySums task{in.pointers(), doubles(known_lse), static_cast<double*>(loss.mutable_data_ptr()),
                              static_cast<double*>(lse.mutable_data_ptr())};
  if (in.rows > 0) backend::cross_entropy(task, stream);
  return {loss, lse};
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& z, const Tensor& target, int64_t ignore_index,
                                         double label_smoothing) {
  const Scope scope(z);
  return sums(Losses(z, std::nullopt, target, ignore_index, label_smoothing), std::nullopt, scope.stream());
}

std::tuple<Tensor, Tensor> cross_entropy_jvp(const Tensor& z, const Tensor& target, const Tensor& z_dot,
                                             const Tensor& lse, int64_t ignore_index, double label_smoothing) {
  const Scope scope(z);
  const Losses in(z, z_dot, target, ignore_index, label_smoothing);
  return sums(in, per_row(lse, in.z, "lse"), scope.stream());
}

void backward(const Losses& in, const Tensor& lse_in, Tensor& out, const Tensor& g_in, void* stream) {
  const Tensor lse = per_row(lse_in, in.z, "lse"), g = per_row(g_in, in.z, "g");
  const CrossEntropyGrad task{in.pointers(), doubles(lse), nullptr, nullptr, doubles(g), out.mutable_data_ptr()};
  if (in.rows > 0) backend::cross_entropy_backward(task, stream);
}

Tensor cross_entropy_backward(const Tensor& z, const Tensor& target, const Tensor& lse, const Tensor& g,
                              int64_t ignore_index, double label_smoothing) {
  const Scope scope(z);
  const Losses in(z, std::nullopt, target, ignore_index, label_smoothing);
  Tensor out = new_result_like(in.z);
  backward(in, lse, out, g, scope.stream());
  return out;
}

void cross_entropy_backward_(Tensor z, const Tensor& target, const Tensor& lse, const Tensor& g, int64_t ignore_index,
                             double label_smoothing) {
  STD_TORCH_CHECK(z.is_contiguous(), "cross_entropy_backward_: z must be contiguous");
  const Scope scope(z);
  backward(Losses(z, std::nullopt, target, ignore_index, label_smoothing), lse, z, g, scope.stream());
}

void backward_jvp(const Losses& in, const Tensor& lse_in, const Tensor& lse_dot_in, Tensor& out, const Tensor& g_in,
                  const Maybe& g_dot_in, void* stream) {
  const Tensor lse = per_row(lse_in, in.z, "lse"), lse_dot = per_row(lse_dot_in, in.z, "lse_dot"),
               g = per_row(g_in, in.z, "g");
  const Maybe g_dot = g_dot_in ? Maybe(per_row(*g_dot_in, in.z, "g_dot")) : std::nullopt;
  const CrossEntropyGrad task{in.pointers(), doubles(lse),   doubles(lse_dot),
                              doubles(g),    doubles(g_dot), out.mutable_data_ptr()};
  if (in.rows > 0) backend::cross_entropy_backward(task, stream);
}

Tensor cross_entropy_backward_jvp(const Tensor& z, const Tensor& target, const Tensor& z_dot, const Tensor& lse,
                                  const Tensor& lse_dot, const Tensor& g, const Maybe& g_dot, int64_t ignore_index,
                                  double label_smoothing) {
  const Scope scope(z);
  const Losses in(z, z_dot, target, ignore_index, label_smoothing);
  Tensor out = new_result_like(in.z);
  backward_jvp(in, lse, lse_dot, out, g, g_dot, scope.stream());
  return out;
}

void cross_entropy_backward_jvp_(const Tensor& z, const Tensor& target, Tensor z_dot, const Tensor& lse,
                                 const Tensor& lse_dot, const Tensor& g, const Maybe& g_dot, int64_t ignore_index,
                                 double label_smoothing) {
  STD_TORCH_CHECK(z_dot.is_contiguous(), "cross_entropy_backward_jvp_: z_dot must be contiguous");
  const Scope scope(z);
  const Losses in(z, z_dot, target, ignore_index, label_smoothing);
  backward_jvp(in, lse, lse_dot, z_dot, g, g_dot, scope.stream());
}

void product(const Rows& in, const Tensor& scale_in, Tensor& out, void* stream) {
  const Tensor scale = per_row(scale_in, in.z, "scale");
  const SoftmaxCeHvp task{in.z.const_data_ptr(), in.change(),           in.type(), in.rows, in.cols,
                          doubles(scale),        out.mutable_data_ptr()};
  if (in.rows > 0) backend::softmax_ce_hvp(task, stream);
}

Tensor softmax_ce_hvp(const Tensor& z, const Tensor& u, const Tensor& scale) {
  const Scope scope(z);
  const Rows in(z, u, "u");
  Tensor out = new_result_like(in.z);
  product(in, scale, out, scope.stream());
  return out;
}

void softmax_ce_hvp_out(const Tensor& z, const Tensor& u, const Tensor& scale, Tensor out) {
  STD_TORCH_CHECK(out.is_contiguous(), "softmax_ce_hvp_out: out must be contiguous");
  const Scope scope(z);
  const Rows in(z, u, "u");
  checked(out, in.z, true, in.z.scalar_type(), "out");
  product(in, scale, out, scope.stream());
}

}  // namespace

// Numbers of rows are float64. Of the ones that end in `_`, the first writes over z, the other over z_dot.
GRADOPS_OP(
    cross_entropy,
    "cross_entropy(Tensor z, Tensor target, int ignore_index, float label_smoothing) -> (Tensor loss, Tensor lse)")
GRADOPS_OP(
    cross_entropy_jvp,
    "cross_entropy_jvp(Tensor z, Tensor target, Tensor z_dot, Tensor lse, int ignore_index, float label_smoothing) "
    "-> (Tensor loss_dot, Tensor lse_dot)")
GRADOPS_OP(cross_entropy_backward,
           "cross_entropy_backward(Tensor z, Tensor target, Tensor lse, Tensor g, int ignore_index, "
           "float label_smoothing) -> Tensor")
GRADOPS_OP(cross_entropy_backward_,
           "cross_entropy_backward_(Tensor(a!) z, Tensor target, Tensor lse, Tensor g, int ignore_index, "
           "float label_smoothing) -> ()")
GRADOPS_OP(cross_entropy_backward_jvp,
           "cross_entropy_backward_jvp(Tensor z, Tensor target, Tensor z_dot, Tensor lse, Tensor lse_dot, Tensor g, "
           "Tensor? g_dot, int ignore_index, float label_smoothing) -> Tensor")
GRADOPS_OP(
    cross_entropy_backward_jvp_,
    "cross_entropy_backward_jvp_(Tensor z, Tensor target, Tensor(a!) z_dot, Tensor lse, Tensor lse_dot, Tensor g, "
    "Tensor? g_dot, int ignore_index, float label_smoothing) -> ()")
GRADOPS_OP(softmax_ce_hvp, "softmax_ce_hvp(Tensor z, Tensor u, Tensor scale) -> Tensor")
GRADOPS_OP(softmax_ce_hvp_out, "softmax_ce_hvp_out(Tensor z, Tensor u, Tensor scale, Tensor(a!) out) -> ()")

}  // namespace gradops
