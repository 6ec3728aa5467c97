// The most common call: groups that lie one after another, every reward valid and of weight 1, no reward in double,
// and advantages that are one affine map per group. The same numbers as group_advantages.kernel.cpp but for the last
// bits of a double. Groups of about the same size are transposed to lie side by side, one per lane.
#include "common/widen.h"
#include "rl/group_advantages.h"
#include "rl/group_sums.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kLargest = 128;  // larger groups go the general way
constexpr int L = kLanes<float>;   // groups side by side, 2 W
constexpr float kInf = __builtin_inff();
template <int N>
struct Of {
  typedef float Floats __attribute__((vector_size(4 * N)));
  typedef uint32_t Words __attribute__((vector_size(4 * N)));
  typedef uint16_t Shorts __attribute__((vector_size(2 * N)));
};
using Half = Of<W>::Floats;

template <int N>
[[gnu::always_inline]] inline auto floats_at(const float* x) {
  typename Of<N>::Floats v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}
template <int N>
[[gnu::always_inline]] inline auto floats_at(const Bf16* x) {
  typename Of<N>::Shorts bits;
  __builtin_memcpy(&bits, x, sizeof bits);
  return (typename Of<N>::Floats)(__builtin_convertvector(bits, typename Of<N>::Words) << 16);
}
template <int N>
[[gnu::always_inline]] inline auto floats_at(const F16* x) {
  typename Of<N>::Floats v{};
#if defined(__F16C__)
  if constexpr (N == 8) {
    typedef short Shorts __attribute__((vector_size(16), may_alias, aligned(2)));
    return (typename Of<N>::Floats)__builtin_ia32_vcvtph2ps256(*reinterpret_cast<const Shorts*>(x));
  }
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    typedef short Shorts __attribute__((vector_size(32), may_alias, aligned(2)));
    return __builtin_ia32_vcvtph2ps512_mask(*reinterpret_cast<const Shorts*>(x), v, 0xffff, 4);
  }
#endif
  for (int i = 0; i < N; ++i) v[i] = widen(x[i]);
  return v;
}
template <class T>
[[gnu::always_inline]] inline Lanes load(const T* x) {
  const Half h = floats_at<W>(x);
#if defined(__AVX512F__)  // gcc 12 makes two halves of the conversion
  return __builtin_ia32_cvtps2pd512_mask(h, Vec<double>{}, 0xff, 4);
#else
  return __builtin_convertvector(h, Vec<double>);
#endif
}
[[gnu::always_inline]] inline void store(float* y, Lanes v) {
  const Half h = __builtin_convertvector(v.v, Half);
  __builtin_memcpy(y, &h, sizeof h);
}

constexpr int kSorted = 256;  // groups sorted by size at a time
struct Sorted {               // in ascending order of size; number: from the first of those sorted together
  int64_t first[kSorted + L];
  int32_t size[kSorted + L], number[kSorted + L], used, filled;
  bool large;  // some groups are left out
  alignas(kVectorBytes) float least[kSorted + L], most[kSorted + L];
  // base and gain take the place of mean and m2
  alignas(kVectorBytes) double mean[kSorted + L], m2[kSorted + L];
  // 1 for a degenerate group, 0 for others, NaN for one that has a number that is not finite
  alignas(kVectorBytes) double same[kSorted + L];
};

// L groups' items j .. j + L. Reads also what lies beyond a group's end, where `inside` x.
template <class T>
[[gnu::always_inline]] inline void load_rows(const T* x, const int64_t* first, const int32_t* size, int64_t j,
                                             bool inside, Vec<float>* row) {
  if (inside) {
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) row[k] = (Vec<float>)floats_at<L>(x + first[k] + j);
    return;
  }
  alignas(kVectorBytes) float rows[L][L];  // apart from `row`, which is to stay in registers
  for (int k = 0; k < L; ++k)
    for (int64_t i = 0; i < L; ++i) rows[k][i] = j + i < size[k] ? widen(x[first[k] + j + i]) : 0.f;
