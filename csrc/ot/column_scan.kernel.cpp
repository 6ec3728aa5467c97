// Tiles of 64 columns: the costs of a row in a tile are a few vectors, the entries above `low` a word of bits, most of
// which are zero.
//
// Narrow costs are compared in float. alpha is rounded up and low down before; subtraction rounds monotonically, so an
// entry above low in double is never below it in float.
#include "ot/column_scan.h"

#include "ot/cost_rows.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int kCollectColumns = 1024;  // of a pass over the rows; what these need stays near
constexpr int64_t kWords = 512;

// v in C, rounded away from what must not be missed; without a branch, as nobody can guess which way float(v) went.
inline void round_up(double v, float& to) {
  to = float(v);
  to = to * (to > 0 ? 1 + 0x1p-23f : 1 - 0x1p-23f) + 0x1p-126f;
}
inline void round_up(double v, double& to) { to = v; }
inline void round_down(double v, float& to) {
  to = float(v);
  to = to * (to > 0 ? 1 - 0x1p-23f : 1 + 0x1p-23f) - 0x1p-126f;
  to = to > -0x1.fffffep127f ? to : -0x1.fffffep127f;  // entries of -infinity stay out
}
inline void round_down(double v, double& to) { to = v == -__builtin_inf() ? -0x1.fffffffffffffp1023 : v; }

typedef __mmask16 LooseMask __attribute__((may_alias));

// Where `low` of column l of a tile is kept: halves of a word of two narrow costs are widened one after the other.
template <class T>
constexpr int64_t low_at(int64_t l) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Bf16>) return l / 16 * 16 + l % 2 * 8 + l % 16 / 2;
#endif
  return l;
}

// One bit per column of a tile: not alpha - c < low.
template <class T, class C>
[[gnu::always_inline]] inline void wanted(const T* c, C alpha, const C* low, uint64_t* bits) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(C) == 4) {  // gcc would join the masks in a general register
    for (int v = 0; v < 4; ++v) {
      const auto lanes = __mmask16(not_below(alpha - load_wide(c + 16 * v), load_anywhere(low + 16 * v)));
      asm("kmovw %1, %0" : "=m"(reinterpret_cast<LooseMask*>(bits)[v]) : "k"(lanes));
    }
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) {  // lanes are narrowed to bytes first: to bring them to the other registers is slow
    uint64_t all = 0;
    for (int v = 0; v < kTile; v += 32) {
      const auto lanes = [&](Vec<float> cost, int at) __attribute__((always_inline)) {
        return _mm256_castps_si256(
            _mm256_cmp_ps((__m256)(alpha - cost), (__m256)load_anywhere(low + v + at), _CMP_NLT_UQ));
      };
      __m256i bytes;
      if constexpr (std::is_same_v<T, Bf16>) {
        const auto sixteen = [&](int at) __attribute__((always_inline)) {
          const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + v + at));
          const __m256i second = _mm256_and_si256(two, _mm256_set1_epi32(int(0xffff0000)));
          return _mm256_blend_epi16(lanes((Vec<float>)_mm256_slli_epi32(two, 16), at),
                                    lanes((Vec<float>)second, at + 8), 0xaa);
        };
        bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(sixteen(0), sixteen(16)), 0xd8);
      } else {
        const auto sixteen = [&](int at) __attribute__((always_inline)) {
          return _mm256_packs_epi32(lanes(load_wide(c + v + at), at), lanes(load_wide(c + v + at + 8), at + 8));
        };
        bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(sixteen(0), sixteen(16)),
                                            _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      }
      all |= uint64_t(uint32_t(_mm256_movemask_epi8(bytes))) << v;
    }
    *bits = all;
    return;
  }
#endif
  uint64_t all = 0;
  for (int v = 0; v < kTile; v += kLanes<C>) all |= not_below(alpha - load_wide(c + v), load_anywhere(low + v)) << v;
  *bits = all;
}

// Where the lists of a pass's columns go on, and where they must end; from the first column's on.
struct Lists {
  int32_t next[kCollectColumns], end[kCollectColumns];
};

