#include "rl/group_index.h"

#include <cstring>

#include "common/scratch.h"

namespace gradops {
namespace {

struct Range {
  int64_t low = INT64_MAX, high = INT64_MIN;
  Range(const int64_t* a, int64_t n) {
    for (int64_t i = 0; i < n; ++i) low = a[i] < low ? a[i] : low, high = a[i] > high ? a[i] : high;
  }
  uint64_t width() const { return uint64_t(high) - uint64_t(low) + 1; }  // 0 for all of int64
};

// Keys close together index a table; others are hashed.
bool fits(uint64_t width, int64_t n) { return width != 0 && width <= uint64_t(4 * n + 1024); }

uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

int64_t table_size(int64_t n) {
  int64_t size = 64;
  while (size < 2 * n) size *= 2;
  return size;
}

// Numbers the distinct keys in order of first appearance. table: [table_size(n)], first: [n], where a number was
// first seen.
template <class I>
int64_t number_by_hash(const int64_t* a, const int64_t* b, int64_t n, I* table, I* first, I* ids) {
  const int64_t mask = table_size(n) - 1;
  std::memset(table, 0xff, size_t(mask + 1) * sizeof(I));
  int64_t groups = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t hash = mixed(uint64_t(a[i]) + (b ? mixed(uint64_t(b[i]) + 0x9e3779b97f4a7c15u) : 0));
    for (int64_t at = int64_t(hash) & mask;; at = (at + 1) & mask) {
      const I g = table[at];
      if (g < 0) {
        table[at] = I(groups), first[groups] = I(i), ids[i] = I(groups++);
        break;
      }
      if (a[first[g]] == a[i] && (!b || b[first[g]] == b[i])) {
        ids[i] = g;
        break;
      }
    }
  }
  return groups;
}

// Counting sort. key(i) in [0, width); counts: [width], zeroed here. Returns the number of keys that occur.
template <class I, class Key>
int64_t sort_by(const Key& key, int64_t n, int64_t width, I* counts, int64_t* offsets, bool drop_empty, I* order) {
  std::memset(counts, 0, size_t(width) * sizeof(I));
  for (int64_t i = 0; i < n; ++i) ++counts[key(i)];
  int64_t groups = 0, at = 0;
  for (int64_t k = 0; k < width; ++k) {
    const int64_t count = counts[k];
    counts[k] = I(at);
    offsets[groups] = at, at += count, groups += count > 0 || !drop_empty;
  }
  offsets[groups] = at;
  for (int64_t i = 0; i < n; ++i) order[counts[key(i)]++] = I(i);
  return groups;
}

// Cuts the thread's memory into arrays; made twice, first without memory to know how much.
class Cutter {
 public:
  explicit Cutter(char* memory = nullptr) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    char* p = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Offsets of runs of equal labels, where labels never decrease; else -1.
int64_t runs(const int64_t* a, int64_t n, int64_t* offsets) {
  int64_t groups = n > 0;
  offsets[0] = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (a[i] < a[i - 1]) return -1;
    offsets[groups] = i;  // stays where a run begins: no branch to guess wrong
    groups += a[i] != a[i - 1];
  }
  offsets[groups] = n;
  return groups;
}

template <class I>
int64_t sort_keys(const int64_t* a, const int64_t* b, int64_t n, int64_t*& offsets, I*& order) {
  const Range ra(a, n), rb(b ? b : a, b ? n : 0);
  const uint64_t wa = ra.width(), wb = b ? rb.width() : 1;
  const bool direct = fits(wa, n) && fits(wb, n) && fits(wa * wb, n);
  const int64_t width = direct ? int64_t(wa * wb) : n;
  I *counts, *table = nullptr, *first = nullptr, *ids = nullptr;
  const auto cut = [&](Cutter c) {
    offsets = c.take<int64_t>((direct ? width : n) + 1);
    order = c.take<I>(n);
    counts = c.take<I>(width);
    if (!direct) table = c.take<I>(table_size(n)), first = c.take<I>(n), ids = c.take<I>(n);
    return c.bytes();
  };
  cut(Cutter(thread_scratch(cut(Cutter()))));
  if (!direct) {
    const int64_t groups = number_by_hash(a, b, n, table, first, ids);
    return sort_by([=](int64_t i) { return ids[i]; }, n, groups, counts, offsets, true, order);
  }
  if (!b) return sort_by([=](int64_t i) { return a[i] - ra.low; }, n, width, counts, offsets, true, order);
  const int64_t columns = int64_t(wb);
  return sort_by([=](int64_t i) { return (a[i] - ra.low) * columns + (b[i] - rb.low); }, n, width, counts, offsets,
                 true, order);
}

}  // namespace

int64_t cpu::group_ids(const int64_t* labels, int64_t n, int64_t* ids) {
  if (n == 0) return 0;
  const Range range(labels, n);
  if (fits(range.width(), n)) {
    const int64_t width = int64_t(range.width());
    int64_t* table = reinterpret_cast<int64_t*>(thread_scratch(8 * width));
    std::memset(table, 0xff, size_t(width) * 8);
    int64_t groups = 0;
    for (int64_t i = 0; i < n; ++i) {
      int64_t& id = table[labels[i] - range.low];
      if (id < 0) id = groups++;
      ids[i] = id;
    }
    return groups;
  }
  int64_t *table, *first;
  const auto cut = [&](Cutter c) {
    table = c.take<int64_t>(table_size(n)), first = c.take<int64_t>(n);
    return c.bytes();
  };
  cut(Cutter(thread_scratch(cut(Cutter()))));
  return number_by_hash<int64_t>(labels, nullptr, n, table, first, ids);
}

void cpu::group_order(const int64_t* ids, int64_t n, int64_t groups, int64_t* order, int64_t* offsets) {
  int64_t* counts = reinterpret_cast<int64_t*>(thread_scratch(8 * groups));
  sort_by([=](int64_t i) { return ids[i]; }, n, groups, counts, offsets, false, order);
}

cpu::SortedKeys cpu::sort_keys(const int64_t* ids, const int64_t* strata, int64_t n) {
  SortedKeys s{};
  if (!strata) {
    s.offsets = reinterpret_cast<int64_t*>(thread_scratch(8 * (n + 1)));
    if ((s.groups = runs(ids, n, s.offsets)) >= 0) return s;
  }
  if (n < INT32_MAX / 8)
    s.groups = gradops::sort_keys(ids, strata, n, s.offsets, s.order);
  else
    s.groups = gradops::sort_keys(ids, strata, n, s.offsets, s.long_order);
  return s;
}

cpu::SortedKeys cpu::sort_numbers(const int64_t* ids, int64_t n, int64_t groups) {
  SortedKeys s{groups};
  int64_t* counts;
  const auto cut = [&](Cutter c) {
    s.offsets = c.take<int64_t>(groups + 1), s.long_order = c.take<int64_t>(n), counts = c.take<int64_t>(groups);
    return c.bytes();
  };
  cut(Cutter(thread_scratch(cut(Cutter()))));
  sort_by([=](int64_t i) { return ids[i]; }, n, groups, counts, s.offsets, false, s.long_order);
  return s;
}

}  // namespace gradops
