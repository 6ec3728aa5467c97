// group_index: labels to dense ids in order of first appearance, and the order that puts groups side by side.
// Torch-free interface, CPU only (on CUDA the number of groups would have to come back to the host).
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace gradops {
struct KeyRange {
  int64_t low, high;
};
GRADOPS_DECLARE(KeyRange, key_range, const int64_t* keys, int64_t n)  // n > 0
// Offsets of runs of equal keys, where keys never decrease; else -1. offsets: [n + 8] are written, n > 0.
GRADOPS_DECLARE(int64_t, key_runs, const int64_t* keys, int64_t n, int64_t* offsets)
// Numbers the distinct keys in order of first appearance: number[i] is that of keys[i]. Returns how many there are.
// memory: key_table_bytes(n), aligned to 64, of which only what the distinct keys need is touched. n < 2^31 for
// int32_t.
GRADOPS_DECLARE(int64_t, key_numbers, const int64_t* keys, int64_t n, char* memory, int32_t* number)
GRADOPS_DECLARE(int64_t, key_numbers_long, const int64_t* keys, int64_t n, char* memory, int64_t* number)

constexpr int64_t kFirstSlots = 512;
// The distinct keys, and a table of at least twice as many slots.
inline int64_t key_table_bytes(int64_t n, int64_t number_size) {
  int64_t slots = kFirstSlots;
  while (slots < 2 * n + 2) slots *= 2;
  return (n + 7) / 8 * 64 + slots * (8 + number_size);
}
}  // namespace gradops

namespace gradops::cpu {

// ids[i]: the number of labels[i]; returns how many numbers there are.
int64_t group_ids(const int64_t* labels, int64_t n, int64_t* ids);
// order: the items group by group, each group's in their order; offsets: [groups + 1]. ids in [0, groups).
void group_order(const int64_t* ids, int64_t n, int64_t groups, int64_t* order, int64_t* offsets);

// Items with equal (ids, strata) in groups, in any order of groups, some of them empty; strata may be null. Group g is
// the items offsets[g] .. offsets[g + 1] of an order: of their own where `number` and `order` are null; else of `order`
// (long_order for n >= 2^28), or, if not asked for that, by `number`, [n], the group of each item.
// `places` and `spare` are memory: 4 and as many bytes a group as asked for. All live until the thread's next call.
struct SortedKeys {
  int64_t groups;
  int64_t* offsets;
  int32_t *number, *places, *order;
  int64_t* long_order;
  char* spare;
};
constexpr int64_t kManyItems = int64_t(1) << 28;  // from here on numbers do not fit 32 bits everywhere
SortedKeys sort_keys(const int64_t* ids, const int64_t* strata, int64_t n, bool ordered, int64_t spare);
// The same, ordered, where ids are the groups' own numbers: group g is ids == g, empty where no item has it.
SortedKeys sort_numbers(const int64_t* ids, int64_t n, int64_t groups);

}  // namespace gradops::cpu
