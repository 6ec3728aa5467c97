// How a group of rewards becomes advantages: the options of group_advantages, and the sums they rest on.
//
// Every sum is made of terms first rounded to multiples of one power of two, coarse enough that no partial sum is
// ever rounded: so no bit of a sum depends on its order, nor a bit of a result on the order of a group's members or
// on threads. Terms are scaled (exactly, by a power of two) to magnitudes up to 1 before; a group of n keeps
// 51 - log2(n) bits after the point, and large groups add what was rounded off in a second sum of the same kind.
#pragma once
#include <cstdint>

#include "common/element.h"

namespace gradops {

enum class Baseline : int64_t { mean, loo, opo, max2, none };
enum class Spread : int64_t { group, batch, loo, mean, none };  // what a centred reward is divided by
enum class EpsMode : int64_t { add, max, var };
enum class Singleton : int64_t { zero, keep, group };

struct GroupRule {
  Baseline baseline;
  Spread scale;
  EpsMode eps_mode;
  Singleton singleton;
  bool keep_degenerate;
  bool skip_nan;  // a NaN reward is not valid
  bool blend;     // strata: alpha times the advantages inside them + (1 - alpha) times those of the whole groups
  double correction, eps, alpha;
};

// `batch` rows of `items` numbers; every row falls into the same groups.
struct GroupItems {
  const void* x;
  Element element;
  int64_t batch, items;
  const bool* valid;      // [items] or null
  const double* weights;  // [items] or null; not positive: not valid
  const double* lengths;  // [items] or null
};

// Group g is the items offsets[g] .. offsets[g + 1], or g * group_size .. (g + 1) * group_size where offsets is null;
// or, where ids is not null, the items with one value of ids (and of strata).
struct Groups {
  const int64_t* offsets;
  int64_t groups, group_size;
  const int64_t* ids;
  const int64_t* strata;
};

// What is known of a group; D is double, or a vector with one group per lane. x = (value - low) * scale <= 1.
template <class D>
struct GroupSums {
  D count, weight;  // of valid items
  D low, high;
  D scale;
  D mean, m2;  // of x: sum w x / sum w, sum w (x - mean)^2
  D opo;       // of x: sum l w x / sum l w
  D second;    // the largest value below `high`, or `high` if two items have it
};

// A value becomes (value - low + shift) * gain.
template <class D>
struct GroupAffine {
  D shift, gain;
};

namespace {

GRADOPS_BOTH inline double bits_double(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  return __builtin_bit_cast(double, bits);
#endif
}
GRADOPS_BOTH inline uint64_t double_bits(double x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  return __builtin_bit_cast(uint64_t, x);
#endif
}
GRADOPS_BOTH inline double select(bool c, double a, double b) { return c ? a : b; }
GRADOPS_BOTH inline double root(double x) { return __builtin_sqrt(x); }

// The power of two above x >= 0, at most twice x; something finite for what is no finite number.
GRADOPS_BOTH inline double above(double x) {
  const uint64_t exponent = (double_bits(x) >> 52 & 0x7ff) + 1;
  return bits_double((exponent > 2045 ? 2045 : exponent) << 52);
}
// Its inverse.
GRADOPS_BOTH inline double scale_of(double x) { return bits_double((uint64_t(2046) << 52) - double_bits(above(x))); }

// Adding and subtracting it rounds a term of magnitude up to `bound`, for a sum of up to `count` terms.
template <class D>
GRADOPS_BOTH inline D grain_of(D count, D bound) {
  return 1.5 * above(count) * above(bound);
}
// The grain for what the first one rounds off.
template <class D>
GRADOPS_BOTH inline D finer(D grain, D count) {
  return grain * 0x1p-51 * above(count);
}
template <class D>
GRADOPS_BOTH inline D rounded(D term, D grain) {
  return (term + grain) - grain;
}

// 1 / spread, with eps; 0 where that would be a division by zero.
template <class D>
GRADOPS_BOTH inline D gain_of(D spread, const GroupRule& rule) {
  const double eps = rule.eps;
  D d = spread + eps;
  if (rule.eps_mode == EpsMode::max) d = select(spread < eps, D() + eps, spread);
  if (rule.eps_mode == EpsMode::var) d = root(spread * spread + eps);
  return select(d == 0., D(), 1. / d);
}

// Whether there are too few items for the spread asked for: then the rule for singletons holds.
template <class D>
GRADOPS_BOTH inline auto is_single(const GroupSums<D>& s, const GroupRule& rule) {
  const bool divides = rule.scale == Spread::group || rule.scale == Spread::loo;
  // Weights such as 1/3, 1/3, 1/3 stand for one item although their sum is rounded.
  return (s.count < 2.) | (s.weight <= (divides ? rule.correction * (1 + 1e-9) : -1.));
}
// m2 is a number where all items are: a NaN makes it NaN, also where low == high.
template <class D>
GRADOPS_BOTH inline auto is_degenerate(const GroupSums<D>& s) {
  return (s.count < 2.) | ((s.low == s.high) & (s.m2 == s.m2));
}

// For every combination but a leave-one-out spread, which differs from item to item; of max2, only the gain.
template <class D>
GRADOPS_BOTH inline GroupAffine<D> affine_of(const GroupSums<D>& s, const GroupRule& rule, double batch_spread,
                                             bool weighted) {
  const D unit = 1. / s.scale, one = D() + 1., mean = s.mean * unit;
  GroupAffine<D> a{-mean, one};
  if (rule.scale == Spread::group) a.gain = gain_of(root(s.m2 / (s.weight - rule.correction)) * unit, rule);
  if (rule.scale == Spread::batch) a.gain = gain_of(D() + batch_spread, rule);
  if (rule.scale == Spread::mean) a.gain = gain_of(s.low + mean, rule);
  // x - mean of the others = (x - mean) n / (n - 1); with weights the factor is the item's own, loo_factor.
  if (rule.baseline == Baseline::loo && !weighted) a.gain = a.gain * (s.count / (s.count - 1.));
  if (rule.baseline == Baseline::opo) a.shift = -s.opo * unit;
  if (rule.baseline == Baseline::none) a.shift = s.low;
  if (!rule.keep_degenerate) a.gain = select(is_degenerate(s), D(), a.gain);
  const auto single = is_single(s, rule);
  if (rule.singleton == Singleton::keep) {  // as if its baseline were 0 and its spread 1
    D gain = one;
    if (rule.scale == Spread::batch)
      gain = gain_of(D() + batch_spread, rule);
    else if (rule.scale != Spread::none)
      gain = gain_of(one, rule);
    a.shift = select(single, s.low, a.shift);
    a.gain = select(single, gain, a.gain);
  } else {
    a.shift = select(single, D(), a.shift);
    a.gain = select(single, D(), a.gain);
  }
  return a;
}
template <class D>
GRADOPS_BOTH inline D loo_factor(D all, D weight) {
  return select(all > weight, all / (all - weight), D() + 1.);
}

struct GroupItem {
  double value, weight;  // the weight is 0 where the item is not valid
};
// 1 / (the spread of a group without its item i, plus eps); 1 where that spread is 0. at(j): item j of n.
//
// Leaving an item out takes W w / (W - w) (x - mean)^2 off m2. That is accurate where a quarter is left; for the one
// item of three or more for which it is not, the others are measured by themselves.
template <class At>
GRADOPS_BOTH inline double gain_without(const At& at, int64_t n, int64_t i, const GroupSums<double>& s,
                                        const GroupRule& rule) {
  const GroupItem me = at(i);
  const double all = s.weight - me.weight, d = (me.value - s.low) * s.scale - s.mean;
  if (s.count < 3 || all <= rule.correction) return gain_of(1., rule);
  double m2 = s.m2 - s.weight * me.weight / all * d * d;
  if (m2 < s.m2 * 0.25) {
    double low = 0, high = 0, heaviest = 0;
    bool any = false;
    for (int64_t j = 0; j < n; ++j) {
      const GroupItem it = at(j);
      if (j == i || !(it.weight > 0)) continue;
      low = !any || it.value < low ? it.value : low;
      high = !any || it.value > high ? it.value : high;
      heaviest = it.weight > heaviest ? it.weight : heaviest;
      any = true;
    }
    const double scale = scale_of(high - low), grain = grain_of(s.count, heaviest), fine = finer(grain, s.count);
    double mean = 0;
    for (int pass = 0; pass < 2; ++pass) {
      double coarse = 0, rest = 0;
      for (int64_t j = 0; j < n; ++j) {
        const GroupItem it = at(j);
        if (j == i || !(it.weight > 0)) continue;
        const double x = (it.value - low) * scale - mean, term = it.weight * (pass ? x * x : x);
        const double q = rounded(term, grain);
        coarse += q;
        rest += rounded(term - q, fine);
      }
      (pass ? m2 : mean) = pass ? coarse + rest : (coarse + rest) / all;
    }
    m2 = low == high ? 0. : m2 * (s.scale / scale) * (s.scale / scale);
  }
  const double spread = root(m2 / (all - rule.correction)) / s.scale;
  return spread == 0 ? 1. : gain_of(spread, rule);
}

}  // namespace
}  // namespace gradops
