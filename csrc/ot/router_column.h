// router_column.h: which entries of one column of alpha - C a plan may use, and the threshold of its weights, for the
// CPU and the CUDA kernels alike. Local to the includer.
//
// A team reads a column: one CPU thread, or a warp. All its members call with the same arguments and get the same.
#pragma once
#include "common/float_key.h"

namespace gradops {
namespace {

template <class A>
struct Cut {
  A top;     // the largest entry
  A edge;    // entries above it are in, and those equal to it ...
  int last;  // ... up to this position
  A tau;     // from top; weights are (x - top - tau)_+ / gamma
};

// The weight times gamma: sums that run from the largest entry keep their precision for a small gamma. Zero for
// entries of -infinity, also in a column that has no others.
template <class A>
GRADOPS_SHARED A weight(const Cut<A>& c, A x, int i) {
  const A w = (x - c.top) - c.tau;
  return (x > c.edge || (x == c.edge && i <= c.last)) && w > 0 ? w : A(0);
}

// Sets edge and last: the k largest of n entries, ties to the first. Probes near `guess`, widening by `reach`, then
// between counts: an entry moves little between two steps.
template <class A, class Team, class At>
GRADOPS_SHARED void find_edge(const Team& team, int n, int k, A guess, A reach, At at, Cut<A>& cut) {
  using Key = KeyOf<A>;
  const A infinity = A(__builtin_inf());
  cut.edge = -infinity;
  cut.last = n;
  int many = team.count(n, [&](int i) { return at(i) > -infinity; }), few = 0;  // entries from low, from high
  if (many <= k) return;
  Key low = key_of(-infinity), high = key_of(cut.top) + 1;
  A probe = guess;
  for (int turn = 0;; ++turn) {
    Key key = key_of(probe);
    if (turn % 4 == 3 || !(key > low && key < high))
      key = Key(low + Key((std::make_unsigned_t<Key>(high) - std::make_unsigned_t<Key>(low)) / 2));
    const A from = number_of<A>(key);
    const int count = key > low ? team.count(n, [&](int i) { return at(i) >= from; }) : many;
    if (count == k) {
      cut.edge = from;
      return;
    }
    if (count > k)
      low = key, many = count;
    else
      high = key, few = count;
    if (high - 1 == low) break;
    const A left = number_of<A>(low), right = number_of<A>(high);
    if (!(left > -infinity))
      probe = right - reach;
    else if (!few)
      probe = left + reach;
    else
      probe = left + (right - left) * (A(many - k) / A(many - few));
    reach *= 4;
  }
  cut.edge = number_of<A>(low);  // equal entries on both sides of the edge: the first k - few of them
  int before = -1;
  cut.last = n - 1;
  while (cut.last - before > 1) {
    const int middle = before + (cut.last - before) / 2;
    if (team.count(n, [&](int i) { return i <= middle && at(i) == cut.edge; }) >= k - few)
      cut.last = middle;
    else
      before = middle;
  }
}

// The column's projection: weights of at most k entries that sum to scaled / gamma.
template <class A, class Team, class At>
GRADOPS_SHARED Cut<A> cut_column(const Team& team, int n, int k, A scaled, A guess, A reach, At at) {
  const A infinity = A(__builtin_inf());
  Cut<A> cut{team.largest(n, at), -infinity, n, infinity};
  if (!(cut.top > -infinity) || !(scaled > 0)) return cut;
  find_edge(team, n, k, guess, reach, at, cut);
  // tau from below: of a set that holds the support, (sum - scaled) / size is at most tau (Michelot)
  cut.tau = -infinity;
  for (int before = n + 1;;) {
    const int size = team.count(n, [&](int i) { return weight(cut, at(i), i) > 0; });
    if (size >= before) return cut;
    before = size;
    const A sum = team.sum(n, [&](int i) {
      const A x = at(i);
      return weight(cut, x, i) > 0 ? x - cut.top : A(0);
    });
    const A tau = (sum - scaled) / A(size);
    cut.tau = tau > cut.tau ? tau : cut.tau;
    if (cut.edge - cut.top > cut.tau) return cut;
  }
}

// Adam on what is minimised, whose gradient is the plan's row sum less the row's mass. Differences within the rounding
// of the sums count as none: Adam would make whole steps of them.
template <class A>
struct Adam {
  A first, second, lr, noise;  // bias corrections
  GRADOPS_SHARED static constexpr A epsilon() { return sizeof(A) == 8 ? A(2.220446049250313e-16) : A(1.1920929e-7f); }
  GRADOPS_SHARED void operator()(A sum, A mass, A& alpha, A& m, A& v) const {
    const A d = sum - mass, size = d > 0 ? d : -d, g = size > noise * mass ? d : A(0);
    m = A(0.9) * m + A(0.1) * g;
    v = A(0.999) * v + A(0.001) * (g * g);
    alpha -= lr * (m * first) / (A(__builtin_sqrt(v * second)) + A(1e-8));
  }
};

}  // namespace
}  // namespace gradops
