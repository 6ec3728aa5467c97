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
// The last lane of a, then all but the last of b.
template <int... N>
inline Keys shifted(Keys a, Keys b, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(a, b, (W - 1 + N)...);
}
}  // namespace

KeyRange key_range(const int64_t* keys, int64_t n) {
  KeyRange r{keys[0], keys[0]};
  for (int64_t i = 0; i < n; ++i) {
    r.low = keys[i] < r.low ? keys[i] : r.low;
    r.high = keys[i] > r.high ? keys[i] : r.high;
  }
  return r;
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
