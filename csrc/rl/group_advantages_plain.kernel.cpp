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
[[gnu::always_inline]] inline Lanes rounded_alone(Lanes term, Lanes grain) {
  asm("" : "+x"(term.v));  // as in group_advantages.kernel.cpp: never fused
  return rounded(term, grain);
}

struct Pack {  // W groups; row j of x holds their j-th items
  int64_t first[W], size[W], shortest, longest;
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

template <class T>
[[gnu::always_inline]] inline void map_items(const GroupRow& t, const GroupMap& m, int64_t i, int64_t end) {
  const T* x = static_cast<const T*>(t.items.x);
  float* out = static_cast<float*>(t.out);
  for (; i < end; ++i) {
    out[i] = float((double(widen(x[i])) - double(m.low) + m.shift) * m.gain + 0.);  // + 0: no negative zeros
    t.degenerate[i] = m.degenerate != 0;
  }
}
// Whole vectors, which may reach into the groups that come next, up to `last`.
template <class T>
[[gnu::always_inline]] inline void map_group(const GroupRow& t, const GroupMap& m, int64_t i, int64_t end,
                                             int64_t last) {
  const T* x = static_cast<const T*>(t.items.x);
  const Lanes low = double(m.low), shift = m.shift, gain = m.gain;
  const uint64_t flags = m.degenerate ? 0x0101010101010101u : 0;
  for (; i < end && i + W <= last; i += W) {
    store(static_cast<float*>(t.out) + i, (load(x + i) - low + shift) * gain + 0.);
    __builtin_memcpy(t.degenerate + i, &flags, W);
  }
  map_items<T>(t, m, i, end);
}

constexpr int kSorted = 512;  // groups sorted by size at a time
struct Solved {               // of groups in the order of packs
  alignas(kVectorBytes) double count[kSorted], low[kSorted], high[kSorted], mean[kSorted], m2[kSorted];
};

void measure(Pack& p, Solved& s, int at) {
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
  vec_at(s.count + at) = count.v, vec_at(s.low + at) = low[0].v, vec_at(s.high + at) = high[0].v;
  vec_at(s.mean + at) = mean.v, vec_at(s.m2 + at) = (m2[0] + m2[1]).v;
}

// All divisions and roots together, so that none waits for another. Makes mean, m2, count the shift, gain, degenerate.
void solve(const GroupRow& t, Solved& s, int used) {
  for (int i = 0; i < used; i += W) {
    const Lanes count = vec_at(s.count + i), low = vec_at(s.low + i), high = vec_at(s.high + i);
    const GroupSums<Lanes> sums{count, count, low, high, 1., vec_at(s.mean + i), vec_at(s.m2 + i), 0., 0.};
    const GroupAffine<Lanes> a = affine_of(sums, t.rule, t.batch_spread, false);
    vec_at(s.mean + i) = a.shift.v, vec_at(s.m2 + i) = a.gain.v;
    vec_at(s.count + i) = select(is_degenerate(sums), 1., 0.).v;
  }
}

template <class T>
void run(const GroupRow& t, int64_t begin, int64_t end) {
  const auto start = [&](int64_t g) { return t.offsets ? t.offsets[g] : g * t.group_size; };
  const int64_t last = start(end);
  Pack p;
  Solved s;
  for (int64_t g0 = begin; g0 < end; g0 += kSorted) {
    const int groups = int(end - g0 < kSorted ? end - g0 : kSorted);
    int64_t first[kSorted + 1];
    GroupMap here[kSorted], *maps = t.maps ? t.maps + g0 : here;
    const int64_t after = g0 + groups, then = after + kSorted < end ? after + kSorted : end;
    for (int64_t i = start(after), next = start(then); i < next; i += 64 / sizeof(T))  // sorted, they come in no order
      __builtin_prefetch(static_cast<const T*>(t.items.x) + i), __builtin_prefetch(static_cast<float*>(t.out) + i, 1);
    int place[kLargest + 2] = {}, order[kSorted];
    for (int k = 0; k <= groups; ++k) first[k] = start(g0 + k);
    const auto size = [&](int k) { return first[k + 1] - first[k]; };
    for (int k = 0; k < groups; ++k) {
      if (size(k) <= kLargest)
        ++place[size(k) + 1];
      else if (t.maps)
        group_rows(t, g0 + k, g0 + k + 1);
    }
    place[1] = 0;  // empty groups are left out
    for (int n = 2; n <= kLargest + 1; ++n) place[n] += place[n - 1];
    const int used = place[kLargest + 1];
    for (int k = 0; k < groups; ++k)
      if (size(k) && size(k) <= kLargest) order[place[size(k)]++] = k;
    for (int next = 0; next < used; next += W) {
      for (int k = 0; k < W; ++k) {
        const bool is = next + k < used;
        p.first[k] = is ? first[order[next + k]] : 0;
        p.size[k] = is ? size(order[next + k]) : 0;
        p.count[k] = double(p.size[k]);
      }
      p.shortest = next + W <= used ? p.size[0] : 0;
      p.longest = p.size[next + W <= used ? W - 1 : used - next - 1];
      load_rows(static_cast<const T*>(t.items.x), t.items.items, p);
      measure(p, s, next);
    }
    solve(t, s, used);
    for (int i = 0; i < used; ++i) maps[order[i]] = {s.mean[i], s.m2[i], float(s.low[i]), int32_t(s.count[i])};
    for (int k = 0; k < groups && !t.maps; ++k) {
      if (size(k) > kLargest)
        group_rows(t, g0 + k, g0 + k + 1);
      else
        map_group<T>(t, maps[k], first[k], first[k + 1], last);
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
  with_type(t.items.element, [&](auto zero) {
    for (int64_t i = begin; i < end; ++i) map_items<decltype(zero)>(t, t.maps[number[i]], i, i + 1);
  });
}

}  // namespace gradops::GRADOPS_ISA
