// The most common call: groups that lie one after another, every reward valid and of weight 1, no reward in double,
// and advantages that are one affine map per group. Same sums, and so the same bits, as group_advantages.kernel.cpp,
// without scaling (squares of float cannot leave the range of double). Groups of about the same size are transposed
// to lie side by side, one per lane.
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
  return __builtin_convertvector(h, Vec<double>);
}
[[gnu::always_inline]] inline void store(float* y, Lanes v) {
  const Half h = __builtin_convertvector(v.v, Half);
  __builtin_memcpy(y, &h, sizeof h);
}
[[gnu::always_inline]] inline Lanes rounded_alone(Lanes term, Lanes grain) {
  asm("" : "+x"(term.v));  // as in group_advantages.kernel.cpp: never fused
  return rounded(term, grain);
}

struct Pack {  // W groups; row j of x holds their j-th items
  int64_t group[W], first[W], size[W], shortest, longest;
  alignas(kVectorBytes) double count[W], x[(kLargest + W) * W];
};

// Calls f(row, which lanes have an item there); all of them where the mask is null.
template <class F>
[[gnu::always_inline]] inline void each_row(const Pack& p, const F& f) {
  const Lanes count = vec_at(p.count);
  int64_t j = 0;
  for (; j + 2 <= p.shortest; j += 2)
    f(j, 0, [](Lanes v, Lanes) { return v; }), f(j + 1, 1, [](Lanes v, Lanes) { return v; });
  for (; j < p.longest; ++j) {
    const Mask inside = Lanes(double(j)) < count;
    f(j, 0, [=](Lanes v, Lanes other) { return select(inside, v, other); });
  }
}

// What lies beyond a group's end is read as well, where it lies inside x, and masked later.
template <class T>
[[gnu::always_inline]] inline void load_rows(const T* x, int64_t items, Pack& p) {
  int64_t end = 0;
  for (int k = 0; k < W; ++k) end = p.first[k] > end ? p.first[k] : end;
  const bool inside = end + p.longest + W <= items;
  for (int64_t j = 0; j < p.longest; j += W) {
    Vec<double> r[W];
    if (inside) {
#pragma GCC unroll 8
      for (int k = 0; k < W; ++k) r[k] = load(x + p.first[k] + j).v;
    } else {
      alignas(kVectorBytes) double rows[W][W];  // apart from r, which is to stay in registers
      for (int k = 0; k < W; ++k)
        for (int64_t i = 0; i < W; ++i) rows[k][i] = j + i < p.size[k] ? double(widen(x[p.first[k] + j + i])) : 0.;
#pragma GCC unroll 8
      for (int k = 0; k < W; ++k) r[k] = vec_at(rows[k]);
    }
    transpose<double>(r);
#pragma GCC unroll 8
    for (int k = 0; k < W; ++k) vec_at(p.x + (j + k) * W) = r[k];
  }
}

// The last, partial vector of a group, in pieces of 4, 2 and 1: groups come sorted by size, so branches are foreseen.
[[gnu::always_inline]] inline void store_part(float* out, bool* degenerate, int64_t n, Lanes v, uint64_t flags) {
  float part[W];
  store(part, v);
  int64_t at = 0;
  const auto piece = [&](auto size) {
    if (!(n & size())) return;
    __builtin_memcpy(out + at, part + at, size() * sizeof(float));
    __builtin_memcpy(degenerate + at, &flags, size());
    at += size();
  };
  if constexpr (W > 4) piece(std::integral_constant<int64_t, 4>());
  if constexpr (W > 2) piece(std::integral_constant<int64_t, 2>());
  piece(std::integral_constant<int64_t, 1>());
}

[[gnu::always_inline]] inline void store_rows(const Pack& p, const GroupAffine<Lanes>& a, Mask same, float* out,
                                              bool* degenerate) {
  uint64_t flags[W];
  for (int k = 0; k < W; ++k) flags[k] = same.m[k] ? 0x0101010101010101u : 0;
  for (int64_t j = 0; j < p.longest; j += W) {
    Vec<double> r[W];
#pragma GCC unroll 8
    for (int k = 0; k < W; ++k) r[k] = ((Lanes(vec_at(p.x + (j + k) * W)) + a.shift) * a.gain + 0.).v;
    transpose<double>(r);
    if (j + W <= p.shortest) {
#pragma GCC unroll 8
      for (int k = 0; k < W; ++k) {
        store(out + p.first[k] + j, r[k]);
        __builtin_memcpy(degenerate + p.first[k] + j, &flags[k], W);
      }
      continue;
    }
    alignas(kVectorBytes) double rows[W][W];
#pragma GCC unroll 8
    for (int k = 0; k < W; ++k) vec_at(rows[k]) = r[k];
    for (int k = 0; k < W; ++k) {
      const int64_t rest = p.size[k] - j, at = p.first[k] + j;
      if (rest >= W) {
        store(out + at, vec_at(rows[k]));
        __builtin_memcpy(degenerate + at, &flags[k], W);
      } else if (rest > 0) {
        store_part(out + at, degenerate + at, rest, vec_at(rows[k]), flags[k]);
      }
    }
  }
}

