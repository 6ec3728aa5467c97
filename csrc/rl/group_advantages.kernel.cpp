// Small groups lie side by side, one per lane of a vector; a large one is spread over the lanes.
#include "rl/group_advantages.h"

#include "common/widen.h"
#include "rl/lanes.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int64_t kSide = 128;  // groups up to this size lie side by side
constexpr int64_t kRows = 512;  // vectors per buffer
constexpr double kInf = __builtin_inf();

struct Buffer {  // values, weights (0 where there is no valid item), lengths
  alignas(kVectorBytes) double x[kRows * W], w[kRows * W], l[kRows * W];
};

// One work item: up to W groups side by side, or one group.
struct Work {
  const GroupRow& t;
  int64_t first;  // group
  int lanes;      // how many groups; 0: one group over all lanes
  int64_t begin[W], size[W];
  int64_t rows;  // vectors, of all buffers together
  bool masked;   // some places hold no valid item
};

struct Straight {
  int64_t operator[](int64_t p) const { return p; }
};
template <class F>
void with_order(const GroupRow& t, const F& f) {
  if (t.order) return f(t.order);
  if (t.long_order) return f(t.long_order);
  f(Straight());
}

// Calls f(place in the buffer, position) for what the vectors [row, row + rows) hold.
template <class F>
void each_place(const Work& k, int64_t row, int64_t rows, const F& f) {
  if (k.lanes) {
    for (int lane = 0; lane < k.lanes; ++lane)
      for (int64_t j = 0; j < k.size[lane]; ++j) f(j * W + lane, k.begin[lane] + j);
  } else {
    const int64_t first = row * W, end = first + rows * W < k.size[0] ? first + rows * W : k.size[0];
    for (int64_t i = first; i < end; ++i) f(i - first, k.begin[0] + i);
  }
}

void fill(const Work& k, Buffer& b, int64_t row, int64_t rows) {
  const GroupRow& t = k.t;
  const GroupItems& items = t.items;
  if (k.masked)
    for (int64_t i = 0; i < rows * W; ++i) b.x[i] = b.w[i] = b.l[i] = 0;
  with_type(items.element, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(items.x);
    with_order(t, [&](auto order) {
      if (!k.masked) {
        each_place(k, row, rows, [&](int64_t i, int64_t p) { b.x[i] = double(widen(x[order[p]])); });
      } else {
        each_place(k, row, rows, [&](int64_t i, int64_t p) {
          const int64_t item = order[p];
          const double value = double(widen(x[item])), weight = items.weights ? items.weights[item] : 1.;
          const bool valid = (!items.valid || items.valid[item]) && weight > 0 && !(t.rule.skip_nan && value != value);
          b.x[i] = valid ? value : 0.;
          b.w[i] = valid ? weight : 0.;
        });
      }
      if (items.lengths) each_place(k, row, rows, [&](int64_t i, int64_t p) { b.l[i] = items.lengths[order[p]]; });
    });
  });
}

// Calls f(vectors in the buffer, first vector) until all have been seen.
template <class F>
void each_block(const Work& k, Buffer& b, const F& f) {
  if (k.rows <= kRows) return f(k.rows, 0);  // filled once, by the caller
  for (int64_t row = 0; row < k.rows; row += kRows) {
    const int64_t rows = k.rows - row < kRows ? k.rows - row : kRows;
    fill(k, b, row, rows);
    f(rows, row);
  }
}

// A sum that does not depend on its order; kTwo: with what the first rounding leaves.
template <bool kTwo>
struct Sum {
  Lanes grain, fine, coarse, rest;
  Sum(Lanes count, Lanes bound) : grain(grain_of(count, bound)), fine(finer(grain, count)) {}
  void add(Lanes term) {
    asm("" : "+x"(term.v));  // rounded by itself, never fused with the sum: else bits would depend on the loop around
    const Lanes q = rounded(term, grain);
    coarse = coarse + q;
    if constexpr (kTwo) rest = rest + rounded(term - q, fine);
  }
  Lanes total(const Work& k) const { return k.lanes ? coarse + rest : sum_over_all(coarse) + sum_over_all(rest); }
};

