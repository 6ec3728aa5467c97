#include "quant/gptq_block.h"

#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

using Maybe = std::optional<Tensor>;

struct Batch {
  const Tensor& like;
  std::vector<int64_t> lead;
  int64_t items = 1;
  explicit Batch(const Tensor& w) : like(w) {
    for (int64_t d = 0; d + 2 < w.dim(); ++d) lead.push_back(w.size(d)), items *= w.size(d);
  }
  std::vector<int64_t> shape(std::vector<int64_t> tail) const {
    tail.insert(tail.begin(), lead.begin(), lead.end());
    return tail;
  }
  void check(const Tensor& x, const char* name, std::vector<int64_t> tail, ScalarType type) const {
    STD_TORCH_CHECK(x.scalar_type() == type, "gptq_block: ", name, " has the wrong dtype");
    const std::vector<int64_t> want = shape(std::move(tail));
    bool same = x.dim() == int64_t(want.size());
    for (size_t d = 0; same && d < want.size(); ++d) same = x.size(int64_t(d)) == want[d];
    STD_TORCH_CHECK(same, "gptq_block: ", name, " has the wrong shape");
    same_device(x, like, "gptq_block: all tensors");
  }
};

// x itself where its rows lie at fixed distances, else a copy, which `kept` keeps alive.
Plane plane(const Tensor& x, std::vector<Tensor>& kept) {
  const bool direct = x.dim() <= 3 && (x.size(-1) <= 1 || x.stride(-1) == 1);
  kept.push_back(direct ? x : contiguous_of(x));
  const Tensor& t = kept.back();
  const int64_t rows = t.size(-2), cols = t.size(-1);
  return {static_cast<const float*>(t.const_data_ptr()), direct ? (x.dim() == 3 ? x.stride(0) : 0) : rows * cols,
          direct ? x.stride(-2) : cols};
}

// The rows of a result, which must lie at fixed distances.
template <class T>
ResultPlane<T> rows_of(const Tensor& x) {
  const int64_t rows = x.size(-2), cols = x.size(-1);
  STD_TORCH_CHECK((cols <= 1 || x.stride(-1) == 1) && (x.dim() <= 3 || x.is_contiguous()),
                  "gptq_block_: the columns of a result must lie side by side");
  T* const data = static_cast<T*>(x.mutable_data_ptr());
  if (x.dim() > 3) return {data, rows * cols, cols};
  return {data, x.dim() == 3 ? x.stride(0) : 0, x.stride(-2)};
}