// Of some rows from `first` on, of 2^shift bits each, the wanted entries into their lists: put(i, l) gives for row i
// and column begin + l what is called for every entry: with its column from there on, and its place. Returns how many
// entries were wanted.
template <class F>
[[gnu::always_inline]] inline int64_t each_entry(Lists& lists, int32_t* index, int64_t first, int shift,
                                                 const uint64_t* words, int64_t count, const F& put) {
  int32_t where[kWords];
  const int64_t some = list_nonzero(words, int32_t(count), where);
  int64_t found = 0;
  for (int64_t p = 0; p < some; ++p) {
    const int64_t place = int64_t(where[p]) * kTile, i = first + (place >> shift);
    const int64_t from = place & ((int64_t(1) << shift) - 1);
    uint64_t bits = words[where[p]];
    found += __builtin_popcountll(bits);
    int32_t* next = lists.next + from;
    const int32_t* end = lists.end + from;
    const auto store = put(i, from);
    do {
      const int64_t l = __builtin_ctzll(bits), to = next[l]++;
      bits &= bits - 1;
      if (to >= end[l]) continue;
      index[to] = int32_t(i);
      store(l, to);
    } while (bits);
  }
  return found;
}
template <class T>
[[gnu::noinline]] int64_t append(const ColumnScan& t, int64_t begin, int64_t first, int shift, const uint64_t* words,
                                 int64_t count, Lists& lists) {
  int32_t* index = t.index + begin * t.capacity;
  double* value = t.value + begin * t.capacity;
  const double* alpha = t.alpha;
  const auto each = [&](const auto& put) __attribute__((always_inline)) {
    return each_entry(lists, index, first, shift, words, count, put);
  };
  if (t.cost.matrix) {
    const T* matrix = static_cast<const T*>(t.cost.matrix) + begin;
    const int64_t m = t.cost.m;
    if (t.costs)
      return each([=, less = t.shift](int64_t i, int64_t from) {
        return [=, c = matrix + i * m + from](int64_t l, int64_t to) { value[to] = double(widen(c[l])) - less; };
      });
    return each([=](int64_t i, int64_t from) {
      return
          [=, c = matrix + i * m + from, a = alpha[i]](int64_t l, int64_t to) { value[to] = a - double(widen(c[l])); };
    });
  }
  return each([&](int64_t i, int64_t from) {
    return [&, i, from](int64_t l, int64_t to) {
      const double c = cost_at(t.cost, i, begin + from + l);
      value[to] = t.costs ? c - t.shift : alpha[i] - c;
    };
  });
}

// False if more than `most` entries are wanted.
template <class T, class C>
bool collect(const ColumnScan& t, int64_t begin, int64_t end, int64_t& most) {
  alignas(64) C low[kCollectColumns];
  alignas(64) uint64_t words[kWords] = {};  // bits of the wanted entries, of a few rows: 2^shift for each
  int shift = 6;
  while (int64_t(1) << shift < end - begin) ++shift;
  const int64_t per_row = int64_t(1) << (shift - 6), rows = kWords / per_row;
  for (int64_t l = 0; l < per_row * kTile; ++l) low[l] = C(__builtin_inf());
  for (int64_t j = begin; j < end; ++j) round_down(t.low[j], low[t.cost.matrix ? low_at<T>(j - begin) : j - begin]);
  Lists lists;
  for (int64_t j = 0; j < end - begin; ++j) lists.next[j] = int32_t(j * t.capacity);
  for (int64_t j = 0; j < end - begin; ++j) lists.end[j] = int32_t((j + 1) * t.capacity);
  int64_t first = 0;
  each_row<T, C>(
      t.cost, begin, end, false,
      [&](int64_t i) {
        C alpha;
        round_up(t.cost.matrix ? t.alpha[i] : t.alpha[i] + 0x1p-120, alpha);
        return alpha;
      },
      [&](int64_t i, C alpha, int64_t j, int64_t tiles, const auto* c) {
        uint64_t* to = words + (i - first) * per_row + (j - begin) / kTile;
        for (int64_t l = 0; l < tiles; ++l) {
          wanted(c + l * kTile, alpha, low + (j - begin) + l * kTile, to + l);
          // The processor does not foresee where a part of a row goes on. (Past the end it does nothing.)
          for (size_t e = 0; e < kTile; e += 64 / sizeof(T)) __builtin_prefetch(c + t.cost.m + l * kTile + e);
        }
        if (j + tiles * kTile < end || i - first + 1 < rows) return true;
        most -= append<T>(t, begin, first, shift, words, kWords, lists);
        first = i + 1;
        return most >= 0;
      });
  if (most < 0) return false;
  most -= append<T>(t, begin, first, shift, words, (t.cost.n - first) * per_row, lists);
  for (int64_t j = 0; j < end - begin; ++j) t.count[begin + j] = lists.next[j] - int32_t(j * t.capacity);
  return most >= 0;
}

}  // namespace

bool scan_columns(const ColumnScan& t, int64_t begin, int64_t end) {
  int64_t most = t.most;
  bool all = true;
  const int64_t columns = t.cost.matrix ? kCollectColumns : kTile;
  with_arithmetic(t.cost.element, [&](auto stored, auto wide) {
    for (int64_t j = begin; j < end && all; j += columns)
      all = collect<decltype(stored), decltype(wide)>(t, j, end - j < columns ? end : j + columns, most);
  });
  return all;
}

}  // namespace gradops::GRADOPS_ISA
