// column_projection.h: one column of a plan, from the entries of alpha - c_j that can matter: among t >= 0 with
// sum(t) = mass and at most max_nz positive entries, the t that maximises <x, t> - reg / 2 |t|^2.
//
// It is t = (x - tau)_+ / reg on the max_nz largest x. Everything is relative to the largest x, so that the weights sum
// to the mass to a few units in the last place however large x is beside reg * mass. Local to the includer.
#pragma once
#include "ot/cost.h"

namespace gradops {

struct ProjectedColumn {
  int64_t kept;     // candidates that remain; their weights are positive. Of mass 0: the largest alone, weight 0
  double tau;       // of mass 0: the largest x, which is the limit; without candidates -infinity
  double smallest;  // the least x among the max_nz largest; -infinity where there were fewer candidates
  double value;     // <x, t> - reg / 2 |t|^2; -infinity where there is mass and no candidate
};

namespace {

// Moves the `keep` largest x, ties to the lowest row, to the front without changing their order; rows ascend.
// Returns the least of them.
GRADOPS_SHARED double keep_largest(double* x, int32_t* row, int64_t count, int64_t keep) {
  // Hoare's selection on a copy would need memory: bisect by rank instead. `above` entries are > pivot.
  double low = x[0], high = x[0];
  for (int64_t i = 1; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  // The keep-th largest lies in [low, high]; each turn halves the candidates between, or ends on equal ones.
  double least = low;
  while (low < high) {
    double middle = low + (high - low) / 2;
    if (!(middle < high)) middle = low;  // neighbours
    int64_t above = 0;
    double next_above = high, last_below = low;
    for (int64_t i = 0; i < count; ++i) {
      above += x[i] > middle;
      if (x[i] > middle && x[i] < next_above) next_above = x[i];
      if (x[i] <= middle && x[i] > last_below) last_below = x[i];
    }
    if (above >= keep)
      low = next_above;
    else
      high = last_below;
    least = low;
  }
  int64_t larger = 0, kept = 0;
  for (int64_t i = 0; i < count; ++i) larger += x[i] > least;
  int64_t equal = keep - larger;
  for (int64_t i = 0; i < count && kept < keep; ++i) {
    if (!(x[i] >= least) || (x[i] == least && equal-- <= 0)) continue;
    x[kept] = x[i];
    row[kept++] = row[i];
  }
  return least;
}

// x[0 .. count): values, finite or -infinity, of rows in ascending order; max_nz >= 1. Afterwards x[0 .. kept) are
// the positive weights and row[0 .. kept) their rows, ascending. O(count) a turn, a few turns. If candidates are all
// entries above `low`, the result is exact where tau >= low or smallest >= low.
GRADOPS_SHARED ProjectedColumn project_column(double* x, int32_t* row, int64_t count, int64_t max_nz, double reg,
                                              double mass) {
  const double infinity = __builtin_inf();
  double largest = -infinity, smallest = -infinity;
  for (int64_t i = 0; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  if (!(largest > -infinity)) return {0, -infinity, -infinity, mass > 0 ? -infinity : 0.};
  if (count > max_nz) {
    smallest = keep_largest(x, row, count, max_nz);
    count = max_nz;
  } else if (count == max_nz) {
    smallest = x[0];
    for (int64_t i = 1; i < count; ++i) smallest = x[i] < smallest ? x[i] : smallest;
  }
  if (!(mass > 0)) {
    int64_t i = 0;
    while (x[i] < largest) ++i;
    row[0] = row[i];
    x[0] = 0;
    return {1, largest, smallest, 0.};
  }
  // tau from below: of a set that holds the support, (sum - reg mass) / size is at most tau (Michelot).
  const double scaled = reg * mass;
  double tau = -scaled, last = tau;
  int64_t kept = -1;
  for (int64_t before = count + 1; kept != before;) {
    before = kept;
    double sum = 0;
    kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double y = x[i] - largest;
      if (y > tau) sum += y, ++kept;
    }
    last = (sum - scaled) / double(kept);
    tau = last > tau ? last : tau;  // never back: rounding cannot make it turn in a circle
  }
  tau = last;  // of the last set alone: no bit depends on the sets before it
  double value = 0;
  kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double y = x[i] - largest, t = (y - tau) / reg;
    if (!(t > 0)) continue;
    value += t * (y - .5 * reg * t);
    x[kept] = t;
    row[kept++] = row[i];
  }
  return {kept, largest + tau, smallest, value + mass * largest};
}

}  // namespace
}  // namespace gradops
