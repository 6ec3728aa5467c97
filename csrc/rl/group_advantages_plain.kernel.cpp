// The most common call: groups that lie one after another, every reward valid and of weight 1, no reward in double,
// and advantages that are one affine map per group. The same numbers as group_advantages.kernel.cpp but for the last
// bits of a double. Groups of about the same size are transposed to lie side by side, one per lane.
//
// A group's sums of d = value - low and of d * d give its moments. Both terms are rounded to a grid that the group's
// range alone decides, 2^-51 of the largest there may be, and summed as integers: no bit depends on their order. What
// is lost when sum(d)^2 / n is taken off the second sum is at most log2(n) bits more, and n is small here.
#include "common/widen.h"
#include "rl/group_advantages.h"
#include "rl/lanes.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kLargest = 128;  // larger groups go the general way
constexpr double kInf = __builtin_inf();
typedef float Half __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
[[gnu::always_inline]] inline Lanes load(const T* x) {
  Vec<double> v;
  for (int i = 0; i < W; ++i) v[i] = double(widen(x[i]));
  return v;
}
[[gnu::always_inline]] inline Lanes load(const float* x) {
  Half h;
  __builtin_memcpy(&h, x, sizeof h);
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
  int64_t first[kSorted + W];
  int32_t size[kSorted + W], number[kSorted + W], used;
  bool large;  // some groups are left out
  // base and gain take the place of mean and m2; bad: has a number that is not finite
  alignas(kVectorBytes) double low[kSorted + W], high[kSorted + W], mean[kSorted + W], m2[kSorted + W];
};

// W groups' items j .. j + W. Reads also what lies beyond a group's end, where `inside` x.
template <class T>
[[gnu::always_inline]] inline void load_rows(const T* x, const int64_t* first, const int32_t* size, int64_t j,
                                             bool inside, Vec<double>* row) {
  if (inside) {
#pragma GCC unroll 8
    for (int k = 0; k < W; ++k) row[k] = load(x + first[k] + j).v;
    return;
  }
  alignas(kVectorBytes) double rows[W][W];  // apart from `row`, which is to stay in registers
  for (int k = 0; k < W; ++k)
    for (int64_t i = 0; i < W; ++i) rows[k][i] = j + i < size[k] ? double(widen(x[first[k] + j + i])) : 0.;
#pragma GCC unroll 8
  for (int k = 0; k < W; ++k) row[k] = vec_at(rows[k]);
}
template <class Op>
[[gnu::always_inline]] inline Lanes over_rows(const Vec<double>* row, Op op) {
  Lanes v[W];
  for (int k = 0; k < W; ++k) v[k] = row[k];
#pragma GCC unroll 3
  for (int h = W / 2; h > 0; h /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < h; ++k) v[k] = op(v[k], v[k + h]);
  return v[0];
}

typedef Vec<uint64_t> Bits;  // sums of them may wrap
[[gnu::always_inline]] inline Bits bits(Lanes x) { return reinterpret_cast<const Bits&>(x.v); }

// The sum of the integers that terms in [0, bound) are on a grid of bound * 2^-51: grain plus a term has them in its
// last bits.
struct GridSum {
  Lanes grain;
  Bits sum = {};
  explicit GridSum(Lanes bound) : grain(2. * bound) {}
  Lanes total(Lanes count) const {
    const Bits n = __builtin_convertvector(count.v, Bits), units = sum - n * bits(grain);
    return Lanes(__builtin_convertvector(reinterpret_cast<const Vec<int64_t>&>(units), Vec<double>)) *
           (grain * 0x1p-52);
  }
};

[[gnu::always_inline]] inline Lanes lanes_of(const int32_t* size) {
  Vec<double> v;
  for (int k = 0; k < W; ++k) v[k] = double(size[k]);
  return v;
}

// Groups at .. at + W.
template <class T>
void measure(const T* x, bool inside, Sorted& s, int at) {
  alignas(kVectorBytes) double rows[(kLargest + W) * W];
  const int32_t* size = s.size + at;
  const Lanes count = lanes_of(size);
  const int64_t shortest = size[0], longest = size[W - 1];
  Lanes low = kInf, high = -kInf;
  for (int64_t j = 0; j < longest; j += W) {
    Vec<double> r[W];
    load_rows(x, s.first + at, size, j, inside, r);
    transpose<double>(r);
#pragma GCC unroll 8
    for (int k = 0; k < W; ++k) vec_at(rows + (j + k) * W) = r[k];
    if (j + W <= shortest) {
      low = smaller(over_rows(r, smaller), low), high = larger(over_rows(r, larger), high);
    } else {
      for (int64_t k = j; k < j + W && k < longest; ++k) {
        const Mask in = Lanes(double(k)) < count;
        const Lanes v = vec_at(rows + k * W);
        low = smaller(select(in, v, kInf), low), high = larger(select(in, v, -kInf), high);
      }
    }
  }
  const Lanes unit = above(high - low);
  GridSum first(unit), second(unit * unit);
  Bits any = {};
  const auto add = [&](int64_t j, auto keep) {
    const Lanes d = Lanes(vec_at(rows + j * W)) - low;
    const Bits a = keep(bits(d + first.grain)), b = keep(bits(d * d + second.grain));
    first.sum += a, second.sum += b, any |= a;
  };
  int64_t j = 0;
#pragma GCC unroll 4
  for (; j < shortest; ++j) add(j, [](Bits b) { return b; });
  for (; j < longest; ++j)
    add(j, [in = Lanes(double(j)) < count](Bits b) { return b & reinterpret_cast<const Bits&>(in.m); });
  const Lanes sum = first.total(count), mean = sum / count;
  // No finite term changes the grain's exponent.
  const Lanes poison = select({(any ^ bits(first.grain)) >> 52 == 0}, 0., __builtin_nan(""));
  vec_at(s.low + at) = low.v, vec_at(s.high + at) = high.v, vec_at(s.mean + at) = mean.v;
  vec_at(s.m2 + at) = (second.total(count) - sum * mean + poison).v;
}

