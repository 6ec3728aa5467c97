// group_advantages: rewards minus a baseline of their group, divided by a spread. segment_stats: the groups' moments.
// Torch-free interface. Rewards of 16 bits give advantages in float, others in their own type.
#pragma once
#include "common/isa.h"
#include "rl/group_rules.h"

namespace gradops {

struct GroupTask {
  GroupItems items;
  Groups groups;
  GroupRule rule;
  void* out;         // [batch, items] advantages, or null for
  double* stats;     // [batch, 5, groups]: count, mean, m2, min, max
  bool* degenerate;  // [batch, items], with out
};

// The advantage of a group's item is (value - base) * gain; if the group is degenerate, gain itself, and base no number
// but `same`, which no calculation gives.
struct GroupMap {
  double base, gain;
  static constexpr int64_t same = 0x7ff8000000000001;
  static GroupMap of(double base, double gain, bool degenerate, double value) {
    if (!degenerate) return {base, gain};
    return {__builtin_bit_cast(double, same), (value - base) * gain};
  }
  bool is_same() const { return __builtin_bit_cast(int64_t, base) == same; }
};

// Groups [begin, end) of one row. The item at position p is order[p], or p itself.
struct GroupRow {
  GroupItems items;
  GroupRule rule;
  const int64_t* offsets;
  int64_t groups, group_size;
  const int32_t* order;
  const int64_t* long_order;
  double batch_spread;
  void* out;
  bool* degenerate;
  double* stats;
  bool blend;      // with what `out` holds
  GroupMap* maps;  // [groups], or null: instead of advantages, of what is_plain
};
GRADOPS_DECLARE(void, group_rows, const GroupRow&, int64_t begin, int64_t end)
// The same, for what is_plain.
GRADOPS_DECLARE(void, group_rows_plain, const GroupRow&, int64_t begin, int64_t end)
// Advantages of items [begin, end): item i is in group number[i].
GRADOPS_DECLARE(void, group_items, const GroupRow&, const int32_t* number, int64_t begin, int64_t end)
inline bool is_plain(const GroupRow& t) {
  const GroupItems& i = t.items;
  return !t.stats && !t.order && !t.long_order && !t.blend && !i.valid && !i.weights && !t.rule.skip_nan &&
         i.element != Element::f64 && t.rule.scale != Spread::loo && t.rule.baseline != Baseline::opo &&
         t.rule.baseline != Baseline::max2;
}

namespace cpu {
void group_advantages(const GroupTask&, void* workspace = nullptr, void* = nullptr);
inline int64_t group_advantages_workspace(const GroupTask&) { return 0; }  // bytes
}  // namespace cpu
namespace cuda {
void group_advantages(const GroupTask&, void* workspace, void* stream);
int64_t group_advantages_workspace(const GroupTask&);
}  // namespace cuda
}  // namespace gradops
