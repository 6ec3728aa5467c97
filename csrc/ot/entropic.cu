// The iterates of entropic.cpp, two reads per iteration: a warp per row, then a thread per column and chunk of rows,
// each with a running maximum. Exponents are shifted by the potentials known so far and so are small where it matters;
// in float they are rounded once (see entropic.kernel.cpp). Nothing waits for the device: launches are fixed, and the
// kernels of a problem that is done return at once.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "ot/entropic.h"
#include "ot/relaxation.h"

namespace gradops {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kChunk = 512;  // rows
constexpr double kLn2 = 0.69314718055994530942, kSameSum = 1e-5, kFloatError = 1e-6, kStuckError = 1e-3;
constexpr int kPatience = 8;
constexpr double kInf = __builtin_huge_val(), kNone = -1e30;  // below every exponent of a finite cost

struct State {  // of one problem
  Relaxation relaxation;
  double mass, grid, best, missing, dual, total, error;
  int64_t iterations, stale;
  int status;
  bool running, in_double, settled;
};

struct Item {  // one problem in device memory
  Cost cost;
  int64_t rows, columns;
  double scale;
  const double *a, *alpha0, *b_given;
  double *f, *g, *b, *row_part, *sum, *x, *y, *h, *top, *power, *scaled;  // the last three: a row per chunk
  float *f_high, *f_low, *g_high, *g_low;
  double* report;
};

struct Arrays {
  EntropicTask task;
  double* memory;
  State* states;
  int64_t chunks;

