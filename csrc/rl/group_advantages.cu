// A group is measured by a team: 8, 16 or 32 lanes of a warp where it is small, a block where it is large. Sums do
// not depend on their order (group_rules.h), so neither does a result on the team.
//
// Groups given by labels: a block owns the labels that hash to it. It reads all of them, lists its own, and sorts
// those into groups by a hash table in global memory, which fits whatever the labels are. The order in which atomics
// happen to come decides where things lie, and nothing else.
#include <cmath>

#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "rl/group_advantages.h"

namespace gradops {
namespace {

constexpr int kThreads = 128;
constexpr int kPerLane = 8;            // a team of lanes takes groups up to 8 times its size
constexpr int64_t kOneLaunch = 65536;  // up to here every block measures the whole batch itself, where it must
constexpr double kInf = HUGE_VAL;

struct Smaller {
  __device__ double operator()(double a, double b) const { return a < b ? a : b; }
};

template <int L>
struct LanesTeam {
  static constexpr int size = L;
  int rank = threadIdx.x % L;
  template <class F>
  __device__ double all(double v, double, F op) const {
    for (int step = L / 2; step > 0; step /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, step, L));
    return v;
  }
};
struct BlockTeam {
  static constexpr int size = kThreads;
  double* scratch;
  int rank = threadIdx.x;
  __device__ explicit BlockTeam(double* scratch) : scratch(scratch) {}
  template <class F>
  __device__ double all(double v, double zero, F op) const {
    return block_all(v, zero, scratch, op);
  }
};

struct Task {
  GroupItems items;  // of one row, after at_row
  Groups groups;
  GroupRule rule;
  void* out;
  double* stats;
  bool* degenerate;
  const double* batch_spread;  // [batch], or null
  bool measures_batch;
  int64_t item_bytes;

