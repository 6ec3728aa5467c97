#include "rl/group_advantages.h"

#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

using Maybe = std::optional<Tensor>;

// An optional 1-D tensor of a given type, made contiguous; keeps it alive.
template <class T>
struct Column {
  std::optional<Tensor> kept;  // an undefined Tensor is memory as well
  const T* data = nullptr;
  int64_t size = 0;
  Column(const Maybe& t, ScalarType type, const Tensor& like, const char* name) {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->scalar_type() == type, name, " must be 1-D, of the type in the schema");
    same_device(like, *t, name);
    kept = contiguous_of(*t);
    static const T nothing{};
    size = kept->size(0);
    data = size ? static_cast<const T*>(kept->const_data_ptr()) : &nothing;  // an empty one is given all the same
  }
};

struct Columns {
  Column<int64_t> offsets, ids, strata;
  Column<bool> valid;
  Column<double> weights, lengths;

  Columns(const Tensor& x, const Maybe& offsets, const Maybe& ids, const Maybe& strata, const Maybe& valid,
          const Maybe& weights, const Maybe& lengths)
      : offsets(offsets, ScalarType::Long, x, "offsets"),
        ids(ids, ScalarType::Long, x, "ids"),
        strata(strata, ScalarType::Long, x, "strata"),
        valid(valid, ScalarType::Bool, x, "valid"),
        weights(weights, ScalarType::Double, x, "weights"),
        lengths(lengths, ScalarType::Double, x, "lengths") {
    STD_TORCH_CHECK(x.dim() == 1 || x.dim() == 2, "the numbers must be [N] or [K, N], got ", x.dim(), " dimensions");
    const int64_t n = x.size(-1);
    for (const int64_t size : {each(this->ids, n), each(this->strata, n), each(this->valid, n), each(this->weights, n),
                               each(this->lengths, n)})
      STD_TORCH_CHECK(size == n, "every argument must have one entry per number, ", n, ", got ", size);
    STD_TORCH_CHECK(this->offsets.data == nullptr || this->offsets.size >= 1, "offsets must not be empty");
  }
  template <class T>
  static int64_t each(const Column<T>& c, int64_t n) {
    return c.data ? c.size : n;
  }
};

GroupTask task(const Tensor& x, const Columns& c, int64_t group_size, int64_t groups) {
  const int64_t n = x.size(-1);
  GroupTask t{};
  t.items = {
      x.const_data_ptr(), element(x, "the rewards"), x.dim() == 1 ? 1 : x.size(0), n, c.valid.data, c.weights.data,
      c.lengths.data};
  t.groups = {c.offsets.data, groups, group_size, c.ids.data, c.strata.data};
  if (c.offsets.data) {
    t.groups.groups = c.offsets.size - 1;
  } else if (!c.ids.data) {
    STD_TORCH_CHECK(group_size >= 1 && n % group_size == 0, "group_size must divide the number of rewards, ", n,
                    ", got ", group_size);
    t.groups.groups = n / group_size;
  }
  return t;
}

std::tuple<Tensor, Tensor> group_advantages(const Tensor& rewards_in, const Maybe& offsets, const Maybe& ids,
                                            const Maybe& strata, const Maybe& valid, const Maybe& weights,
                                            const Maybe& lengths, int64_t group_size, const std::vector<int64_t> rule,
                                            double correction, double eps, double alpha) {
  STD_TORCH_CHECK(rule.size() == 7, "group_advantages: rule must have 7 entries, got ", rule.size());
  const Scope scope(rewards_in);
  const Tensor rewards = contiguous_of(rewards_in);
  const Columns columns(rewards, offsets, ids, strata, valid, weights, lengths);
  STD_TORCH_CHECK(!columns.strata.data || columns.ids.data, "group_advantages: strata needs ids");
  GroupTask t = task(rewards, columns, group_size, 0);
  t.rule = {Baseline(rule[0]),
            Spread(rule[1]),
            EpsMode(rule[2]),
            Singleton(rule[3]),
            rule[4] != 0,
            rule[5] != 0,
            rule[6] != 0,
            correction,
            eps,
            alpha};
  STD_TORCH_CHECK(t.rule.baseline != Baseline::opo || columns.lengths.data, "group_advantages: opo needs lengths");
  std::vector<int64_t> shape{rewards.size(-1)};
  if (rewards.dim() == 2) shape.insert(shape.begin(), rewards.size(0));
  Tensor out = empty(rewards, shape, t.items.element == Element::f64 ? ScalarType::Double : ScalarType::Float);
  Tensor degenerate = empty(rewards, shape, ScalarType::Bool);
  t.out = out.mutable_data_ptr();
  t.degenerate = static_cast<bool*>(degenerate.mutable_data_ptr());
  if (rewards.numel() == 0) return {out, degenerate};
  const Workspace memory(rewards, backend::group_advantages_workspace(t));
  backend::group_advantages(t, memory.data(), scope.stream());
  return {out, degenerate};
}

Tensor segment_stats(const Tensor& x_in, const Maybe& offsets, const Maybe& ids, const Maybe& valid,
                     const Maybe& weights, int64_t num_groups) {
  const Scope scope(x_in);
  const Tensor x = contiguous_of(x_in);
  const Columns columns(x, offsets, ids, std::nullopt, valid, weights, std::nullopt);
  STD_TORCH_CHECK((columns.offsets.data != nullptr) != (columns.ids.data != nullptr),
                  "segment_stats: one of offsets and ids is needed");
  STD_TORCH_CHECK(num_groups >= 0, "segment_stats: num_groups must not be negative, got ", num_groups);
  GroupTask t = task(x, columns, 1, num_groups);
  std::vector<int64_t> shape{5, t.groups.groups};
  if (x.dim() == 2) shape.insert(shape.begin(), x.size(0));
  Tensor stats = empty(x, shape, ScalarType::Double);
  t.stats = static_cast<double*>(stats.mutable_data_ptr());
  if (stats.numel() == 0) return stats;
  const Workspace memory(x, backend::group_advantages_workspace(t));
  backend::group_advantages(t, memory.data(), scope.stream());
  return stats;
}

}  // namespace

GRADOPS_OP(group_advantages,
           "group_advantages(Tensor rewards, Tensor? offsets, Tensor? ids, Tensor? strata, Tensor? valid, "
           "Tensor? weights, Tensor? lengths, int group_size, int[] rule, float correction, float eps, float alpha) "
           "-> (Tensor, Tensor)")
GRADOPS_OP(segment_stats,
           "segment_stats(Tensor x, Tensor? offsets, Tensor? ids, Tensor? valid, Tensor? weights, int num_groups) "
           "-> Tensor")

}  // namespace gradops
