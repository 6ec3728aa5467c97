// group_index: labels to dense ids in order of first appearance, and the order that puts groups side by side.
// Torch-free interface, CPU only (on CUDA the number of groups would have to come back to the host).
#pragma once
#include <cstdint>

namespace gradops::cpu {

// ids[i]: the number of labels[i]; returns how many numbers there are.
int64_t group_ids(const int64_t* labels, int64_t n, int64_t* ids);
// order: the items group by group, each group's in their order; offsets: [groups + 1]. ids in [0, groups).
void group_order(const int64_t* ids, int64_t n, int64_t groups, int64_t* order, int64_t* offsets);

// Items with equal (ids, strata) side by side, groups in any order; strata may be null. offsets: [n + 1] at most;
// one of order (n < 2^31) and long_order is filled, or none if the items already lie so. The arrays live until the
// thread's next call.
struct SortedKeys {
  int64_t groups;
  int64_t* offsets;
  int32_t* order;
  int64_t* long_order;
};
SortedKeys sort_keys(const int64_t* ids, const int64_t* strata, int64_t n);
// The same where ids are the groups' own numbers: group g is ids == g, empty where no item has it.
SortedKeys sort_numbers(const int64_t* ids, int64_t n, int64_t groups);

}  // namespace gradops::cpu
