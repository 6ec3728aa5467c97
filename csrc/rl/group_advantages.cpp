#include "rl/group_advantages.h"

#include <cmath>

#include "common/parallel.h"
#include "common/value_error.h"
#include "rl/group_index.h"

namespace gradops {
namespace {
using cpu::SortedKeys;

int64_t out_size(Element e) { return e == Element::f64 ? 8 : 4; }

// All groups of a row, cut among the threads into pieces of at least 8192 items on average.
void run(const GroupRow& row) {
  const auto kernel = is_plain(row) ? GRADOPS_DISPATCH(group_rows_plain) : GRADOPS_DISPATCH(group_rows);
  const int64_t items = row.items.items;
  const int64_t grain = items <= 8192 ? row.groups : (8192 * row.groups + items - 1) / items;
  parallel_for(0, row.groups, grain, [&](int64_t begin, int64_t end) { kernel(row, begin, end); });
}

// Items in no order, of what is_plain: the rewards are put side by side by group (in what is to hold the advantages,
// where the cache has room for them), for what maps each group's rewards to advantages; these are then made in order.
void run_numbered(const GroupRow& row, const SortedKeys& keys) {
  const int64_t n = row.items.items;
  GroupRow grouped = row;
  grouped.maps = reinterpret_cast<GroupMap*>(keys.spare);
  grouped.items.x = row.out;
  for (int64_t g = 0; g < row.groups; ++g) keys.places[g] = int32_t(row.offsets[g]);
  const auto place = [&](auto zero) {
    using U = decltype(zero);
    const U* from = static_cast<const U*>(row.items.x);
    U* to = static_cast<U*>(row.out);
    const int32_t* number = keys.number;
    int32_t* places = keys.places;
    constexpr int64_t kAhead = 64, kCached = 1 << 18;
    int64_t i = 0;
    for (; n > kCached && i < n - kAhead; ++i) {
      __builtin_prefetch(to + places[number[i + kAhead]], 1);
      to[places[number[i]]++] = from[i];
    }
    for (; i < n; ++i) to[places[number[i]]++] = from[i];
  };
  if (row.items.element == Element::f32)
    place(uint32_t());
  else
    place(uint16_t());
  run(grouped);
  grouped.items.x = row.items.x;
  const auto kernel = GRADOPS_DISPATCH(group_items);
  parallel_for(0, n, 8192, [&](int64_t begin, int64_t end) { kernel(grouped, keys.number, begin, end); });
}

double spread_of_all(GroupRow row) {
  const int64_t bounds[2] = {0, row.items.items};
  double stats[5];
  row.offsets = bounds, row.groups = 1, row.order = nullptr, row.long_order = nullptr;
  row.out = nullptr, row.stats = stats;
  GRADOPS_DISPATCH(group_rows)(row, 0, 1);
  const double n = stats[0] - row.rule.correction;
  return stats[0] > 0 && n > 0 ? std::sqrt(stats[2] / n) : 0.;
}

}  // namespace

void cpu::group_advantages(const GroupTask& t, void*, void*) {
  const int64_t n = t.items.items;
  if (t.groups.offsets) check_offsets("offsets", t.groups.offsets, t.groups.groups, n);
  GroupRow first{t.items, t.rule, t.groups.offsets, t.groups.groups, t.groups.group_size};
  const auto each_row = [&](GroupRow row, const SortedKeys& keys) {
    for (int64_t b = 0; b < t.items.batch; ++b) {
      row.items.x = static_cast<const char*>(t.items.x) + b * n * element_size(t.items.element);
      if (t.out) {
        row.out = static_cast<char*>(t.out) + b * n * out_size(t.items.element);
        row.degenerate = t.degenerate + b * n;
        if (t.rule.scale == Spread::batch) row.batch_spread = spread_of_all(row);
      } else {
        row.stats = t.stats + b * 5 * t.groups.groups;
      }
      if (keys.number && !keys.order)
        run_numbered(row, keys);
      else
        run(row);
    }
  };
  const auto each_sorted_row = [&](const int64_t* strata, bool blend) {
    GroupRow row = first;
    row.blend = blend;
    const SortedKeys keys =
        t.out ? sort_keys(t.groups.ids, strata, n, !is_plain(row) || n >= kManyItems, sizeof(GroupMap))
              : sort_numbers(t.groups.ids, n, t.groups.groups);
    row.offsets = keys.offsets, row.groups = keys.groups;
    row.order = keys.order, row.long_order = keys.long_order;
    each_row(row, keys);
  };
  if (n == 0 && t.out) return;
  if (!t.groups.ids) return each_row(first, {});
  if (!t.out) check_ids("ids", t.groups.ids, n, t.groups.groups);
  const bool blend = t.groups.strata && t.rule.blend;
  if (blend) each_sorted_row(nullptr, false);
  each_sorted_row(t.groups.strata, blend);
}

}  // namespace gradops
