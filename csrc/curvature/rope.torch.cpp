#include "curvature/rope.h"

#include "common/kept_result.h"

namespace gradops {
namespace {

// With the numbers of a row next to one another
Tensor lines(const Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : contiguous_of(x); }

Tensor rope(const Tensor& x_in, const Tensor& cos_in, const Tensor& sin_in, bool interleaved, bool inverse) {
  const int64_t leading = x_in.dim() - 1;
  STD_TORCH_CHECK(leading >= 0 && cos_in.dim() == x_in.dim() && sin_in.dim() == x_in.dim(),
                  "rope: cos and sin must have the dimensions of x, and at least 1");
  for (int64_t i = 0; i < leading; ++i)
    STD_TORCH_CHECK(cos_in.size(i) == x_in.size(i) && sin_in.size(i) == x_in.size(i),
                    "rope: cos and sin must have the sizes of x but for the last");
  STD_TORCH_CHECK(sin_in.size(-1) == cos_in.size(-1) && 2 * cos_in.size(-1) <= x_in.size(-1),
                  "rope: cos and sin must have one number for each pair of a row of x");
  same_device(x_in, cos_in, "rope: x and cos");
  same_device(x_in, sin_in, "rope: x and sin");
  const Tensor x = lines(x_in), cos = lines(cos_in), sin = lines(sin_in);
  Tensor y = new_result_like(x);
  RopeTask t{};
  t.element = element(x, "rope: x");
  t.table = element(cos, "rope: cos");
  STD_TORCH_CHECK(sin.scalar_type() == cos.scalar_type(), "rope: sin must have the dtype of cos");
  STD_TORCH_CHECK(t.table == t.element || t.table == (t.element == Element::f64 ? Element::f64 : Element::f32),
                  "rope: cos must have the dtype of x, or float32");
  t.cols = x.size(-1);
  t.pairs = cos.size(-1);
  t.rows = t.cols ? x.numel() / t.cols : 0;
  t.interleaved = interleaved;
  t.inverse = inverse;
  if (t.rows == 0) return y;
  for (int64_t i = 0; i < leading; ++i) {
    const RopeDim d{x.size(i), x.stride(i), cos.stride(i), sin.stride(i)};
    if (d.size == 1) continue;
    RopeDim& last = t.dim[t.dims > 0 ? t.dims - 1 : 0];
    if (t.dims > 0 && last.x == d.size * d.x && last.cos == d.size * d.cos && last.sin == d.size * d.sin) {
      last = {last.size * d.size, d.x, d.cos, d.sin};
      continue;
    }
    STD_TORCH_CHECK(t.dims < kRopeDims, "rope: x has too many dimensions");
    t.dim[t.dims++] = d;
  }
  t.x = x.const_data_ptr();
  t.cos = cos.const_data_ptr();
  t.sin = sin.const_data_ptr();
  t.y = y.mutable_data_ptr();
  const Scope scope(x);
  backend::rope(t, scope.stream());
  return y;
}

}  // namespace

GRADOPS_OP(rope, "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor")

}  // namespace gradops
