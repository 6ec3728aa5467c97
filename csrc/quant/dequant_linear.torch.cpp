#include "quant/dequant_linear.h"

#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

struct Packed {
  Tensor words, scales, zeros;
  std::optional<Tensor> g_idx;
  PackedWeight w;

  Packed(const char* op, const Tensor& like, const Tensor& qweight, const Tensor& scales_in, const Tensor& qzeros,
         const std::optional<Tensor>& g_idx_in, int64_t in, int64_t bits, int64_t group_size, bool less_one)
      : words(contiguous_of(qweight)), scales(contiguous_of(scales_in)), zeros(contiguous_of(qzeros)) {
    STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, op, ": bits must be 2, 3, 4 or 8, got ", bits);
    STD_TORCH_CHECK(words.dim() == 2 && scales.dim() == 2 && zeros.dim() == 2, op, ": the weight must be matrices");
    STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int && zeros.scalar_type() == ScalarType::Int, op,
                    ": qweight and qzeros must be int32");
    const int64_t groups = scales.size(0), out = scales.size(1);
    STD_TORCH_CHECK(in >= 0 && words.size(0) == (in * bits + 31) / 32 && words.size(1) == out, op,
                    ": qweight has the wrong shape");
    STD_TORCH_CHECK(zeros.size(0) == groups && zeros.size(1) == (out * bits + 31) / 32, op,
                    ": qzeros has the wrong shape");
    if (g_idx_in) {
      g_idx = contiguous_of(*g_idx_in);
      STD_TORCH_CHECK(g_idx->scalar_type() == ScalarType::Int && g_idx->dim() == 1 && g_idx->size(0) == in, op,
                      ": g_idx must be int32, one for each input");
      same_device(like, *g_idx, op);
    } else {
      STD_TORCH_CHECK(group_size >= 1, op, ": group_size must be positive, got ", group_size);
      STD_TORCH_CHECK(groups == (in + group_size - 1) / group_size, op, ": scales has the wrong shape");
    }
    STD_TORCH_CHECK(in == 0 || groups > 0, op, ": there must be a group");
    for (const Tensor* t : {&words, &scales, &zeros}) same_device(like, *t, op);
    w = {static_cast<const uint32_t*>(words.const_data_ptr()),
         static_cast<const uint32_t*>(zeros.const_data_ptr()),
         scales.const_data_ptr(),
         g_idx ? static_cast<const int32_t*>(g_idx->const_data_ptr()) : nullptr,
         in,
         out,
         groups,
         group_size,
         element(scales, "scales"),
         int(bits),
         int(less_one)};
  }
};

Tensor dequant_linear(const Tensor& x_in, const Tensor& qweight, const Tensor& scales, const Tensor& qzeros,
                      const std::optional<Tensor>& g_idx, const std::optional<Tensor>& bias_in, int64_t bits,
                      int64_t group_size, bool less_one) {
  STD_TORCH_CHECK(x_in.dim() >= 1, "dequant_linear: x must have at least 1 dimension");
  STD_TORCH_CHECK(x_in.scalar_type() != ScalarType::Double, "dequant_linear: x must not be float64");
  const Scope scope(x_in);
  const Tensor x = contiguous_of(x_in);
  const Packed packed("dequant_linear", x, qweight, scales, qzeros, g_idx, x.size(-1), bits, group_size, less_one);
  std::optional<Tensor> bias;
  if (bias_in) {
    bias = contiguous_of(*bias_in);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == packed.w.out, "dequant_linear: bias has the wrong shape");
    same_device(x, *bias, "dequant_linear");
  }
  std::vector<int64_t> shape(size_t(x.dim()));
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) shape[d] = x.size(int64_t(d)), rows *= shape[d];
  shape.back() = packed.w.out;
  Tensor y = empty(x, shape, x.scalar_type());
  const DequantLinearTask task{
      packed.w, x.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,     y.mutable_data_ptr(),
      rows,     element(x, "x"),    bias ? element(*bias, "bias") : Element::f32};
  const Workspace workspace(x, backend::dequant_linear_workspace(task));
  backend::dequant_linear(task, workspace.data(), scope.stream());
  return y;
}

// like: of the dtype that is wanted.
Tensor dequant_weight(const Tensor& like, const Tensor& qweight, const Tensor& scales, const Tensor& qzeros,
                      const std::optional<Tensor>& g_idx, int64_t in, int64_t bits, int64_t group_size, bool less_one) {
  const Scope scope(qweight);
  const Packed packed("dequant_weight", like, qweight, scales, qzeros, g_idx, in, bits, group_size, less_one);
  Tensor out = empty(like, {in, packed.w.out}, like.scalar_type());
  backend::dequant_weight({packed.w, out.mutable_data_ptr(), element(like, "like")}, scope.stream());
  return out;
}

}  // namespace

GRADOPS_OP(dequant_linear,
           "dequant_linear(Tensor x, Tensor qweight, Tensor scales, Tensor qzeros, Tensor? g_idx, Tensor? bias, "
           "int bits, int group_size, bool less_one) -> Tensor")
GRADOPS_OP(dequant_weight,
           "dequant_weight(Tensor like, Tensor qweight, Tensor scales, Tensor qzeros, Tensor? g_idx, int inputs, "
           "int bits, int group_size, bool less_one) -> Tensor")

}  // namespace gradops