#pragma GCC unroll 16
  for (int k = 0; k < L; ++k) row[k] = vec_at(rows[k]);
}
inline Vec<float> smaller(Vec<float> a, Vec<float> b) { return a < b ? a : b; }  // b where one is no number
inline Vec<float> larger(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
template <class Op>
[[gnu::always_inline]] inline Vec<float> over_rows(const Vec<float>* row, Op op) {
  Vec<float> v[L];
  for (int k = 0; k < L; ++k) v[k] = row[k];
#pragma GCC unroll 4
  for (int h = L / 2; h > 0; h /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < h; ++k) v[k] = op(v[k], v[k + h]);
  return v[0];
}

// Groups at .. at + L are put side by side into rows, and their ranges found.
template <class T>
void transpose_groups(const T* x, bool inside, Sorted& s, int at, float* rows) {
  const int32_t* size = s.size + at;
  const int64_t shortest = size[0], longest = size[L - 1];
  Vec<float> count, low = Vec<float>{} + kInf, high = -low;
  for (int k = 0; k < L; ++k) count[k] = float(size[k]);
  for (int64_t j = 0; j < longest; j += L) {
    Vec<float> r[L];
    load_rows(x, s.first + at, size, j, inside, r);
    transpose<float>(r);
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) vec_at(rows + (j + k) * L) = r[k];
    if (j + L <= shortest) {
      low = smaller(over_rows(r, [](auto a, auto b) { return smaller(a, b); }), low);
      high = larger(over_rows(r, [](auto a, auto b) { return larger(a, b); }), high);
    } else {
      for (int64_t k = j; k < j + L && k < longest; ++k) {
        const auto in = Vec<float>{} + float(k) < count;
        const Vec<float> v = vec_at(rows + k * L);
        low = smaller(in ? v : kInf, low), high = larger(in ? v : -kInf, high);
      }
    }
  }
  vec_at(s.least + at) = low, vec_at(s.most + at) = high;
}

typedef int32_t Ints __attribute__((vector_size(4 * W)));
[[gnu::always_inline]] inline Lanes lanes_of(const int32_t* size) {
  Ints n;
  __builtin_memcpy(&n, size, sizeof n);
#if defined(__AVX512F__)  // as above
  typedef int Whole __attribute__((vector_size(32)));
  return Vec<double>(__builtin_ia32_cvtdq2pd512_mask(Whole(n), Vec<double>{}, 0xff));
#else
  return __builtin_convertvector(n, Vec<double>);
#endif
}

// Groups at .. at + L, side by side in rows.
void measure(Sorted& s, int at, const float* rows) {
  const int32_t* size = s.size + at;
  const int64_t shortest = size[0], longest = size[L - 1];
  const Lanes count[2] = {lanes_of(size), lanes_of(size + W)};
  GridSums a(load(s.least + at), load(s.most + at)), b(load(s.least + at + W), load(s.most + at + W));
  int64_t j = 0;
#pragma GCC unroll 4
  for (; j < shortest; ++j) a.add(load(rows + j * L)), b.add(load(rows + j * L + W));
  for (; j < longest; ++j) {
    a.add(load(rows + j * L), Lanes(double(j)) < count[0]);
    b.add(load(rows + j * L + W), Lanes(double(j)) < count[1]);
  }
  Lanes mean[2], m2[2];
  a.finish(count[0], mean[0], m2[0]), b.finish(count[1], mean[1], m2[1]);
  for (int half = 0; half < 2; ++half)
    vec_at(s.mean + at + half * W) = mean[half].v, vec_at(s.m2 + at + half * W) = m2[half].v;
}

// All divisions and roots together, so that none waits for another. Makes mean and m2 the base and the gain.
void solve(const GroupRow& t, Sorted& s) {
  for (int i = 0; i < s.used; i += W) {
    const Lanes count = lanes_of(s.size + i), low = load(s.least + i), high = load(s.most + i), m2 = vec_at(s.m2 + i);
    const GroupSums<Lanes> sums{count, count, low, high, 1., vec_at(s.mean + i), m2, 0., 0.};
    const GroupAffine<Lanes> a = affine_of(sums, t.rule, t.batch_spread, false);
    vec_at(s.mean + i) = (low - a.shift).v, vec_at(s.m2 + i) = a.gain.v;
    vec_at(s.same + i) = (select(is_degenerate(sums), 1., 0.) + (m2 - m2)).v;
  }
}