template <bool kMasked, bool kTwo>
GroupSums<Lanes> measure(const Work& k, Buffer& b) {
  GroupSums<Lanes> s;
  const bool opo = k.t.rule.baseline == Baseline::opo && k.t.out, weighted = k.t.items.weights;
  // Calls f(x, w) with every vector.
  const auto each = [&](auto f) {
    each_block(k, b, [&](int64_t rows, int64_t) {
      for (int64_t j = 0; j < rows; ++j)
        f(Lanes(vec_at(b.x + j * W)), kMasked ? Lanes(vec_at(b.w + j * W)) : Lanes(1.), j);
    });
  };
  const auto largest = [&](Lanes v) { return k.lanes ? v : over_all(v, larger); };

  Lanes low = kInf, high = -kInf, count, heaviest, longest;
  each([&](Lanes x, Lanes w, int64_t j) {
    low = kMasked ? select((w > 0.) & (x < low), x, low) : smaller(x, low);
    high = kMasked ? select((w > 0.) & (x > high), x, high) : larger(x, high);
    if (kMasked) count = count + select(w > 0., 1., 0.);
    if (weighted) heaviest = larger(w, heaviest);
    if (opo) longest = larger(vec_at(b.l + j * W), longest);
  });
  s.count = kMasked ? (k.lanes ? count : sum_over_all(count)) : Lanes(double(k.size[0]));
  s.low = low = k.lanes ? low : over_all(low, smaller);
  s.high = high = largest(high);
  heaviest = weighted ? largest(heaviest) : Lanes(1.);
  const Lanes scale = s.scale = scale_of(high - low);

  const auto sum_up = [&](Lanes bound, auto term) {
    Sum<kTwo> sum(s.count, bound);
    each([&](Lanes x, Lanes w, int64_t j) {
      const Lanes value = term((x - low) * scale, w, j);
      sum.add(kMasked ? select(w > 0., value, 0.) : value);
    });
    return sum.total(k);
  };
  s.weight = weighted ? sum_up(heaviest, [](Lanes, Lanes w, int64_t) { return w; }) : s.count;
  const Lanes mean = s.mean =
      sum_up(heaviest, [](Lanes x, Lanes w, int64_t) { return kMasked ? w * x : x; }) / s.weight;
  s.m2 = sum_up(heaviest, [=](Lanes x, Lanes w, int64_t) {
    const Lanes d = x - mean;
    return kMasked ? w * (d * d) : d * d;
  });
  if (opo) {
    const Lanes bound = heaviest * largest(longest);
    const auto length = [&](int64_t j) { return Lanes(vec_at(b.l + j * W)); };
    const Lanes all = sum_up(bound, [&](Lanes, Lanes w, int64_t j) { return w * length(j); });
    const Lanes of_x = sum_up(bound, [&](Lanes x, Lanes w, int64_t j) { return w * length(j) * x; });
    s.opo = select(all > 0., of_x / all, mean);
  }
  if (k.t.rule.baseline == Baseline::max2 && k.t.out) {
    Lanes second = -kInf, top;
    each([&](Lanes x, Lanes w, int64_t) {
      second = select((w > 0.) & (x < high) & (x > second), x, second);
      top = top + select((w > 0.) & (x == high), 1., 0.);
    });
    s.second = select((k.lanes ? top : sum_over_all(top)) > 1., high, largest(second));
  }
  return s;
}

// The affine map, or what max2 says, where there is a valid item, 0 elsewhere; in place.
void apply(const Work& k, Buffer& b, int64_t rows, const GroupSums<Lanes>& s, const GroupAffine<Lanes>& a,
           Mask single) {
  const bool max2 = k.t.rule.baseline == Baseline::max2;
  const bool own_factor = k.t.rule.baseline == Baseline::loo && k.t.items.weights;
  // As GroupMap has it; a double keeps its last bits.
  const bool wide = k.t.items.element == Element::f64;
  const Lanes base = wide ? s.low : s.low - a.shift, shift = wide ? a.shift : Lanes(0.), gain = a.gain,
              top = (s.high - s.second) * gain, nan = s.m2 - s.m2;
  for (int64_t j = 0; j < rows; ++j) {
    const Lanes x = vec_at(b.x + j * W), w = k.masked ? Lanes(vec_at(b.w + j * W)) : Lanes(1.);
    Lanes y = (x - base + shift) * gain;
    if (max2) y = select(single, y, select(x == s.high, top, 0.) + nan);
    if (own_factor) y = select(single, y, y * loo_factor(s.weight, w));
    vec_at(b.x + j * W) = select(w > 0., y + 0., 0.).v;  // + 0: no negative zeros
  }
}

GroupItem item_at(const GroupRow& t, int64_t position) {
  GroupItem it{0, 0};
  with_type(t.items.element, [&](auto zero) {
    with_order(t, [&](auto order) {
      const int64_t i = order[position];
      it.value = double(widen(static_cast<const decltype(zero)*>(t.items.x)[i]));
      it.weight = t.items.weights ? t.items.weights[i] : 1.;
      if ((t.items.valid && !t.items.valid[i]) || !(it.weight > 0) || (t.rule.skip_nan && it.value != it.value))
        it = {0, 0};
    });
  });
  return it;
}