void solve(const GroupRow& t, Pack& p) {
  const Lanes count = vec_at(p.count);
  Lanes low[2] = {kInf, kInf}, high[2] = {-kInf, -kInf};
  each_row(p, [&](int64_t j, int h, auto keep) {
    const Lanes v = vec_at(p.x + j * W);
    low[h] = smaller(keep(v, kInf), low[h]), high[h] = larger(keep(v, -kInf), high[h]);
  });
  low[0] = smaller(low[0], low[1]), high[0] = larger(high[0], high[1]);
  const Lanes range = high[0] - low[0], grain = grain_of(count, range);
  Lanes sum[2];
  each_row(p, [&](int64_t j, int h, auto keep) {
    const Lanes d = keep(Lanes(vec_at(p.x + j * W)) - low[0], 0.);
    vec_at(p.x + j * W) = d.v;
    sum[h] = sum[h] + rounded(d, grain);
  });
  const Lanes mean = (sum[0] + sum[1]) / count, unit = above(range), fine = grain_of(count, Lanes(1.)) * unit * unit;
  Lanes m2[2];
  each_row(p, [&](int64_t j, int h, auto keep) {
    const Lanes d = keep(Lanes(vec_at(p.x + j * W)) - mean, 0.);
    m2[h] = m2[h] + rounded_alone(d * d, fine);
  });
  const GroupSums<Lanes> s{count, count, low[0], high[0], 1., mean, m2[0] + m2[1], 0., 0.};
  const GroupAffine<Lanes> a = affine_of(s, t.rule, t.batch_spread, false);
  const Mask same = is_degenerate(s);
  if (!t.maps) return store_rows(p, a, same, static_cast<float*>(t.out), t.degenerate);
  for (int k = 0; k < W; ++k)
    if (p.size[k]) t.maps[p.group[k]] = {a.shift[k], a.gain[k], float(s.low[k]), same.m[k] != 0};
}

template <class T>
void run(const GroupRow& t, int64_t begin, int64_t end) {
  constexpr int kSorted = 1024;  // groups sorted by size at a time
  const auto start = [&](int64_t g) { return t.offsets ? t.offsets[g] : g * t.group_size; };
  Pack p;
  for (int64_t g0 = begin; g0 < end; g0 += kSorted) {
    const int groups = int(end - g0 < kSorted ? end - g0 : kSorted);
    int64_t first[kSorted + 1];
    const int64_t after = g0 + groups, then = after + kSorted < end ? after + kSorted : end;
    for (int64_t i = start(after), next = start(then); i < next; i += 64 / sizeof(T))  // sorted, they come in no order
      __builtin_prefetch(static_cast<const T*>(t.items.x) + i), __builtin_prefetch(static_cast<float*>(t.out) + i, 1);
    int place[kLargest + 2] = {}, order[kSorted];
    for (int k = 0; k <= groups; ++k) first[k] = start(g0 + k);
    const auto size = [&](int k) { return first[k + 1] - first[k]; };
    for (int k = 0; k < groups; ++k) {
      if (size(k) > kLargest)
        group_rows(t, g0 + k, g0 + k + 1);
      else
        ++place[size(k) + 1];
    }
    place[1] = 0;  // empty groups are left out
    for (int n = 2; n <= kLargest + 1; ++n) place[n] += place[n - 1];
    const int used = place[kLargest + 1];
    for (int k = 0; k < groups; ++k)
      if (size(k) && size(k) <= kLargest) order[place[size(k)]++] = k;
    for (int next = 0; next < used; next += W) {
      for (int k = 0; k < W; ++k) {
        const bool is = next + k < used;
        p.group[k] = is ? g0 + order[next + k] : 0;
        p.first[k] = is ? first[order[next + k]] : 0;
        p.size[k] = is ? size(order[next + k]) : 0;
        p.count[k] = double(p.size[k]);
      }
      p.shortest = next + W <= used ? p.size[0] : 0;
      p.longest = p.size[next + W <= used ? W - 1 : used - next - 1];
      load_rows(static_cast<const T*>(t.items.x), t.items.items, p);
      solve(t, p);
    }
  }
}

}  // namespace

void group_rows_plain(const GroupRow& t, int64_t begin, int64_t end) {
  with_type(t.items.element, [&](auto zero) {
    if constexpr (sizeof(zero) < 8) run<decltype(zero)>(t, begin, end);
  });
}

void group_items(const GroupRow& t, const int32_t* number, int64_t begin, int64_t end) {
  float* out = static_cast<float*>(t.out);
  with_type(t.items.element, [&](auto zero) {
    const auto* x = static_cast<const decltype(zero)*>(t.items.x);
    for (int64_t i = begin; i < end; ++i) {
      const GroupMap& m = t.maps[number[i]];
      out[i] = float((double(widen(x[i])) - double(m.low) + m.shift) * m.gain + 0.);
      t.degenerate[i] = m.degenerate != 0;
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