// size at least 2
template <int kBytes>
[[gnu::always_inline]] inline void fill(bool* flags, int64_t size, bool flag) {
  typedef char Flags __attribute__((vector_size(kBytes), aligned(1), may_alias));
  if constexpr (kBytes > 2)
    if (size < kBytes) return fill<kBytes / 2>(flags, size, flag);
  const Flags all = Flags{} + char(flag);
  for (int64_t i = 0; i + kBytes < size; i += kBytes) *reinterpret_cast<Flags*>(flags + i) = all;
  *reinterpret_cast<Flags*>(flags + size - kBytes) = all;
}

// Item i of these becomes (x[i] - base) * gain.
template <class T>
struct Map {
  const T* x;
  float* out;
  bool* degenerate;
  [[gnu::always_inline]] void one(int64_t i, const GroupMap& m, bool same) const {
    out[i] = float((double(widen(x[i])) - m.base) * m.gain + 0.);  // + 0: no negative zeros
    degenerate[i] = same;
  }
  // Whole vectors, of which the last two may have items in common.
  [[gnu::always_inline]] void group(int64_t first, int64_t size, const GroupMap& m, bool same) const {
    if (size < W) {
      for (int64_t i = first; i < first + size; ++i) {
        one(i, m, same);
        asm("");  // not worth vectors
      }
      return;
    }
    const Lanes base = m.base, gain = m.gain;
    const T* from = x + first;
    float* to = out + first;
    const auto map = [&](int64_t i) { store(to + i, (load(from + i) - base) * gain + 0.); };
#pragma GCC unroll 4
    for (int64_t i = 0; i + W < size; i += W) map(i);
    map(size - W);
    fill<kVectorBytes / 2>(degenerate + first, size, same);
  }
};
typedef double Pair __attribute__((vector_size(16), may_alias));
template <class A, int... N>
[[gnu::always_inline]] inline auto joined(A a, A b, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(a, b, N...);
}
// The maps of every second one of 2 kCount items, side by side. A map is loaded whole.
template <int kCount>
[[gnu::always_inline]] inline auto maps_of(const GroupMap* maps, const int32_t* number) {
  if constexpr (kCount == 1)
    return reinterpret_cast<const Pair&>(maps[*number]);
  else
    return joined(maps_of<kCount / 2>(maps, number), maps_of<kCount / 2>(maps, number + kCount),
                  std::make_integer_sequence<int, 2 * kCount>());
}
template <int... N>
[[gnu::always_inline]] inline void gather(const GroupMap* maps, const int32_t* number, Lanes& base, Lanes& gain,
                                          std::integer_sequence<int, N...>) {
  const auto a = maps_of<W / 2>(maps, number), b = maps_of<W / 2>(maps, number + 1);  // in pairs: no lane is crossed
  base = __builtin_shufflevector(a, b, (N % 2 ? W + N - 1 : N)...);
  gain = __builtin_shufflevector(a, b, (N % 2 ? W + N : N + 1)...);
}

template <class T>
Map<T> map_of(const GroupRow& t) {
  return {static_cast<const T*>(t.items.x), static_cast<float*>(t.out), t.degenerate};
}

// Sorts groups [begin, end), at most kSorted, behind empty ones that make their number a multiple of L; leaves out
// empty and large groups.
void sort(const GroupRow& t, int64_t begin, int64_t end, Sorted& s) {
  const int groups = int(end - begin);
  int64_t first[kSorted + 1] = {};
  int32_t size[kSorted], place[kLargest + 2] = {}, large = 0, other = 0;
  for (int k = 0; k <= groups; ++k) first[k] = t.offsets ? t.offsets[begin + k] : (begin + k) * t.group_size;
  const int64_t common = first[1] - first[0];
  for (int k = 0; k < groups; ++k) {
    const int64_t n = first[k + 1] - first[k];
    size[k] = n <= kLargest ? int32_t(n) : 0, large |= n > kLargest, other |= n != common;
  }
  s.large = large;
  if (!other && !large && common && groups % L == 0) {
    for (int k = 0; k < groups; ++k) s.first[k] = first[k], s.size[k] = size[k], s.number[k] = k;
    s.used = s.filled = groups;
    return;
  }
  for (int k = 0; k < groups; ++k) ++place[size[k] + 1];
  const int used = groups - place[1], pads = -used & (L - 1);
  place[1] = pads;
  for (int n = 2; n <= kLargest + 1; ++n) place[n] += place[n - 1];
  for (int k = 0; k < groups; ++k) {
    if (size[k] == 0) continue;
    const int to = place[size[k]]++;
    s.first[to] = first[k], s.size[to] = size[k], s.number[to] = k;
  }
  for (int k = 0; k < pads; ++k) s.first[k] = first[0], s.size[k] = 0;
  s.used = pads + used, s.filled = used;
}

