#include "quant/dequant_linear.h"

#include <string>
#include <vector>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {
namespace {

int64_t padded_inputs(const PackedWeight& w) {
  const int64_t unit = unit_inputs(w.bits);
  return (w.in + unit - 1) / unit * unit;
}

// The group of each input; the places beyond the last belong to its group.
std::vector<int32_t> groups_of(const PackedWeight& w) {
  std::vector<int32_t> group(size_t(padded_inputs(w)));
  for (int64_t i = 0; i < w.in; ++i) group[size_t(i)] = w.g_idx ? w.g_idx[i] : int32_t(i / w.group_size);
  for (int64_t i = 0; i < w.in; ++i)
    if (group[size_t(i)] < 0 || group[size_t(i)] >= w.groups)
      refuse_value("g_idx", "be 0 to " + std::to_string(w.groups - 1), int64_t(group[size_t(i)]));
  for (size_t i = size_t(w.in); i < group.size(); ++i) group[i] = group[size_t(w.in) - 1];
  return group;
}

std::vector<InputRun> runs_of(const PackedWeight& w, const std::vector<int32_t>& group) {
  const int64_t unit = unit_inputs(w.bits), most = kDequantTerms / unit;
  std::vector<InputRun> runs;
  for (int64_t u = 0; u * unit < int64_t(group.size()); ++u) {
    const int32_t* g = group.data() + u * unit;
    bool same = true;
    for (int64_t i = 1; i < unit; ++i) same &= g[i] == g[0];
    const int32_t one = same ? g[0] : -1;
    if (runs.empty() || runs.back().group != one || runs.back().units == most)
      runs.push_back({u, 1, one});
    else
      ++runs.back().units;
  }
  return runs;
}

}  // namespace

int64_t cpu::dequant_linear_workspace(const DequantLinearTask& t) {
  return 4 * ((t.rows + 7) / 8 * 8) * padded_inputs(t.w);
}

void cpu::dequant_linear(const DequantLinearTask& t, void* workspace, void*) {
  if (t.rows == 0 || t.w.out == 0) return;
  const std::vector<int32_t> group = groups_of(t.w);
  const std::vector<InputRun> runs = runs_of(t.w, group);
  float* x = static_cast<float*>(workspace);
  DequantPlan plan{group.data(), runs.data(), int64_t(runs.size()), false, int64_t(group.size()), x};
  for (const InputRun& run : runs) plan.mixed |= run.group < 0;
  using Arrange = void (*)(const DequantLinearTask&, int64_t, int64_t, int64_t, float*);
  using Multiply = void (*)(const DequantLinearTask&, const DequantPlan&, int64_t, int64_t, char*);
  Arrange arrange = GRADOPS_DISPATCH(dequant_arrange);
  Multiply multiply = GRADOPS_DISPATCH(dequant_linear_tiles);
  const Multiply pairs = GRADOPS_DISPATCH_BF16(dequant_linear_tiles_bf16);
  if (pairs && t.type == Element::bf16 && !plan.mixed && (t.w.bits == 2 || t.w.bits == 4))
    multiply = pairs, arrange = GRADOPS_DISPATCH_BF16(dequant_arrange_bf16);
  parallel_for(0, (t.rows + 7) / 8, 32768 / (8 * plan.inputs + 1) + 1,
               [&](int64_t b, int64_t e) { arrange(t, 8 * b, 8 * e < t.rows ? 8 * e : t.rows, plan.inputs, x); });
  const int64_t bytes = GRADOPS_DISPATCH(dequant_scratch)(t.w, t.rows);
  const int64_t tiles =
      (t.rows + kDequantRows - 1) / kDequantRows * ((t.w.out + kDequantColumns - 1) / kDequantColumns);
  const int64_t work = plan.inputs * kDequantColumns * (t.rows < kDequantRows ? t.rows : kDequantRows);
  parallel_for(0, tiles, (1 << 18) / (work + 1) + 1,
               [&](int64_t b, int64_t e) { multiply(t, plan, b, e, thread_scratch(bytes)); });
}

void cpu::dequant_weight(const DequantWeightTask& t, void*) {
  if (t.w.in == 0 || t.w.out == 0) return;
  const std::vector<int32_t> group = groups_of(t.w);
  prefer_huge_pages(t.to, t.w.in * t.w.out * element_size(t.type));
  const auto run = GRADOPS_DISPATCH(dequant_weight_tiles);
  const int64_t bytes = GRADOPS_DISPATCH(dequant_scratch)(t.w, 1);
  parallel_for(0, (t.w.out + kDequantColumns - 1) / kDequantColumns, 32768 / (t.w.in * kDequantColumns) + 1,
               [&](int64_t b, int64_t e) { run(t, group.data(), b, e, thread_scratch(bytes)); });
}

}  // namespace gradops
