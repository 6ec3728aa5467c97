// candidates.h: lists of the rows that can be in a column's support, refreshed only where alpha has moved too far.
// Written for any Team (ot/team.h); local to the includer.
#pragma once
#include "ot/column_scan.h"
#include "ot/transport.h"

namespace gradops {
namespace {

enum ListMark : int32_t { kListGood, kListStale, kListLong };

struct Candidate {
  int32_t row;
  double cost;
};

GRADOPS_TEAM int32_t list_length(int64_t count, int64_t kept) { return count > 4 * kept + 32 ? kListLong : kListGood; }

// Nothing is known: every list is stale.
template <class Team>
GRADOPS_TEAM void forget_lists(Team& team, const Transport& t, TransportState& s) {
  const Candidates& c = s.lists;
  s.lists.newest = -1;
  s.list_work = t.cost.n;
  team.each(t.cost.m, [&](int64_t j) {
    c.count[j] = c.epoch[j] = 0;
    c.low[j] = kInfinity, c.guess[j] = 0;
  });
  team.each(kEpochs, [&](int64_t e) { c.rise[e] = 0; });
}

// How far the outside of each epoch's lists may have come up.
template <class Team>
GRADOPS_TEAM void measure_rise(Team& team, const Transport& t, TransportState& s, const double* alpha) {
  const Candidates& c = s.lists;
  const int64_t n = t.cost.n;
  for (int32_t e = c.newest; e >= 0 && e > c.newest - kEpochs; --e) {
    const double* past = c.past + e % kEpochs * n;
    const double rise = team.largest(n, [&](int64_t i) { return alpha[i] - past[i]; });
    team.once([&] { c.rise[e % kEpochs] = rise; });
  }
}

// A new epoch at alpha. The oldest one ends: its columns move to the next, their bound by as much as alpha rose.
template <class Team>
GRADOPS_TEAM void open_epoch(Team& team, const Transport& t, TransportState& s, const double* alpha) {
  Candidates& c = s.lists;
  const int64_t n = t.cost.n, m = t.cost.m;
  const int32_t last = c.newest + 1 - kEpochs;
  if (last >= 0) {
    const double *oldest = c.past + last % kEpochs * n, *next = c.past + (last + 1) % kEpochs * n;
    const double rise = team.largest(n, [&](int64_t i) { return next[i] - oldest[i]; });
    team.each(m, [&](int64_t j) {
      if (c.epoch[j] == last) c.epoch[j] = last + 1, c.low[j] += rise;
    });
  }
  c.newest += 1;
  double* past = c.past + c.newest % kEpochs * n;
  team.each(n, [&](int64_t i) { past[i] = alpha[i]; });
  team.once([&] { c.rise[c.newest % kEpochs] = 0; });
}

// From a cold start supports are wide: if there is room and the costs are few, every row is a candidate at first, and
// nothing has to be scanned. Larger costs would leave the caches.
constexpr int64_t kListAll = 1 << 12;
GRADOPS_TEAM bool may_list_all(const Transport& t) { return t.capacity >= t.cost.n && t.cost.n * t.cost.m <= kListAll; }
template <class Team>
GRADOPS_TEAM void list_all(Team& team, const Transport& t, TransportState& s, const double* alpha) {
  open_epoch(team, t, s, alpha);
  const Candidates& c = s.lists;
  const int64_t n = t.cost.n, m = t.cost.m, capacity = t.capacity;
  constexpr int64_t kBlock = 16;  // columns of a cache line
  team.columns((m + kBlock - 1) / kBlock, kBlock * n, [&](int64_t block, const auto& lanes) {
    const int64_t begin = block * kBlock, end = begin + kBlock < m ? begin + kBlock : m;
    const auto list = [&](const auto& cost) {
      lanes.each(n, [=](int64_t i) {
        for (int64_t j = begin; j < end; ++j)
          c.index[j * capacity + i] = int32_t(i), c.cost[j * capacity + i] = cost(i, j) - s.shift;
      });
    };
    if (t.cost.matrix && t.cost.element == Element::f32) {  // mostly; a loop without cases
      const float* matrix = static_cast<const float*>(t.cost.matrix);
      list([=](int64_t i, int64_t j) { return double(matrix[i * m + j]); });
    } else {
      list([=](int64_t i, int64_t j) { return cost_at(t.cost, i, j); });
    }
    lanes.each(end - begin, [=](int64_t l) {
      const int64_t j = begin + l;
      c.count[j] = int32_t(n), c.epoch[j] = c.newest, c.low[j] = -kInfinity, c.guess[j] = kInfinity;
    });
  });
}

// Scans the stale columns and shortens the long lists. What a list keeps beyond the support lets alpha move: here a
// third of the support's own height, and `spare` times the column's mass besides.
template <class Team>
GRADOPS_TEAM bool refresh(Team& team, const Transport& t, TransportState& s, const double* alpha, double reg,
                          double spare) {
  const int64_t m = t.cost.m;
  const bool cold = s.lists.newest < 0;
  open_epoch(team, t, s, alpha);
  const Candidates& c = s.lists;
  const int32_t newest = c.newest;
  const double slack = 1e-15 * ((s.shift < 0 ? -s.shift : s.shift) + s.spread);  // rounding of a shifted cost
  ColumnScan scan{t.cost, alpha, c.scan_low, c.index, c.scan_count, t.capacity, c.cost, true, s.shift};
  if (cold) {
    team.each(m, [&](int64_t j) { s.columns[0][j] = reg * t.b[j], c.scan_low[j] = 0; });
    team.bounds(scan, s.columns[0], t.max_nz);
    team.each(m, [&](int64_t j) {
      if (!(t.b[j] > 0)) c.scan_low[j] = kInfinity;
      c.low[j] = c.scan_low[j] + s.shift;
    });
  } else {
    team.columns(m, s.list_work, [&](int64_t j, const auto& lanes) {
      if (c.mark[j] == kListGood) {
        lanes.once([&] { c.scan_low[j] = kInfinity; });
        return;
      }
      const int64_t at = j * t.capacity;
      const auto x = [=](int64_t k) { return alpha[c.index[at + k]] - c.cost[at + k]; };
      const double level = c.guess[j], top = lanes.largest(c.count[j], x), height = top - level;
      const double low = level - (height > 0 ? height / 3 : 0) - spare * t.b[j] - 1e-14 * __builtin_fabs(level) - slack;
      if (c.mark[j] == kListStale) {
        lanes.once([&] { c.scan_low[j] = low - s.shift, c.low[j] = low + slack; });
        return;
      }
      const int64_t kept = lanes.keep(
          c.count[j], [=](int64_t k) { return Candidate{c.index[at + k], c.cost[at + k]}; },
          [=](Candidate v) { return alpha[v.row] - v.cost > low; },
          [=](Candidate v, int64_t place) { c.index[at + place] = v.row, c.cost[at + place] = v.cost; });
      lanes.once([&] {
        const double bound = c.low[j] + c.rise[c.epoch[j] % kEpochs];
        c.count[j] = int32_t(kept), c.epoch[j] = newest, c.low[j] = bound > low ? bound : low;
        c.scan_low[j] = kInfinity;
      });
    });
  }
  team.scan(scan);
  const auto crowded = [&](int64_t j) { return c.scan_low[j] < kInfinity && c.scan_count[j] > t.capacity ? 1. : 0.; };
  if (team.sum(m, crowded) > 0) {  // once more with nothing to spare
    if (cold) return false;
    team.each(m, [&](int64_t j) {
      if (crowded(j) > 0) {
        c.low[j] = c.guess[j] - spare * t.b[j] - 1e-14 * __builtin_fabs(c.guess[j]);
        c.scan_low[j] = c.low[j] - slack - s.shift;
      }
    });
    team.scan(scan);
    if (team.sum(m, crowded) > 0) return false;
  }
  team.each(m, [&](int64_t j) {
    if (c.scan_low[j] < kInfinity) c.count[j] = c.scan_count[j], c.epoch[j] = newest;
  });
  s.scanned += team.sum(m, [&](int64_t j) { return c.scan_low[j] < kInfinity ? 1. : 0.; });
  return true;
}

}  // namespace
}  // namespace gradops
