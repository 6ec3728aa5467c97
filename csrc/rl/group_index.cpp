#include "rl/group_index.h"

#include <cstring>

#include "common/scratch.h"

namespace gradops {
namespace {

uint64_t width(KeyRange r) { return uint64_t(r.high) - uint64_t(r.low) + 1; }  // 0 for all of int64

// Keys close together index a table; others are hashed.
bool fits(uint64_t width, int64_t n) { return width != 0 && width <= uint64_t(4 * n + 1024); }

int64_t numbers_of(const int64_t* keys, int64_t n, char* memory, int32_t* number) {
  return GRADOPS_DISPATCH(key_numbers)(keys, n, memory, number);
}
int64_t numbers_of(const int64_t* keys, int64_t n, char* memory, int64_t* number) {
  return GRADOPS_DISPATCH(key_numbers_long)(keys, n, memory, number);
}

// The same for pairs of keys in these ranges, each made into one key. pairs: [n] is memory.
template <class I>
int64_t numbers_of_pairs(const int64_t* a, const int64_t* b, int64_t n, KeyRange ra, KeyRange rb, char* memory,
                         int64_t* pairs, I* number) {
  const auto too_many = [](uint64_t a, uint64_t b) {
    uint64_t product;
    return a == 0 || b == 0 || __builtin_mul_overflow(a, b, &product);
  };
  const uint64_t wb = width(rb);
  uint64_t wa = width(ra), low = uint64_t(ra.low);
  const bool numbered = too_many(wa, wb);  // a is, then, by itself; and so is b, if need be
  if (numbered) wa = uint64_t(numbers_of(a, n, memory, number)), low = 0;
  for (int64_t i = 0; i < n; ++i) pairs[i] = int64_t((numbered ? uint64_t(number[i]) : uint64_t(a[i])) - low);
  const bool both = too_many(wa, wb);
  const uint64_t columns = both ? uint64_t(numbers_of(b, n, memory, number)) : wb;
  for (int64_t i = 0; i < n; ++i)
    pairs[i] = int64_t(uint64_t(pairs[i]) * columns + (both ? uint64_t(number[i]) : uint64_t(b[i]) - uint64_t(rb.low)));
  return numbers_of(pairs, n, memory, number);
}

// offsets: [groups + 1], the sums of counts before each; counts become the same.
template <class I>
void sum_up(int64_t groups, I* counts, int64_t* offsets) {
  int64_t at = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t count = counts[g];
    counts[g] = I(at), offsets[g] = at, at += count;
  }
  offsets[groups] = at;
}

// places: of each group, where it begins; then, where it ends.
template <class N, class I>
void put_in_order(const N* number, int64_t n, I* places, I* order) {
  for (int64_t i = 0; i < n; ++i) order[places[number[i]]++] = I(i);
}
// Counting sort. number[i] in [0, groups); places: [groups] is memory.
template <class N, class I>
void sort_by(const N* number, int64_t n, int64_t groups, I* places, int64_t* offsets, I* order) {
  std::memset(places, 0, size_t(groups) * sizeof(I));
  for (int64_t i = 0; i < n; ++i) ++places[number[i]];
  sum_up(groups, places, offsets);
  put_in_order(number, n, places, order);
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

// Fills s but for what its type decides: the numbers, the groups' places, and, if ordered, the order.
template <class I>
void number_keys(const int64_t* a, const int64_t* b, int64_t n, bool ordered, int64_t spare, cpu::SortedKeys& s,
                 I*& number, I*& places, I*& order) {
  const auto range = GRADOPS_DISPATCH(key_range);
  const KeyRange ra = range(a, n), rb = b ? range(b, n) : KeyRange{};
  const uint64_t wa = width(ra), wb = b ? width(rb) : 1;
  const bool direct = fits(wa, n) && fits(wb, n) && fits(wa * wb, n / 4);  // every place is a group
  const int64_t most = direct ? int64_t(wa * wb) : n;
  char* table = nullptr;
  int64_t* pairs = nullptr;
  const auto cut = [&](Cutter c) {
    s.offsets = c.take<int64_t>(most + 1);
    number = c.take<I>(n), places = c.take<I>(most);
    if (ordered) order = c.take<I>(n);
    s.spare = c.take<char>(spare * most);
    if (!direct && b) pairs = c.take<int64_t>(n);
    if (!direct) table = c.take<char>(key_table_bytes(n, sizeof(I)));
    return c.bytes();
  };
  cut(Cutter(thread_scratch(cut(Cutter()))));
  s.groups = most;
  const int64_t low = ra.low, columns = int64_t(wb), low_b = rb.low;
  if (!direct) s.groups = b ? numbers_of_pairs(a, b, n, ra, rb, table, pairs, number) : numbers_of(a, n, table, number);
  std::memset(places, 0, size_t(s.groups) * sizeof(I));
  if (!direct) {
    for (int64_t i = 0; i < n; ++i) ++places[number[i]];
  } else if (!b) {
    for (int64_t i = 0; i < n; ++i) ++places[number[i] = I(a[i] - low)];
  } else {
    for (int64_t i = 0; i < n; ++i) ++places[number[i] = I((a[i] - low) * columns + (b[i] - low_b))];
  }
  sum_up(s.groups, places, s.offsets);
  if (ordered) put_in_order(number, n, places, order);
}

}  // namespace

int64_t cpu::group_ids(const int64_t* labels, int64_t n, int64_t* ids) {
  if (n == 0) return 0;
  const KeyRange range = GRADOPS_DISPATCH(key_range)(labels, n);
  if (fits(width(range), n)) {
    const int64_t bytes = 8 * int64_t(width(range));
    int64_t* table = reinterpret_cast<int64_t*>(thread_scratch(bytes));
    std::memset(table, 0xff, size_t(bytes));
    int64_t groups = 0;
    for (int64_t i = 0; i < n; ++i) {
      int64_t& id = table[labels[i] - range.low];
      if (id < 0) id = groups++;
      ids[i] = id;
    }
    return groups;
  }
  return numbers_of(labels, n, thread_scratch(key_table_bytes(n, 8)), ids);
}

void cpu::group_order(const int64_t* ids, int64_t n, int64_t groups, int64_t* order, int64_t* offsets) {
  sort_by(ids, n, groups, reinterpret_cast<int64_t*>(thread_scratch(8 * groups)), offsets, order);
}

cpu::SortedKeys cpu::sort_keys(const int64_t* ids, const int64_t* strata, int64_t n, bool ordered, int64_t spare) {
  SortedKeys s{};
  if (!strata) {
    s.offsets = reinterpret_cast<int64_t*>(thread_scratch(8 * (n + 8)));
    if ((s.groups = GRADOPS_DISPATCH(key_runs)(ids, n, s.offsets)) >= 0) return s;
  }
  int64_t *number, *places;
  if (n < kManyItems)
    number_keys(ids, strata, n, ordered, spare, s, s.number, s.places, s.order);
  else
    number_keys(ids, strata, n, ordered, spare, s, number, places, s.long_order);
  return s;
}

cpu::SortedKeys cpu::sort_numbers(const int64_t* ids, int64_t n, int64_t groups) {
  SortedKeys s{groups};
  int64_t* places;
  const auto cut = [&](Cutter c) {
    s.offsets = c.take<int64_t>(groups + 1), s.long_order = c.take<int64_t>(n), places = c.take<int64_t>(groups);
    return c.bytes();
  };
  cut(Cutter(thread_scratch(cut(Cutter()))));
  sort_by(ids, n, groups, places, s.offsets, s.long_order);
  return s;
}

}  // namespace gradops
