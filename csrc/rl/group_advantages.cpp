#include "rl/group_advantages.h"

#include <cmath>
#include <stdexcept>

#include "common/parallel.h"
#include "rl/group_index.h"

namespace gradops {
namespace {

int64_t out_size(Element e) { return e == Element::f64 ? 8 : 4; }

// All groups of a row, cut among the threads into pieces of at least 8192 items on average.
void run(const GroupRow& row, int64_t items) {
  const auto kernel = GRADOPS_DISPATCH(group_rows);
  const int64_t grain = items <= 8192 ? row.groups : (8192 * row.groups + items - 1) / items;
  parallel_for(0, row.groups, grain < 64 ? grain : grain / 8 * 8,
               [&](int64_t begin, int64_t end) { kernel(row, begin, end); });
}

double spread_of_all(GroupRow row, int64_t items) {
  const int64_t bounds[2] = {0, items};
  double stats[5];
  row.offsets = bounds, row.groups = 1, row.order = nullptr, row.long_order = nullptr;
  row.out = nullptr, row.stats = stats;
  GRADOPS_DISPATCH(group_rows)(row, 0, 1);
  const double n = stats[0] - row.rule.correction;
  return stats[0] > 0 && n > 0 ? std::sqrt(stats[2] / n) : 0.;
}

}  // namespace

int64_t cpu::group_advantages_workspace(const GroupTask&) { return 0; }

void cpu::group_advantages(const GroupTask& t, void*, void*) {
  const int64_t n = t.items.items;
  if (t.groups.offsets) {
    const int64_t *o = t.groups.offsets, g = t.groups.groups;
    bool good = o[0] == 0 && o[g] == n;
    for (int64_t i = 0; i < g; ++i) good &= o[i] <= o[i + 1];
    if (!good) throw std::runtime_error("offsets must start at 0, not decrease and end at the number of rewards");
  }
  GroupRow first{t.items, t.rule, t.groups.offsets, t.groups.groups, t.groups.group_size};
  first.items.items = n;
  const auto each_row = [&](GroupRow row) {
    for (int64_t b = 0; b < t.items.batch; ++b) {
      row.items.x = static_cast<const char*>(t.items.x) + b * n * element_size(t.items.element);
      if (t.out) {
        row.out = static_cast<char*>(t.out) + b * n * out_size(t.items.element);
        row.degenerate = t.degenerate + b * n;
        if (t.rule.scale == Spread::batch) row.batch_spread = spread_of_all(row, n);
      } else {
        row.stats = t.stats + b * 5 * t.groups.groups;
      }
      run(row, n);
    }
  };
  const auto sorted = [&](const int64_t* strata) {
    GroupRow row = first;
    const SortedKeys keys =
        t.out ? sort_keys(t.groups.ids, strata, n) : sort_numbers(t.groups.ids, n, t.groups.groups);
    row.offsets = keys.offsets, row.groups = keys.groups;
    row.order = keys.order, row.long_order = keys.long_order;
    return row;
  };
  if (n == 0 && t.out) return;
  if (!t.groups.ids) return each_row(first);
  if (!t.out)
    for (int64_t i = 0; i < n; ++i)
      if (t.groups.ids[i] < 0 || t.groups.ids[i] >= t.groups.groups)
        throw std::runtime_error("ids must be at least 0 and less than num_groups");
  if (t.groups.strata && t.rule.blend) {
    each_row(sorted(nullptr));
    GroupRow row = sorted(t.groups.strata);
    row.blend = true;
    each_row(row);
  } else {
    each_row(sorted(t.groups.strata));
  }
}

}  // namespace gradops