// All divisions and roots together, so that none waits for another. Makes mean and m2 the base and the gain; high is
// made 1 for a degenerate group, 0 for others, NaN for one that has a number that is not finite.
void solve(const GroupRow& t, Sorted& s) {
  for (int i = 0; i < s.used; i += W) {
    const Lanes count = lanes_of(s.size + i), low = vec_at(s.low + i), high = vec_at(s.high + i), m2 = vec_at(s.m2 + i);
    const GroupSums<Lanes> sums{count, count, low, high, 1., vec_at(s.mean + i), m2, 0., 0.};
    const GroupAffine<Lanes> a = affine_of(sums, t.rule, t.batch_spread, false);
    vec_at(s.mean + i) = (low - a.shift).v, vec_at(s.m2 + i) = a.gain.v;
    vec_at(s.high + i) = (select(is_degenerate(sums), 1., 0.) + (m2 - m2)).v;
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
// The maps of W items side by side. A map is loaded whole.
template <int kCount>
[[gnu::always_inline]] inline auto maps_of(const GroupMap* maps, const int32_t* number) {
  if constexpr (kCount == 1)
    return reinterpret_cast<const Pair&>(maps[*number]);
  else
    return joined(maps_of<kCount / 2>(maps, number), maps_of<kCount / 2>(maps, number + kCount / 2),
                  std::make_integer_sequence<int, 2 * kCount>());
}
template <int... N>
[[gnu::always_inline]] inline void gather(const GroupMap* maps, const int32_t* number, Lanes& base, Lanes& gain,
                                          std::integer_sequence<int, N...>) {
  const auto a = maps_of<W / 2>(maps, number), b = maps_of<W / 2>(maps, number + W / 2);
  base = __builtin_shufflevector(a, b, (2 * N)...), gain = __builtin_shufflevector(a, b, (2 * N + 1)...);
}

template <class T>
Map<T> map_of(const GroupRow& t) {
  return {static_cast<const T*>(t.items.x), static_cast<float*>(t.out), t.degenerate};
}

// Sorts groups [begin, end), at most kSorted, behind empty ones that make their number a multiple of W; leaves out
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
  if (!other && !large && common && groups % W == 0) {
    for (int k = 0; k < groups; ++k) s.first[k] = first[k], s.size[k] = size[k], s.number[k] = k;
    s.used = groups;
    return;
  }
  for (int k = 0; k < groups; ++k) ++place[size[k] + 1];
  const int used = groups - place[1], pads = -used & (W - 1);
  place[1] = pads;
  for (int n = 2; n <= kLargest + 1; ++n) place[n] += place[n - 1];
  for (int k = 0; k < groups; ++k) {
    if (size[k] == 0) continue;
    const int to = place[size[k]]++;
    s.first[to] = first[k], s.size[to] = size[k], s.number[to] = k;
  }
  for (int k = 0; k < pads; ++k) s.first[k] = first[0], s.size[k] = 0;
  s.used = pads + used;
}

template <class T>
void run(const GroupRow& t, int64_t begin, int64_t end) {
  const auto start = [&](int64_t g) { return t.offsets ? t.offsets[g] : g * t.group_size; };
  const Map<T> map = map_of<T>(t);
  Sorted s;
  for (int64_t g0 = begin; g0 < end; g0 += kSorted) {
    const int64_t after = end - g0 < kSorted ? end : g0 + kSorted, then = end - after < kSorted ? end : after + kSorted;
    for (int64_t i = start(after), next = start(then); i < next; i += 64 / sizeof(T))  // sorted, they come in no order
      __builtin_prefetch(map.x + i);
    sort(t, g0, after, s);
    const bool inside = start(after) + kLargest + W <= t.items.items;
    for (int i = 0; i < s.used; i += W) {
      int64_t last = 0;
      for (int k = 0; k < W && !inside; ++k) last = s.first[i + k] > last ? s.first[i + k] : last;
      measure(map.x, inside || last + s.size[i + W - 1] + W <= t.items.items, s, i);
    }
    solve(t, s);
    for (int i = 0; i < s.used; ++i) {
      if (s.size[i] == 0) continue;
      const GroupMap m{s.mean[i], s.m2[i]};
      const int64_t g = g0 + s.number[i];
      const bool same = s.high[i] == 1;
      if (s.high[i] != s.high[i])
        group_rows(t, g, g + 1);
      else if (t.maps)
        t.maps[g] = m, t.same[g] = same;
      else
        map.group(s.first[i], s.size[i], m, same);
    }
    for (int64_t g = g0; s.large && g < after; ++g)
      if (start(g + 1) - start(g) > kLargest) group_rows(t, g, g + 1);
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
    const auto map = map_of<decltype(zero)>(t);
    int64_t i = begin;
    for (; i + W <= end; i += W) {
      Lanes base, gain;
      gather(t.maps, number + i, base, gain, std::make_integer_sequence<int, W>());
      store(map.out + i, (load(map.x + i) - base) * gain + 0.);
      for (int k = 0; k < W; ++k) map.degenerate[i + k] = t.same[number[i + k]];
    }
    for (; i < end; ++i) map.one(i, t.maps[number[i]], t.same[number[i]]);
  });
}

}  // namespace gradops::GRADOPS_ISA
