// What group_index reads of all keys before it knows how they lie.
#include "rl/group_index.h"

#include "common/simd.h"

namespace gradops::GRADOPS_ISA {
namespace {
constexpr int W = kLanes<int64_t>;
typedef long long Keys __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));

// Bit k: lane k differs.
inline uint64_t differing(Keys a, Keys b) {
#if defined(__AVX512F__)
  typedef long long Whole __attribute__((vector_size(64)));
  return __builtin_ia32_ucmpq512_mask(Whole(a), Whole(b), 4, 0xff);
#elif defined(__AVX2__)
  return unsigned(__builtin_ia32_movmskpd256(__builtin_bit_cast(Vec<double>, a != b)));
#elif defined(__SSE2__)
  return unsigned(__builtin_ia32_movmskpd(__builtin_bit_cast(Vec<double>, a != b)));
#else
  uint64_t bits = 0;
  for (int k = 0; k < W; ++k) bits |= uint64_t(a[k] != b[k]) << k;
  return bits;
#endif
}

// A hash table of at most half as many keys as slots: a key is in the first bucket from its own on that has, or had
// when it came, a slot left. Whole buckets are compared, so that next to no branch is taken by chance.
constexpr int kBucket = W < 4 ? 4 : W;
constexpr int64_t kNone = INT64_MIN;  // as a key: an empty slot
template <class I>
struct KeyTable {
  int64_t slots;
  int64_t* keys;
  I* numbers;
  int shift;
  KeyTable(char* memory, int64_t slots)
      : slots(slots),
        keys(reinterpret_cast<int64_t*>(memory)),
        numbers(reinterpret_cast<I*>(keys + slots)),
        shift(64 - __builtin_ctzll(uint64_t(slots / kBucket))) {
    for (int64_t i = 0; i < slots; ++i) keys[i] = kNone;
  }
  // Slots of a bucket that hold the key, as bits.
  static uint64_t with(const int64_t* bucket, int64_t key) {
    uint64_t other = 0;
    for (int k = 0; k < kBucket; k += W)
      other |= differing(*reinterpret_cast<const Keys*>(bucket + k), Keys{} + key) << k;
    return ~other & ((1 << kBucket) - 1);
  }
  [[gnu::always_inline]] int64_t bucket(int64_t key) const {
    const uint64_t mixed = (uint64_t(key) ^ uint64_t(key) >> 32) * 0x9e3779b97f4a7c15u;
    return int64_t(mixed >> shift) * kBucket;
  }
  bool is_large() const { return slots > 1 << 16; }  // for the cache
  // Asks for what a later key will need.
  [[gnu::always_inline]] void prefetch(const int64_t* key, const int64_t* end) const {
    constexpr int64_t kAhead = 16;
    if (end - key <= kAhead) return;
    const int64_t at = bucket(key[kAhead]);
    __builtin_prefetch(keys + at, 1), __builtin_prefetch(numbers + at, 1);
  }
  // The key's slot. One that has none gets an empty one and the number that add() returns.
  template <class Add>
  [[gnu::always_inline]] int64_t slot(int64_t key, const Add& add) const {
    int64_t at = bucket(key);
    for (;; at = (at + kBucket) & (slots - 1)) {
      if (const uint64_t mine = with(keys + at, key)) [[likely]]
        return at + __builtin_ctzll(mine);
      if (const uint64_t empty = with(keys + at, kNone)) {
        at += __builtin_ctzll(empty);
        keys[at] = key, numbers[at] = I(add());
        return at;
      }
    }
  }
};