template <class T>
void run(const GroupRow& t, int64_t begin, int64_t end) {
  const auto start = [&](int64_t g) { return t.offsets ? t.offsets[g] : g * t.group_size; };
  const Map<T> map = map_of<T>(t);
  Sorted s;
  alignas(kVectorBytes) float rows[2][(kLargest + L) * L];
  for (int64_t g0 = begin; g0 < end; g0 += kSorted) {
    const int64_t after = end - g0 < kSorted ? end : g0 + kSorted, then = end - after < kSorted ? end : after + kSorted;
    for (int64_t i = start(after), next = start(then); i < next; i += 64 / sizeof(T))  // sorted, they come in no order
      __builtin_prefetch(map.x + i);
    sort(t, g0, after, s);
    const bool inside = start(after) + kLargest + L <= t.items.items;
    // Measured while the next are read: neither has to wait for the other's end.
    for (int i = 0; i < s.used + L; i += L) {
      int64_t last = 0;
      for (int k = 0; k < L && !inside && i < s.used; ++k) last = s.first[i + k] > last ? s.first[i + k] : last;
      if (i < s.used)
        transpose_groups(map.x, inside || last + s.size[i + L - 1] + L <= t.items.items, s, i, rows[i / L % 2]);
      if (i > 0) measure(s, i - L, rows[i / L % 2 ^ 1]);
    }
    solve(t, s);
    const int pads = s.used - s.filled;
    bool all_finite = true;
    for (int i = pads; i < s.used; ++i) all_finite &= s.same[i] == s.same[i];
    const auto map_at = [&](int i) { return GroupMap{s.mean[i], s.m2[i]}; };
    if (t.maps)
      for (int i = pads; i < s.used; ++i)
        t.maps[g0 + s.number[i]] = GroupMap::of(s.mean[i], s.m2[i], s.same[i] == 1, s.least[i]);
    else
      for (int i = pads; i < s.used; ++i) map.group(s.first[i], s.size[i], map_at(i), s.same[i] == 1);
    for (int i = pads; i < s.used && !all_finite; ++i)
      if (s.same[i] != s.same[i]) group_rows(t, g0 + s.number[i], g0 + s.number[i] + 1);
    for (int64_t g = g0; s.large && g < after; ++g)
      if (start(g + 1) - start(g) > kLargest) group_rows(t, g, g + 1);
  }
}

typedef char Flags __attribute__((vector_size(W)));
template <class T>
void map_items(const GroupRow& t, const int32_t* number, int64_t begin, int64_t end) {
  const Map<T> map = map_of<T>(t);
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    Lanes base, gain;
    gather(t.maps, number + i, base, gain, std::make_integer_sequence<int, W>());
    const Mask same{bits(base) == Bits{} + uint64_t(GroupMap::same)};
    store(map.out + i, select(same, gain, (load(map.x + i) - base) * gain) + 0.);
    const auto flags = __builtin_convertvector(same.m & 1, Flags);
    __builtin_memcpy(map.degenerate + i, &flags, W);
  }
  for (; i < end; ++i) {
    const GroupMap& m = t.maps[number[i]];
    map.one(i, m, m.is_same());
    if (m.is_same()) map.out[i] = float(m.gain + 0.);
  }
}

}  // namespace

void group_rows_plain(const GroupRow& t, int64_t begin, int64_t end) {
  with_type(t.items.element, [&](auto zero) {
    if constexpr (sizeof(zero) < 8) run<decltype(zero)>(t, begin, end);
  });
}

void group_items(const GroupRow& t, const int32_t* number, int64_t begin, int64_t end) {
  with_type(t.items.element, [&](auto zero) {
    if constexpr (sizeof(zero) < 8) map_items<decltype(zero)>(t, number, begin, end);
  });
}

}  // namespace gradops::GRADOPS_ISA