  __host__ __device__ static int64_t doubles(const EntropicTask& t, int64_t chunks) {
    return 4 * t.n + (5 + 3 * chunks) * t.m;
  }
  __host__ __device__ static int64_t within(const int64_t* lengths, int64_t k, int64_t size) {
    return !lengths ? size : lengths[k] < 0 ? 0 : lengths[k] < size ? lengths[k] : size;
  }
  __device__ Item item(int64_t k) const {
    const EntropicTask& t = task;
    const int64_t size = element_size(t.element), n = t.n, m = t.m;
    const auto part = [&](const void* p, int64_t count) {
      return p ? static_cast<const char*>(p) + k * count * size : nullptr;
    };
    Item i;
    i.cost = {part(t.matrix, n * m), part(t.x, n * t.d), part(t.y, m * t.d), t.element, n, m, t.d};
    i.rows = within(t.n_len, k, n), i.columns = within(t.m_len, k, m);
    i.scale = 1 / (t.reg * kLn2);
    i.a = t.a + k * n, i.b_given = t.b + k * m, i.alpha0 = t.alpha0 ? t.alpha0 + k * n : nullptr;
    i.f = t.alpha + k * n, i.g = t.beta + k * m, i.report = t.report + k * kEntropicReport;
    double* p = memory + k * doubles(t, chunks);
    i.row_part = p, i.sum = p += n, i.x = p += n;
    i.f_high = reinterpret_cast<float*>(p += n), i.f_low = i.f_high + n;
    i.b = p += n, i.y = p += m, i.h = p += m;
    i.g_high = reinterpret_cast<float*>(p += m), i.g_low = i.g_high + m;
    i.top = p += 2 * m, i.power = p += chunks * m, i.scaled = p += chunks * m;
    return i;
  }
};

__device__ void split(double x, double grid, float& high, float& low) {
  const double round = grid * 0x1.8p52;
  high = float((x + round) - round);
  low = x == -kInf ? 0.f : float(x - double(high));
}

template <class Real>
__device__ Real cost_as(const Cost& c, int64_t i, int64_t j) {
  if (sizeof(Real) == 8) return Real(cost_at(c, i, j));
  if (c.matrix) return Real(stored_number(c.element, c.matrix, i * c.m + j));
  Real sum = 0;
  for (int64_t k = 0; k < c.d; ++k) {
    const Real x = Real(stored_number(c.element, c.x, i * c.d + k));
    const Real difference = x - Real(stored_number(c.element, c.y, j * c.d + k));
    sum += difference * difference;
  }
  return sum;
}

// f_i + g_j - scale c_ij
template <class Real>
struct Exponents;
template <>
struct Exponents<double> {
  const Item& t;
  __device__ explicit Exponents(const Item& item) : t(item) {}
  __device__ double operator()(double f, float, float, int64_t i, int64_t j) const {
    return f + t.g[j] - cost_as<double>(t.cost, i, j) * t.scale;
  }
};
template <>
struct Exponents<float> {
  const Item& t;
  float scale_high, scale_low;
  __device__ explicit Exponents(const Item& item)
      : t(item), scale_high(float(item.scale * (1 - 0x1p-22))), scale_low(float(item.scale - double(scale_high))) {}
  __device__ float operator()(double, float f_high, float f_low, int64_t i, int64_t j) const {
    const float c = cost_as<float>(t.cost, i, j);
    return fmaf(-c, scale_high, f_high + t.g_high[j]) + fmaf(-c, scale_low, f_low + t.g_low[j]);
  }
};

__device__ float power_of_two(float x) { return exp2f(x); }
__device__ double power_of_two(double x) { return exp2(x); }

// log2 of a sum of powers of two, as the largest exponent and the sum of what is left
template <class Real>
struct Powers {
  Real top = Real(kNone), sum = 0;
  __device__ void add(Real z) {
    if (z > top) {
      sum = sum * power_of_two(top - z) + 1;
      top = z;
    } else {
      sum += power_of_two(z - top);
    }
  }
};
struct Merge {
  __device__ Powers<double> operator()(const Powers<double>& a, const Powers<double>& b) const {
    Powers<double> out;
    out.top = a.top > b.top ? a.top : b.top;
    out.sum = a.sum * exp2(a.top - out.top) + b.sum * exp2(b.top - out.top);
    return out;
  }
};
__device__ Powers<double> shuffle(const Powers<double>& p, int step) {
  Powers<double> out;
  out.top = __shfl_xor_sync(0xffffffffu, p.top, step);
  out.sum = __shfl_xor_sync(0xffffffffu, p.sum, step);
  return out;
}
__device__ double log_of(const Powers<double>& p) { return p.sum == 0 ? -kInf : p.top + log2(p.sum); }
// |2^log - 1| * weight; infinite only where there was nothing to sum
__device__ double distance(double log, double weight) {
  return weight * (log == -kInf ? kInf : fabs(exp2(log > 60 ? 60. : log) - 1));
}

template <class Real>
__device__ double row_log(const Item& t, double f, float f_high, float f_low, int64_t i) {
  const Exponents<Real> exponent(t);
  Powers<Real> mine;
  for (int64_t j = threadIdx.x % 32; j < t.columns; j += 32) mine.add(exponent(f, f_high, f_low, i, j));
  Powers<double> all;
  all.top = mine.top, all.sum = mine.sum;
  for (int step = 16; step > 0; step /= 2) all = Merge()(all, shuffle(all, step));
  return log_of(all);
}

// A warp per row. The step in f; or, with kMeasure, r_i and x_i.
template <bool kMeasure>
__global__ void __launch_bounds__(kThreads) entropic_rows(const Arrays p, int64_t strips) {
  const int64_t k = blockIdx.x / strips, i = blockIdx.x % strips * kWarps + threadIdx.x / 32;
  const State& state = p.states[k];
  if (kMeasure ? state.status != 0 : !state.running) return;
  const Item t = p.item(k);
  if (i >= t.rows) return;  // whole warps
  const bool first = threadIdx.x % 32 == 0;
  if (t.a[i] == 0) {
    if (first) t.row_part[i] = t.sum[i] = t.x[i] = 0, t.f[i] = -kInf, t.f_high[i] = float(-kInf), t.f_low[i] = 0;
    return;
  }
  double f = t.f[i];
  if (kMeasure) {
    const double sum = exp2(row_log<double>(t, f, 0, 0, i));
    if (first) t.sum[i] = sum, t.x[i] = sum > t.a[i] ? t.a[i] / sum : 1., t.row_part[i] = fabs(sum - t.a[i]);
    return;
  }
  const double log_a = log2(t.a[i]);
  float high, low;
  split(f - log_a, state.grid, high, low);
  const double log = state.in_double ? row_log<double>(t, f - log_a, 0, 0, i) : row_log<float>(t, 0, high, low, i);
  __syncwarp();  // every lane has read f
  if (!first) return;
  // A sum that is far off says nothing about the end: a plain step.
  f -= (fabs(log) > 60 ? 1. : state.relaxation.omega) * log;
  t.row_part[i] = distance(log, t.a[i]);
  t.f[i] = f;
  split(f, state.grid, t.f_high[i], t.f_low[i]);
}

// Part of a column's sum: rows [chunk, chunk + kChunk). A thread per column, kWarps rows at a time.
template <class Real, bool kMeasure>
__device__ void column_part(const Item& t, int64_t j, int64_t begin, int64_t end, Powers<double>& out, double& scaled) {
  const Exponents<Real> exponent(t);
  Powers<Real> mine;
  scaled = 0;
  for (int64_t i = begin + threadIdx.x / 32; i < end && j < t.columns; i += kWarps) {
    if (t.a[i] == 0) continue;
    const Real z = exponent(t.f[i], t.f_high[i], t.f_low[i], i, j);
    if (kMeasure) scaled += t.x[i] * exp2(double(z));
    mine.add(z);
  }
  out.top = mine.top, out.sum = mine.sum;
}

template <bool kMeasure>
__global__ void __launch_bounds__(kThreads) entropic_column_parts(const Arrays p, int64_t strips) {
  __shared__ double tops[kThreads], sums[kThreads], weighted[kThreads];
  const int64_t part = blockIdx.x % (strips * p.chunks), k = blockIdx.x / (strips * p.chunks);
  const State& state = p.states[k];
  if (kMeasure ? state.status != 0 : !state.running) return;
  const Item t = p.item(k);
  const int64_t chunk = part / strips, j = part % strips * 32 + threadIdx.x % 32;
  const int64_t begin = chunk * kChunk, end = begin + kChunk < t.rows ? begin + kChunk : t.rows;
  Powers<double> mine;
  double scaled;
  if (kMeasure || state.in_double)
    column_part<double, kMeasure>(t, j, begin, end, mine, scaled);
  else
    column_part<float, false>(t, j, begin, end, mine, scaled);
  tops[threadIdx.x] = mine.top, sums[threadIdx.x] = mine.sum, weighted[threadIdx.x] = scaled;
  __syncthreads();
  if (threadIdx.x >= 32 || j >= t.columns) return;
  for (int w = 1; w < kWarps; ++w) {
    Powers<double> other;
    other.top = tops[w * 32 + threadIdx.x], other.sum = sums[w * 32 + threadIdx.x];
    mine = Merge()(mine, other);
    scaled += weighted[w * 32 + threadIdx.x];
  }
  t.top[chunk * t.cost.m + j] = mine.top, t.power[chunk * t.cost.m + j] = mine.sum;
  if (kMeasure) t.scaled[chunk * t.cost.m + j] = scaled;
}

__device__ double column_log(const Item& t, int64_t j, int64_t chunks) {
  Powers<double> all;
  for (int64_t c = 0; c < chunks; ++c) {
    Powers<double> part;
    part.top = t.top[c * t.cost.m + j], part.sum = t.power[c * t.cost.m + j];
    all = Merge()(all, part);
  }
  return log_of(all);
}

struct Sum {  // f(i) for i in [0, count), by all threads of a block, in a fixed order
  double* scratch;
  template <class F>
  __device__ double operator()(int64_t count, const F& f) const {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += f(i);
    return block_all(sum, 0., scratch, Add());
  }
};

// A block per problem from here on.
__device__ void split_columns(const Item& t, State& state, double* scratch) {
  double top = 0;
  for (int64_t i = threadIdx.x; i < t.rows; i += kThreads) top = Larger()(t.f[i] == -kInf ? 0. : fabs(t.f[i]), top);
  const double rows = block_all(top, 0., scratch, Larger());
  top = 1;
  for (int64_t j = threadIdx.x; j < t.columns; j += kThreads) top = Larger()(t.g[j] == -kInf ? 0. : fabs(t.g[j]), top);
  const double span = rows + block_all(top, 0., scratch, Larger());
  double grid = 0x1p-22;
  while (grid * 0x1p23 < span && grid < 1e30) grid *= 2;
  for (int64_t j = threadIdx.x; j < t.columns; j += kThreads) split(t.g[j], grid, t.g_high[j], t.g_low[j]);
  if (threadIdx.x == 0) state.grid = grid;
}

__global__ void __launch_bounds__(kThreads) entropic_start(const Arrays p) {
  __shared__ double scratch[32];
  const Item t = p.item(blockIdx.x);
  State& state = p.states[blockIdx.x];
  const Sum sum{scratch};
  const double mass = sum(t.rows, [&](int64_t i) { return t.a[i] >= 0 ? t.a[i] : kInf; });
  const double other = sum(t.columns, [&](int64_t j) { return t.b_given[j] >= 0 ? t.b_given[j] : kInf; });
  const bool valid = mass < kInf && fabs(mass - other) <= kSameSum * mass;
  for (int64_t i = threadIdx.x; i < p.task.n; i += kThreads) {
    const bool none = i >= t.rows || t.a[i] == 0;
    t.f[i] = none ? -kInf : t.alpha0 ? t.alpha0[i] * t.scale : 0.;
    split(t.f[i], 0x1p-22, t.f_high[i], t.f_low[i]);
  }
  for (int64_t j = threadIdx.x; j < p.task.m; j += kThreads) {
    const bool none = j >= t.columns || t.b_given[j] == 0;
    t.b[j] = none ? 0. : t.b_given[j] * (mass / other);
    t.g[j] = none ? -kInf : 0.;
  }
  if (threadIdx.x == 0) {
    state = State();
    state.mass = mass, state.best = kInf;
    state.status = int(valid ? EntropicStatus::converged : EntropicStatus::invalid);
    state.running = valid && mass > 0;
    state.in_double = t.alpha0 != nullptr;  // for the columns' step that comes first
  }
  __syncthreads();
  split_columns(t, state, scratch);
}

// The step in g, and what comes next; `initial`: only columns had a step.
__global__ void __launch_bounds__(kThreads) entropic_step(const Arrays p, bool initial) {
  __shared__ double scratch[32];
  State& state = p.states[blockIdx.x];
  if (!state.running) return;
  const Item t = p.item(blockIdx.x);
  const Sum sum{scratch};
  const double omega = state.relaxation.omega;
  double columns = sum(t.columns, [&](int64_t j) {
    if (t.b[j] == 0) return 0.;
    const double log = column_log(t, j, p.chunks) - log2(t.b[j]);
    t.g[j] -= (fabs(log) > 60 ? 1. : omega) * log;
    return distance(log, t.b[j]);
  });
  double error = initial ? columns : sum(t.rows, [&](int64_t i) { return t.row_part[i]; });
  error /= state.mass, columns /= state.mass;
  split_columns(t, state, scratch);  // also: everyone has read what is written now
  if (threadIdx.x != 0) return;
  const bool bad = !(error < kInf && columns < kInf);
  if (bad) {
    // A row without a pair spoils the column sums, too.
    const bool infeasible = error == kInf || (error < kInf && columns == kInf);
    state.status = int(infeasible ? EntropicStatus::infeasible : EntropicStatus::invalid);
    state.running = false;
  }
  if (initial) state.in_double = false;
  if (initial || bad) return;
  // As in entropic.cpp
  ++state.iterations;
  if (state.settled && omega == 1 && error <= p.task.tol) {
    state.running = false;
    return;
  }
  state.settled = state.in_double && omega == 1;
  state.relaxation.observe(error, columns);
  if (omega > 1) error += columns;
  if ((state.in_double && error <= p.task.tol) || state.iterations + 1 >= p.task.max_iter) state.relaxation.stop();
  state.stale = error < state.best ? 0 : state.stale + 1;
  state.best = error < state.best ? error : state.best;
  const bool stuck = omega > 1 ? state.relaxation.failed && error < kStuckError : state.stale >= kPatience;
  if (stuck || error <= (p.task.tol > kFloatError ? p.task.tol : kFloatError)) state.in_double = true;
}

// What is added to all f and taken from all g changes nothing: mean f = 0.
__global__ void __launch_bounds__(kThreads) entropic_center(const Arrays p) {
  __shared__ double scratch[32];
  if (p.states[blockIdx.x].status != 0) return;
  const Item t = p.item(blockIdx.x);
  const Sum sum{scratch};
  const double count = sum(t.rows, [&](int64_t i) { return t.a[i] == 0 ? 0. : 1.; });
  const double total = sum(t.rows, [&](int64_t i) { return t.a[i] == 0 ? 0. : t.f[i]; });
  const double mean = count > 0 ? total / count : 0;
  for (int64_t i = threadIdx.x; i < t.rows; i += kThreads) t.f[i] -= mean;
  for (int64_t j = threadIdx.x; j < t.columns; j += kThreads) t.g[j] += mean;
}

__global__ void __launch_bounds__(kThreads) entropic_certify(const Arrays p) {
  __shared__ double scratch[32];
  State& state = p.states[blockIdx.x];
  if (state.status != 0) return;
  const Item t = p.item(blockIdx.x);
  const Sum sum{scratch};
  const double columns = sum(t.columns, [&](int64_t j) {
    double scaled = 0;
    for (int64_t c = 0; c < p.chunks; ++c) scaled += t.scaled[c * t.cost.m + j];
    t.y[j] = scaled > t.b[j] ? t.b[j] / scaled : 1.;
    t.h[j] = Larger()(t.b[j] - scaled * t.y[j], 0.);
    return t.b[j] == 0 ? 0. : fabs(exp2(column_log(t, j, p.chunks)) - t.b[j]);
  });
  const double rows = sum(t.rows, [&](int64_t i) { return t.row_part[i]; });
  const double total = sum(t.rows, [&](int64_t i) { return t.sum[i]; });
  const double missing = sum(t.columns, [&](int64_t j) { return t.h[j]; });
  const double left = sum(t.rows, [&](int64_t i) { return t.a[i] == 0 ? 0. : t.f[i] * t.a[i]; });
  const double right = sum(t.columns, [&](int64_t j) { return t.b[j] == 0 ? 0. : t.g[j] * t.b[j]; });
  if (threadIdx.x != 0) return;
  state.total = total, state.missing = missing, state.dual = left + right;
  state.error = state.mass > 0 ? (rows + columns) / state.mass : 0;
}

// A row's part in the divergence of the rounded plan from T, in row_part.
__global__ void __launch_bounds__(kThreads) entropic_divergence(const Arrays p, int64_t strips) {
  const int64_t k = blockIdx.x / strips, i = blockIdx.x % strips * kWarps + threadIdx.x / 32;
  const State& state = p.states[k];
  if (state.status != 0) return;
  const Item t = p.item(k);
  if (i >= t.rows || t.a[i] == 0) return;  // whole warps
  const Exponents<double> exponent(t);
  const double f = t.f[i], x = t.x[i];
  double kept = 0, sum = 0;
  for (int64_t j = threadIdx.x % 32; j < t.columns; j += 32) kept += exp2(exponent(f, 0, 0, i, j)) * t.y[j];
  kept = warp_all(kept, Add());
  const double lack = t.a[i] - x * kept;
  const double fill = state.missing > 0 && lack > kEntropicRounding * t.a[i] ? lack / state.missing : 0;
  for (int64_t j = threadIdx.x % 32; j < t.columns; j += 32) {
    const double z = exponent(f, 0, 0, i, j), from = exp2(z), to = from * x * t.y[j] + fill * t.h[j];
    const double by = to / from - 1;
    const double near = from * by * by * (0.5 - by * (1. / 6 - by * (1. / 12 - by * (1. / 20 - by * (1. / 30)))));
    sum += !(to > 0) ? from : fabs(by) < 1e-3 ? near : to * (log(to) - z * kLn2) - to + from;
  }
  sum = warp_all(sum, Add());
  if (threadIdx.x % 32 == 0) t.row_part[i] = sum;
}

__global__ void __launch_bounds__(kThreads) entropic_report(const Arrays p) {
  __shared__ double scratch[32];
  const State& state = p.states[blockIdx.x];
  const Item t = p.item(blockIdx.x);
  const Sum sum{scratch};
  const bool failed = state.status != 0;
  const double nan = __builtin_nan("");
  const double gap = failed ? nan : sum(t.rows, [&](int64_t i) { return t.a[i] == 0 ? 0. : t.row_part[i]; });
  for (int64_t i = threadIdx.x; i < t.rows; i += kThreads) t.f[i] = failed ? nan : t.f[i] / t.scale;
  for (int64_t j = threadIdx.x; j < t.columns; j += kThreads) t.g[j] = failed ? nan : t.g[j] / t.scale;
  if (threadIdx.x != 0) return;
  const bool met = state.error <= p.task.tol;
  t.report[0] = failed ? nan : state.dual / t.scale - p.task.reg * state.total;
  t.report[1] = state.mass > 0 ? gap / state.mass : gap;
  t.report[2] = failed ? nan : state.error;
  t.report[3] = failed ? 0. : double(state.iterations);
  t.report[4] = failed ? double(state.status)
                       : double(int(met                  ? EntropicStatus::converged
                                    : state.error < kInf ? EntropicStatus::iteration_limit
                                                         : EntropicStatus::invalid));
}

int64_t chunks_of(const EntropicTask& t) { return t.n > 0 ? (t.n + kChunk - 1) / kChunk : 1; }

}  // namespace