// Numbers the keys from i on until the table is half full; returns where that is, or n.
template <bool kLarge, class I>
[[gnu::noinline]] int64_t number_some(const KeyTable<I> table, const int64_t* keys, int64_t i, int64_t n, I* number,
                                      int64_t* distinct, int64_t& groups, int64_t& none) {
  int64_t next = groups;
  for (; i < n && 2 * next < table.slots; ++i) {
    const int64_t key = keys[i];
    if constexpr (kLarge) table.prefetch(keys + i, keys + n);
    if (key == kNone) [[unlikely]] {
      if (none < 0) distinct[none = next++] = key;
      number[i] = I(none);
    } else {
      number[i] = table.numbers[table.slot(key, [&] { return distinct[next] = key, next++; })];
    }
  }
  groups = next;
  return i;
}

template <class I>
int64_t number_all(const int64_t* keys, int64_t n, char* memory, I* number) {
  int64_t groups = 0, none = -1;  // the number of kNone
  int64_t* const distinct = reinterpret_cast<int64_t*>(memory);
  for (int64_t i = 0, slots = kFirstSlots; i < n; slots *= 2) {
    const KeyTable<I> table(memory + (n + 7) / 8 * 64, slots);
    for (int64_t g = 0; g < groups; ++g) {
      if (table.is_large()) table.prefetch(distinct + g, distinct + groups);
      if (g != none) table.slot(distinct[g], [&] { return g; });
    }
    const auto some = table.is_large() ? number_some<true, I> : number_some<false, I>;
    i = some(table, keys, i, n, number, distinct, groups, none);
  }
  return groups;
}

// The last lane of a, then all but the last of b.
template <int... N>
inline Keys shifted(Keys a, Keys b, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(a, b, (W - 1 + N)...);
}
}  // namespace

KeyRange key_range(const int64_t* keys, int64_t n) {
  KeyRange r{keys[0], keys[0]};
  int64_t i = 0;
  if (n >= 4 * W) {
    Keys low[4], high[4];
    for (int k = 0; k < 4; ++k) low[k] = high[k] = *reinterpret_cast<const Keys*>(keys + k * W);
    for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Keys now = *reinterpret_cast<const Keys*>(keys + i + k * W);
        low[k] = now < low[k] ? now : low[k], high[k] = now > high[k] ? now : high[k];
      }
    for (int k = 0; k < 4 * W; ++k) {
      r.low = low[k / W][k % W] < r.low ? low[k / W][k % W] : r.low;
      r.high = high[k / W][k % W] > r.high ? high[k / W][k % W] : r.high;
    }
  }
  for (; i < n; ++i) {
    r.low = keys[i] < r.low ? keys[i] : r.low;
    r.high = keys[i] > r.high ? keys[i] : r.high;
  }
  return r;
}

int64_t key_numbers(const int64_t* keys, int64_t n, char* memory, int32_t* number) {
  return number_all(keys, n, memory, number);
}
int64_t key_numbers_long(const int64_t* keys, int64_t n, char* memory, int64_t* number) {
  return number_all(keys, n, memory, number);
}

// Where keys change, 64 at a time: runs are longer than a vector more often than not.
int64_t key_runs(const int64_t* keys, int64_t n, int64_t* offsets) {
  int64_t groups = 0, i = 0;
  offsets[groups++] = 0;
  Keys before = Keys{} + keys[0];
  for (; i + 64 <= n; i += 64) {
    uint64_t begins = 0;
    for (int k = 0; k < 64; k += W) {
      const Keys now = *reinterpret_cast<const Keys*>(keys + i + k);
      begins |= differing(now, shifted(before, now, std::make_integer_sequence<int, W>())) << k;
      before = now;
    }
    bool falls = false;
    for (; begins; begins &= begins - 1) {
      const int64_t at = i + __builtin_ctzll(begins);
      falls |= keys[at] < keys[at - 1];
      offsets[groups++] = at;
    }
    if (falls) return -1;
  }
  for (i += i == 0; i < n; ++i) {
    if (keys[i] < keys[i - 1]) return -1;
    if (keys[i] != keys[i - 1]) offsets[groups++] = i;
  }
  offsets[groups] = n;
  return groups;
}

}  // namespace gradops::GRADOPS_ISA