// Divides by the spread of the others, item by item.
void apply_gain_without(const Work& k, Buffer& b, int64_t row, int64_t rows, const GroupSums<Lanes>& s) {
  const auto divide = [&](int lane, int64_t place, int64_t j) {
    const GroupSums<double> sums{s.count[lane], s.weight[lane], s.low[lane], s.high[lane],  s.scale[lane],
                                 s.mean[lane],  s.m2[lane],     s.opo[lane], s.second[lane]};
    const int64_t begin = k.begin[lane];
    if (!is_single(sums, k.t.rule) && (!k.masked || b.w[place] > 0))
      b.x[place] *= gain_without([&](int64_t q) { return item_at(k.t, begin + q); }, k.size[lane], j, sums, k.t.rule);
  };
  if (k.lanes) {
    for (int lane = 0; lane < k.lanes; ++lane)
      for (int64_t j = 0; j < k.size[lane]; ++j) divide(lane, j * W + lane, j);
  } else {
    for (int64_t i = 0; i < rows * W && row * W + i < k.size[0]; ++i) divide(0, i, row * W + i);
  }
}

template <class T>
void store(const Work& k, const Buffer& b, int64_t row, int64_t rows, const Mask& single) {
  T* out = static_cast<T*>(k.t.out);
  const double alpha = k.t.rule.alpha;
  with_order(k.t, [&](auto order) {
    if (!k.t.blend) return each_place(k, row, rows, [&](int64_t i, int64_t p) { out[order[p]] = T(b.x[i]); });
    each_place(k, row, rows, [&](int64_t i, int64_t p) {
      T& y = out[order[p]];
      if (single.m[k.lanes ? i % W : 0] && k.t.rule.singleton == Singleton::group) return;
      y = alpha == 1 ? T(b.x[i]) : T(alpha * b.x[i] + (1 - alpha) * double(y));
    });
  });
}

void write_stats(const Work& k, const GroupSums<Lanes>& s) {
  double* out = k.t.stats;
  const int64_t groups = k.t.groups;
  for (int lane = 0; lane < (k.lanes ? k.lanes : 1); ++lane) {
    const bool none = s.count[lane] == 0, nan = s.m2[lane] != s.m2[lane];
    const double unit = 1 / s.scale[lane], poison = nan && !none ? s.m2[lane] : 0.;
    double* to = out + k.first + lane;
    to[0] = s.weight[lane];
    to[groups] = none ? 0. : s.low[lane] + s.mean[lane] * unit;
    to[2 * groups] = none ? 0. : s.m2[lane] * unit * unit;
    to[3 * groups] = s.low[lane] + poison;
    to[4 * groups] = s.high[lane] + poison;
  }
}

void solve(Work& k, Buffer& b) {
  if (k.rows <= kRows) fill(k, b, 0, k.rows);
  const GroupRow& t = k.t;
  const GroupSums<Lanes> s = k.lanes ? (k.masked ? measure<true, false>(k, b) : measure<false, false>(k, b))
                                     : (k.masked ? measure<true, true>(k, b) : measure<false, true>(k, b));
  if (!t.out) return write_stats(k, s);
  const GroupAffine<Lanes> a = affine_of(s, t.rule, t.batch_spread, t.items.weights != nullptr);
  const Mask single = is_single(s, t.rule), same = is_degenerate(s);
  if (t.maps) {  // one group
    t.maps[k.first] = GroupMap::of(s.low[0] - a.shift[0], a.gain[0], same.m[0] != 0, s.low[0]);
    return;
  }
  each_block(k, b, [&](int64_t rows, int64_t row) {
    apply(k, b, rows, s, a, single);
    if (t.rule.scale == Spread::loo) apply_gain_without(k, b, row, rows, s);
    if (t.items.element == Element::f64)
      store<double>(k, b, row, rows, single);
    else
      store<float>(k, b, row, rows, single);
  });
  if (t.blend) return;
  with_order(t, [&](auto order) {
    for (int lane = 0; lane < (k.lanes ? k.lanes : 1); ++lane)
      for (int64_t j = 0; j < k.size[lane]; ++j) t.degenerate[order[k.begin[lane] + j]] = same.m[lane] != 0;
  });
}

}  // namespace

void group_rows(const GroupRow& t, int64_t begin, int64_t end) {
  Buffer b;
  const auto start = [&](int64_t g) { return t.offsets ? t.offsets[g] : g * t.group_size; };
  const bool masked = t.items.valid || t.items.weights || t.rule.skip_nan;
  for (int64_t g = begin; g < end;) {
    Work k{t, g, 0, {}, {}, 0, masked};
    int64_t first = start(g);
    if (t.out && start(g + 1) == first) {  // there may be many
      ++g;
      continue;
    }
    for (; k.lanes < W && g < end; ++g, ++k.lanes) {
      const int64_t next = start(g + 1), n = next - first;
      if (n > kSide) break;
      k.begin[k.lanes] = first, k.size[k.lanes] = n, first = next;
      k.masked = k.masked || n != k.size[0];
      k.rows = n > k.rows ? n : k.rows;
    }
    k.masked = k.masked || k.lanes < W;
    if (k.lanes == 0) {
      k.begin[0] = first, k.size[0] = start(++g) - first;
      k.rows = (k.size[0] + W - 1) / W;
      k.masked = masked || k.size[0] % W;
    }
    solve(k, b);
  }
}

}  // namespace gradops::GRADOPS_ISA