int64_t cuda::entropic_workspace(const EntropicTask& t) {
  return t.batch * (8 * Arrays::doubles(t, chunks_of(t)) + int64_t(sizeof(State)));
}

void cuda::entropic(const EntropicTask& t, void* workspace, void* stream) {
  if (t.batch == 0) return;
  double* memory = static_cast<double*>(workspace);
  const int64_t chunks = chunks_of(t);
  const Arrays p{t, memory, reinterpret_cast<State*>(memory + t.batch * Arrays::doubles(t, chunks)), chunks};
  const int64_t row_strips = (t.n + kWarps - 1) / kWarps, column_strips = (t.m + 31) / 32;
  const unsigned items = blocks(t.batch);
  launch(entropic_start, items, kThreads, 0, stream, p);
  if (t.n > 0 && t.m > 0) {
    const unsigned rows = blocks(t.batch * row_strips), columns = blocks(t.batch * column_strips * chunks);
    const auto row_step = entropic_rows<false>, measure_rows = entropic_rows<true>;
    const auto column_parts = entropic_column_parts<false>, measure_columns = entropic_column_parts<true>;
    if (t.alpha0) {
      launch(column_parts, columns, kThreads, 0, stream, p, column_strips);
      launch(entropic_step, items, kThreads, 0, stream, p, true);
    }
    for (int64_t k = 0; k < t.max_iter; ++k) {
      launch(row_step, rows, kThreads, 0, stream, p, row_strips);
      launch(column_parts, columns, kThreads, 0, stream, p, column_strips);
      launch(entropic_step, items, kThreads, 0, stream, p, false);
    }
    launch(entropic_center, items, kThreads, 0, stream, p);
    launch(measure_rows, rows, kThreads, 0, stream, p, row_strips);
    launch(measure_columns, columns, kThreads, 0, stream, p, column_strips);
    launch(entropic_certify, items, kThreads, 0, stream, p);
    launch(entropic_divergence, rows, kThreads, 0, stream, p, row_strips);
  }
  launch(entropic_report, items, kThreads, 0, stream, p);
}

}  // namespace gradops