void gptq_block_(Tensor codes, Tensor q, Maybe e, Maybe latent, Maybe scales, Maybe zeros, Tensor loss, const Tensor& w,
                 Maybe u, Maybe original, Maybe pull, Maybe scale, Maybe zero, Maybe group, Maybe unit,
                 int64_t group_size, int64_t bits, bool symmetric, bool one_sided, double mse, int64_t grid,
                 int64_t scale_type, double beta, bool pull_first, bool latent_rounded) {
  STD_TORCH_CHECK(w.dim() >= 2, "gptq_block: w must have at least 2 dimensions, got ", w.dim());
  const Batch batch(w);
  const int64_t rows = w.size(-2), cols = w.size(-1);
  batch.check(w, "w", {rows, cols}, ScalarType::Float);
  STD_TORCH_CHECK(group_size >= 1, "gptq_block: group_size must be positive, got ", group_size);
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "gptq_block: bits must be 2 to 8, got ", bits);
  STD_TORCH_CHECK(grid >= 0 && grid <= 2, "gptq_block: grid must be 0, 1 or 2, got ", grid);
  STD_TORCH_CHECK(scale_type >= 0 && scale_type <= 2, "gptq_block: scale_type must be 0, 1 or 2, got ", scale_type);
  STD_TORCH_CHECK(!u || cols <= kMostGptqColumns, "gptq_block: w has more than ", kMostGptqColumns, " columns");
  STD_TORCH_CHECK(u || (!original && !pull && !e), "gptq_block: original, pull and e go with u");
  STD_TORCH_CHECK(bool(pull) == bool(latent), "gptq_block: pull and latent go together");
  STD_TORCH_CHECK(bool(scale) == bool(zero) && bool(scale) == bool(group),
                  "gptq_block: scale, zero and group go together");
  STD_TORCH_CHECK(bool(scales) == bool(zeros) && bool(scales) != bool(scale), "gptq_block: scales are given or found");
  const int64_t groups = scale ? scale->size(-1) : (cols + group_size - 1) / group_size;
  if (u) batch.check(*u, "u", {cols, cols}, ScalarType::Float);
  if (original) batch.check(*original, "original", {rows, cols}, ScalarType::Float);
  if (pull) batch.check(*pull, "pull", {cols, cols}, ScalarType::Float);
  if (scale) {
    batch.check(*scale, "scale", {rows, groups}, ScalarType::Float);
    batch.check(*zero, "zero", {rows, groups}, ScalarType::Float);
    batch.check(*group, "group", {cols}, ScalarType::Long);
  }
  if (unit) batch.check(*unit, "unit", {}, ScalarType::Float);
  batch.check(codes, "codes", {rows, cols}, ScalarType::Byte);
  batch.check(q, "q", {rows, cols}, ScalarType::Float);
  if (e) batch.check(*e, "e", {rows, cols}, ScalarType::Float);
  if (latent) batch.check(*latent, "latent", {rows, cols}, ScalarType::Float);
  if (scales) batch.check(*scales, "scales", {rows, groups}, ScalarType::Float);
  if (zeros) batch.check(*zeros, "zeros", {rows, groups}, ScalarType::Float);
  batch.check(loss, "loss", {rows}, ScalarType::Float);
  STD_TORCH_CHECK(loss.is_contiguous(), "gptq_block_: loss must be contiguous");

  const Scope scope(w);
  std::vector<Tensor> kept;
  kept.reserve(8);
  const auto plane_of = [&](const Maybe& x) { return x ? plane(*x, kept) : Plane(); };
  const auto floats = [](const Maybe& x) { return x ? rows_of<float>(*x) : ResultPlane<float>(); };
  GptqBlock t;
  t.w = plane(w, kept), t.u = plane_of(u), t.original = plane_of(original), t.pull = plane_of(pull);
  t.scale_in = plane_of(scale), t.zero_in = plane_of(zero);
  if (group) {
    kept.push_back(contiguous_of(*group));
    t.group = static_cast<const int64_t*>(kept.back().const_data_ptr());
  }
  if (unit) {
    kept.push_back(contiguous_of(*unit));
    t.unit = static_cast<const float*>(kept.back().const_data_ptr());
  }
  t.batch = batch.items, t.rows = rows, t.cols = cols, t.groups = groups, t.group_size = group_size;
  t.grid = {Grid(grid), ScaleType(scale_type), float((1 << bits) - 1), symmetric, one_sided, float(mse)};
  t.beta = float(beta), t.pull_first = pull_first, t.latent_rounded = latent_rounded;
  t.codes = rows_of<uint8_t>(codes), t.q = floats(q), t.e = floats(e), t.latent = floats(latent);
  t.scale = floats(scales), t.zero = floats(zeros), t.loss = static_cast<float*>(loss.mutable_data_ptr());
  backend::gptq_block(t, scope.stream());
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result gptq_block(const Tensor& w, Maybe u, Maybe original, Maybe pull, Maybe scale, Maybe zero, Maybe group,
                  Maybe unit, int64_t group_size, int64_t bits, bool symmetric, bool one_sided, double mse,
                  int64_t grid, int64_t scale_type, double beta, bool pull_first, bool latent_rounded) {
  STD_TORCH_CHECK(w.dim() >= 2, "gptq_block: w must have at least 2 dimensions, got ", w.dim());
  STD_TORCH_CHECK(group_size >= 1, "gptq_block: group_size must be positive, got ", group_size);
  const Batch batch(w);
  const int64_t rows = w.size(-2), cols = w.size(-1), groups = scale ? 0 : (cols + group_size - 1) / group_size;
  const auto out = [&](int64_t width, ScalarType type) { return empty(w, batch.shape({rows, width}), type); };
  const auto wanted = [](const Tensor& x, bool wanted) { return wanted ? Maybe(x) : Maybe(); };
  const Tensor codes = out(cols, ScalarType::Byte), q = out(cols, ScalarType::Float);
  const Tensor e = out(u ? cols : 0, ScalarType::Float), latent = out(pull ? cols : 0, ScalarType::Float);
  const Tensor scales = out(groups, ScalarType::Float), zeros = out(groups, ScalarType::Float);
  const Tensor loss = empty(w, batch.shape({rows}), ScalarType::Float);
  gptq_block_(codes, q, wanted(e, bool(u)), wanted(latent, bool(pull)), wanted(scales, !scale), wanted(zeros, !scale),
              loss, w, u, original, pull, scale, zero, group, unit, group_size, bits, symmetric, one_sided, mse, grid,
              scale_type, beta, pull_first, latent_rounded);
  return {codes, q, e, latent, scales, zeros, loss};
}

}  // namespace

GRADOPS_OP(
    gptq_block,
    "gptq_block(Tensor w, Tensor? u, Tensor? original, Tensor? pull, Tensor? scale, Tensor? zero, "
    "Tensor? group, Tensor? unit, int group_size, int bits, bool symmetric, bool one_sided, float mse, int grid, "
    "int scale_type, float beta, bool pull_first, bool latent_rounded) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
GRADOPS_OP(
    gptq_block_,
    "gptq_block_(Tensor(a!) codes, Tensor(b!) q, Tensor(c!)? e, Tensor(d!)? latent, Tensor(e!)? scales, "
    "Tensor(f!)? zeros, Tensor(g!) loss, Tensor w, Tensor? u, Tensor? original, Tensor? pull, Tensor? scale, "
    "Tensor? zero, Tensor? group, Tensor? unit, int group_size, int bits, bool symmetric, bool one_sided, float mse, "
    "int grid, int scale_type, float beta, bool pull_first, bool latent_rounded) -> ()")

}  // namespace gradops