  __device__ void at_row(int64_t row) {
    const int64_t begin = row * items.items;
    items.x = static_cast<const char*>(items.x) + begin * item_bytes;
    if (out)
      out = static_cast<char*>(out) + begin * (items.element == Element::f64 ? 8 : 4), degenerate += begin;
    else if (stats)
      stats += row * 5 * groups.groups;
    if (batch_spread) batch_spread += row;
  }
  __device__ void put(int64_t i, double y) const {
    if (items.element == Element::f64)
      static_cast<double*>(out)[i] = y;
    else
      static_cast<float*>(out)[i] = float(y);
  }
  __device__ double advantage(int64_t i) const {
    return number_at(items.element == Element::f64 ? Element::f64 : Element::f32, out, i);
  }
};

// The items of a group: first, first + 1, ...; or those that `member` lists from there on.
struct Members {
  const Task& t;
  int64_t first, n;
  const int* member;
  __device__ int64_t index(int64_t j) const { return member ? member[first + j] : first + j; }
  __device__ GroupItem operator()(int64_t j) const {
    const int64_t i = index(j);
    const double value = number_at(t.items.element, t.items.x, i);
    const double weight = t.items.weights ? t.items.weights[i] : 1.;
    if ((t.items.valid && !t.items.valid[i]) || !(weight > 0) || (t.rule.skip_nan && value != value)) return {0., 0.};
    return {value, weight};
  }
};

template <class Team>
__device__ GroupSums<double> measure(const Team& team, const Members& at, bool whole) {
  const Task& t = at.t;
  const bool opo = t.out && !whole && t.rule.baseline == Baseline::opo;
  const bool max2 = t.out && !whole && t.rule.baseline == Baseline::max2;
  double low = kInf, high = -kInf, count = 0, heaviest = 0, longest = 0;
  for (int64_t j = team.rank; j < at.n; j += Team::size) {
    const GroupItem it = at(j);
    if (!(it.weight > 0)) continue;
    low = it.value < low ? it.value : low;
    high = it.value > high ? it.value : high;
    heaviest = it.weight > heaviest ? it.weight : heaviest;
    if (opo) longest = Larger()(t.items.lengths[at.index(j)], longest);
    count += 1;
  }
  GroupSums<double> s{};
  s.count = team.all(count, 0., Add());
  s.low = team.all(low, kInf, Smaller());
  s.high = team.all(high, -kInf, Larger());
  heaviest = t.items.weights ? team.all(heaviest, 0., Larger()) : 1.;
  s.scale = scale_of(s.high - s.low);

  const auto sum_up = [&](double bound, auto term) {
    const double grain = grain_of(s.count, bound), fine = finer(grain, s.count);
    double coarse = 0, rest = 0;
    for (int64_t j = team.rank; j < at.n; j += Team::size) {
      const GroupItem it = at(j);
      if (!(it.weight > 0)) continue;
      const double v = term((it.value - s.low) * s.scale, it.weight, j), q = rounded(v, grain);
      coarse += q;
      rest += rounded(v - q, fine);
    }
    coarse = team.all(coarse, 0., Add());
    return coarse + team.all(rest, 0., Add());
  };
  s.weight = t.items.weights ? sum_up(heaviest, [](double, double w, int64_t) { return w; }) : s.count;
  const double mean = s.mean = sum_up(heaviest, [](double x, double w, int64_t) { return w * x; }) / s.weight;
  s.m2 = sum_up(heaviest, [=](double x, double w, int64_t) { return w * ((x - mean) * (x - mean)); });
  if (opo) {
    const double bound = heaviest * team.all(longest, 0., Larger());
    const auto length = [&](int64_t j) { return t.items.lengths[at.index(j)]; };
    const double all = sum_up(bound, [&](double, double w, int64_t j) { return w * length(j); });
    const double of_x = sum_up(bound, [&](double x, double w, int64_t j) { return w * length(j) * x; });
    s.opo = all > 0 ? of_x / all : mean;
  }
  if (max2) {
    double second = -kInf, top = 0;
    for (int64_t j = team.rank; j < at.n; j += Team::size) {
      const GroupItem it = at(j);
      if (!(it.weight > 0)) continue;
      second = it.value < s.high && it.value > second ? it.value : second;
      top += it.value == s.high ? 1 : 0;
    }
    second = team.all(second, -kInf, Larger());
    s.second = team.all(top, 0., Add()) > 1 ? s.high : second;
  }
  return s;
}

__device__ double spread_of(const GroupSums<double>& s, const GroupRule& rule) {
  const double n = s.weight - rule.correction;
  return s.count > 0 && n > 0 ? sqrt(s.m2 / n) / s.scale : 0.;
}

// group: its number, where its statistics go.
template <class Team>
__device__ void solve(const Team& team, const Members& at, int64_t group, double batch_spread, bool blend) {
  const Task& t = at.t;
  const GroupRule& rule = t.rule;
  const GroupSums<double> s = measure(team, at, false);
  if (!t.out) {
    if (team.rank || group < 0 || group >= t.groups.groups) return;
    const double unit = 1 / s.scale, poison = s.count > 0 && s.m2 != s.m2 ? s.m2 : 0.;
    double* to = t.stats + group;
    to[0] = s.weight;
    to[t.groups.groups] = s.count > 0 ? s.low + s.mean * unit : 0.;
    to[2 * t.groups.groups] = s.count > 0 ? s.m2 * unit * unit : 0.;
    to[3 * t.groups.groups] = s.low + poison;
    to[4 * t.groups.groups] = s.high + poison;
    return;
  }
  const bool weighted = t.items.weights != nullptr, single = is_single(s, rule), same = is_degenerate(s);
  const GroupAffine<double> a = affine_of(s, rule, batch_spread, weighted);
  for (int64_t j = team.rank; j < at.n; j += Team::size) {
    const GroupItem it = at(j);
    const int64_t i = at.index(j);
    if (!blend) t.degenerate[i] = same;
    if (blend && single && rule.singleton == Singleton::group) continue;
    double y = (it.value - s.low + a.shift) * a.gain;
    if (rule.baseline == Baseline::max2 && !single)
      y = (it.value == s.high ? (s.high - s.second) * a.gain : 0.) + (s.m2 - s.m2);
    if (rule.baseline == Baseline::loo && weighted && !single) y *= loo_factor(s.weight, it.weight);
    if (rule.scale == Spread::loo && !single && it.weight > 0) y *= gain_without(at, at.n, j, s, rule);
    y = it.weight > 0 ? y + 0. : 0.;  // + 0: no negative zeros
    t.put(i, blend && rule.alpha != 1 ? rule.alpha * y + (1 - rule.alpha) * t.advantage(i) : y);
  }
}

// What rewards are divided by with Spread::batch; the whole block must call.
__device__ double batch_spread(const Task& t, double* scratch) {
  if (!t.measures_batch) return t.batch_spread ? *t.batch_spread : 0.;
  const Members all{t, 0, t.items.items, nullptr};
  return spread_of(measure(BlockTeam(scratch), all, true), t.rule);
}

__global__ void __launch_bounds__(kThreads) whole_batch(const __grid_constant__ Task given, double* spread) {
  __shared__ double scratch[32];
  Task t = given;
  t.at_row(blockIdx.x);
  t.measures_batch = true;
  const double s = batch_spread(t, scratch);
  if (threadIdx.x == 0) spread[blockIdx.x] = s;
}

// 0 for what is in no group because offsets do not reach from 0 to the end.
__device__ void zero_rest(const Task& t) {
  const int64_t n = t.items.items, *o = t.groups.offsets;
  if (!t.out || !o) return;
  const int64_t first = o[0], end = o[t.groups.groups];
  if (first <= 0 && end >= n) return;
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    if (i < first || i >= end) t.put(i, 0), t.degenerate[i] = true;
}

// Groups one after another: each team of the block has one, and then the block those too large for a team.
template <int L>
__global__ void __launch_bounds__(kThreads) in_order(const __grid_constant__ Task given) {
  __shared__ double scratch[32];
  constexpr int kTeams = kThreads / L;
  Task t = given;
  t.at_row(blockIdx.y);
  const double spread = batch_spread(t, scratch);
  const auto members = [&](int64_t g) {
    const int64_t n = t.items.items, *o = t.groups.offsets;
    int64_t first = 0, end = 0;
    if (g < t.groups.groups)
      first = o ? o[g] : g * t.groups.group_size, end = o ? o[g + 1] : first + t.groups.group_size;
    first = first < 0 ? 0 : first, end = end > n ? n : end;
    return Members{t, first, end > first ? end - first : 0, nullptr};
  };
  if (blockIdx.x == 0) zero_rest(t);
  const int64_t g0 = int64_t(blockIdx.x) * kTeams, g = g0 + threadIdx.x / L;
  Members mine = members(g);
  const bool large = mine.n > L * kPerLane;
  if (large) mine.n = 0;  // the lanes still take part in the warp's shuffles
  solve(LanesTeam<L>(), mine, large ? -1 : g, spread, false);
  for (int k = 0; k < kTeams; ++k) {
    const Members m = members(g0 + k);
    if (m.n > L * kPerLane) solve(BlockTeam(scratch), m, g0 + k, spread, false);
  }
}

__device__ uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// Memory of one row; a block has a part of each array, in proportion to its items.
struct Tables {
  int *list, *slot, *member;     // [n]
  int *holder, *begin, *cursor;  // [2 n]: an item with the slot's key, or -1; the slot's part of `member`
  int* group;                    // [n]: slots in use
  __device__ __host__ Tables(int* memory, int64_t row, int64_t n) {
    int* p = memory + row * 10 * n;
    list = p, slot = p + n, member = p + 2 * n, holder = p + 3 * n, begin = p + 5 * n, cursor = p + 7 * n,
    group = p + 9 * n;
  }
  __device__ Tables after(int64_t before) const {
    Tables t = *this;
    t.list += before, t.slot += before, t.member += before, t.group += before;
    t.holder += 2 * before, t.begin += 2 * before, t.cursor += 2 * before;
    return t;
  }
};

// Groups the block's items by ids (and strata) and solves the groups.
__device__ void solve_listed(const Task& t, const Tables& w, int items, bool pairs, double spread, bool blend,
                             double* scratch, int* counts) {
  constexpr int L = 16, kTeams = kThreads / L;
  const int64_t *ids = t.groups.ids, *strata = pairs ? t.groups.strata : nullptr;
  const int slots = 2 * items;
  for (int s = threadIdx.x; s < slots; s += kThreads) w.holder[s] = -1, w.cursor[s] = 0;
  if (threadIdx.x == 0) counts[0] = counts[1] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < items; p += kThreads) {
    const int i = w.list[p];
    const uint64_t hash = mixed(uint64_t(ids[i]) * 0x9e3779b97f4a7c15u + (strata ? mixed(uint64_t(strata[i])) : 0));
    int s = int(hash % uint64_t(slots));
    for (;;) {
      const int holder = atomicCAS(&w.holder[s], -1, i);
      if (holder == -1 || (ids[holder] == ids[i] && (!strata || strata[holder] == strata[i]))) break;
      s = s + 1 == slots ? 0 : s + 1;
    }
    w.slot[p] = s;
    atomicAdd(&w.cursor[s], 1);
  }
  __syncthreads();
  // Where each slot's members go: any places will do, so slots just ask for them in whatever order they come.
  for (int s = threadIdx.x; s < slots; s += kThreads) {
    const int n = w.cursor[s];
    if (n == 0) continue;
    w.begin[s] = w.cursor[s] = atomicAdd(&counts[0], n);
    w.group[atomicAdd(&counts[1], 1)] = s;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < items; p += kThreads) w.member[atomicAdd(&w.cursor[w.slot[p]], 1)] = w.list[p];
  __syncthreads();
  const int groups = counts[1];
  const auto members = [&](int k) {
    const int s = k < groups ? w.group[k] : -1;
    return Members{t, s < 0 ? 0 : w.begin[s], s < 0 ? 0 : w.cursor[s] - w.begin[s], w.member};
  };
  const auto number = [&](const Members& m) { return m.n ? ids[m.index(0)] : -1; };
  for (int first = 0; first < groups; first += kTeams) {
    Members m = members(first + threadIdx.x / L);
    if (m.n > L * kPerLane) m.n = 0;
    solve(LanesTeam<L>(), m, number(m), spread, blend);
  }
  for (int k = 0; k < groups; ++k) {
    const Members m = members(k);
    if (m.n > L * kPerLane) solve(BlockTeam(scratch), m, number(m), spread, blend);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) by_label(const __grid_constant__ Task given, int* memory) {
  __shared__ double scratch[32];
  __shared__ int counts[2];
  Task t = given;
  t.at_row(blockIdx.y);
  const int64_t n = t.items.items, *ids = t.groups.ids;
  const auto owner = [=](int64_t id) { return unsigned(mixed(uint64_t(id)) >> 32) % gridDim.x; };
  if (!t.out)  // groups without items
    for (int64_t g = threadIdx.x; g < t.groups.groups; g += kThreads)
      if (owner(g) == blockIdx.x) {
        double* to = t.stats + g;
        to[0] = to[t.groups.groups] = to[2 * t.groups.groups] = 0;
        to[3 * t.groups.groups] = kInf, to[4 * t.groups.groups] = -kInf;
      }
  double before = 0, mine = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const unsigned b = owner(ids[i]);
    before += b < blockIdx.x, mine += b == blockIdx.x;
  }
  before = block_all(before, 0., scratch, Add());
  mine = block_all(mine, 0., scratch, Add());
  if (mine == 0) return;  // all threads of the block
  const Tables w = Tables(memory, blockIdx.y, n).after(int64_t(before));
  if (threadIdx.x == 0) counts[0] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    if (owner(ids[i]) == blockIdx.x) w.list[atomicAdd(&counts[0], 1)] = int(i);
  const double spread = batch_spread(t, scratch);
  __syncthreads();
  const bool san = t.groups.strata && t.rule.blend;
  solve_listed(t, w, int(mine), t.groups.strata && !san, spread, false, scratch, counts);
  if (san) solve_listed(t, w, int(mine), true, spread, true, scratch, counts);
}

