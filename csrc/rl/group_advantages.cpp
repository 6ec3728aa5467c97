#include "rl/group_advantages.h"

#include <cmath>
#include <stdexcept>

#include "common/parallel.h"
#include "rl/group_index.h"

namespace gradops {
namespace {

int64_t out_size(Element e) { return e == Element::f64 ? 8 : 4; }

// All groups of a row, cut among the threads into pieces of at least 8192 items on average.
void run(const GroupRow& row) {
  const auto kernel = is_plain(row) ? GRADOPS_DISPATCH(group_rows_plain) : GRADOPS_DISPATCH(group_rows);
  const int64_t items = row.items.items;
  const int64_t grain = items <= 8192 ? row.groups : (8192 * row.groups + items - 1) / items;
  parallel_for(0, row.groups, grain, [&](int64_t begin, int64_t end) { kernel(row, begin, end); });
}

// Rewards, advantages and flags in the groups' order.
int64_t gathered_bytes(const GroupTask& t) { return t.items.items * (element_size(t.items.element) + 4 + 1); }

// The rewards put in order first, and the advantages put back, for the faster kernel. False where it cannot be used.
bool run_gathered(const GroupRow& row, void* memory) {
  GroupRow ordered = row;
  ordered.order = nullptr;
  if (!row.order || !is_plain(ordered)) return false;
  const int64_t n = row.items.items, size = element_size(row.items.element);
  const int32_t* order = row.order;
  char* x = static_cast<char*>(memory);
  float *adv = reinterpret_cast<float*>(x + (n * size + 3) / 4 * 4), *out = static_cast<float*>(row.out);
  bool *flags = reinterpret_cast<bool*>(adv + n), *degenerate = row.degenerate;
  ordered.items.x = x, ordered.out = adv, ordered.degenerate = flags;
  const auto gather = [&](auto zero) {
    using U = decltype(zero);
    const U* from = static_cast<const U*>(row.items.x);
    U* to = reinterpret_cast<U*>(x);
    parallel_for(0, n, 16384, [=](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) to[p] = from[order[p]];
    });
  };
  if (size == 4)
    gather(uint32_t());
  else
    gather(uint16_t());
  run(ordered);
  parallel_for(0, n, 16384, [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) out[order[p]] = adv[p], degenerate[order[p]] = flags[p];
  });
  return true;
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

int64_t cpu::group_advantages_workspace(const GroupTask& t) { return t.groups.ids ? gathered_bytes(t) + 4 : 0; }

void cpu::group_advantages(const GroupTask& t, void* workspace, void*) {
  const int64_t n = t.items.items;
  if (t.groups.offsets) {
    const int64_t *o = t.groups.offsets, g = t.groups.groups;
    bool good = o[0] == 0 && o[g] == n;
    for (int64_t i = 0; i < g; ++i) good &= o[i] <= o[i + 1];
    if (!good) throw std::runtime_error("offsets must start at 0, not decrease and end at the number of rewards");
  }
  GroupRow first{t.items, t.rule, t.groups.offsets, t.groups.groups, t.groups.group_size};
  const auto each_row = [&](GroupRow row) {
    for (int64_t b = 0; b < t.items.batch; ++b) {
      row.items.x = static_cast<const char*>(t.items.x) + b * n * element_size(t.items.element);
      if (t.out) {
        row.out = static_cast<char*>(t.out) + b * n * out_size(t.items.element);
        row.degenerate = t.degenerate + b * n;
        if (t.rule.scale == Spread::batch) row.batch_spread = spread_of_all(row);
      } else {
        row.stats = t.stats + b * 5 * t.groups.groups;
      }
      if (!run_gathered(row, workspace)) run(row);
    }
  };
  const auto sorted = [&](const int64_t* strata) {
    GroupRow row = first;
    const SortedKeys keys = t.out ? sort_keys(t.groups.ids, strata, n) : sort_numbers(t.groups.ids, n, t.groups.groups);
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