template <int L>
void launch_in_order(const Task& t, unsigned rows, void* stream) {
  const int64_t teams = kThreads / L;
  const int64_t parts = t.groups.groups > 0 ? (t.groups.groups + teams - 1) / teams : 1;
  launch(in_order<L>, dim3(blocks(parts), rows), kThreads, 0, stream, t);
}

int64_t table_bytes(const GroupTask& t) { return t.groups.ids ? 40 * t.items.items * t.items.batch : 0; }

}  // namespace

int64_t cuda::group_advantages_workspace(const GroupTask& t) { return table_bytes(t) + 8 * t.items.batch; }

void cuda::group_advantages(const GroupTask& g, void* workspace, void* stream) {
  const int64_t n = g.items.items, batch = g.items.batch;
  if (batch == 0) return;
  if (batch > 65535) throw std::runtime_error("group_advantages: at most 65535 rows on CUDA");
  if (g.groups.ids && n > 0x3fffffff)
    throw std::runtime_error("group_advantages: ids for at most 2^30 rewards on CUDA");
  Task t{g.items, g.groups, g.rule, g.out, g.stats, g.degenerate, nullptr, false, element_size(g.items.element)};
  const unsigned rows = unsigned(batch);
  if (g.out && g.rule.scale == Spread::batch) {
    t.measures_batch = n <= kOneLaunch;
    if (!t.measures_batch) {
      double* spread = reinterpret_cast<double*>(static_cast<char*>(workspace) + table_bytes(g));
      launch(whole_batch, rows, kThreads, 0, stream, t, spread);
      t.batch_spread = spread;
    }
  }
  if (g.groups.ids) {
    const int64_t parts = n / 512 < 1 ? 1 : n / 512 > 256 ? 256 : n / 512;
    launch(by_label, dim3(unsigned(parts), rows), kThreads, 0, stream, t, static_cast<int*>(workspace));
  } else {
    const int64_t mean = g.groups.groups > 0 ? n / g.groups.groups : 0;
    if (mean <= 8)
      launch_in_order<8>(t, rows, stream);
    else if (mean <= 16)
      launch_in_order<16>(t, rows, stream);
    else
      launch_in_order<32>(t, rows, stream);
  }
}

}  // namespace gradops
