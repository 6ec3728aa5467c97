// One block per group, for all of its steps. Gates lie in shared memory where they fit, (expert, token) with an odd
// stride, so that neither direction meets bank conflicts. A step is two phases: every column's cut, then every row's
// sum and its step of Adam. Sums run in a fixed order.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "ot/router.h"
#include "ot/router_column.h"

namespace gradops {
namespace {

constexpr int kThreads = 512;

struct Team {  // a thread, or a warp
  int lane, lanes;
  template <class T, class F>
  __device__ T all(T x, F op) const {
    return lanes > 1 ? warp_all(x, op) : x;
  }
  template <class F>
  __device__ int count(int n, const F& f) const {
    int s = 0;
    for (int i = lane; i < n; i += lanes) s += f(i) ? 1 : 0;
    return all(s, Add());
  }
  template <class F>
  __device__ auto sum(int n, const F& f) const {
    decltype(f(0)) s = 0;
    for (int i = lane; i < n; i += lanes) s += f(i);
    return all(s, Add());
  }
  template <class F>
  __device__ auto largest(int n, const F& f) const {
    decltype(f(0)) s = -__builtin_inf();
    for (int i = lane; i < n; i += lanes) s = Larger()(f(i), s);
    return all(s, Larger());
  }
};

template <class A>
struct Group {
  A *gates, *alpha, *m, *v, *mass;
  Cut<A>*cuts, *full;  // of the columns; of the experts' capacities
  int T, E, stride, rows, columns;
  bool experts_choose;
  A inverse;  // 1 / gamma

  __host__ __device__ static int64_t bytes(const RouterTask& t) {
    const int64_t rows = t.experts_choose ? t.tokens : t.experts, columns = t.experts_choose ? t.experts : t.tokens;
    const int64_t gates = t.experts * (t.tokens | 1) + 4 * rows;
    return ((columns + t.experts) * sizeof(Cut<A>) + gates * sizeof(A) + 15) / 16 * 16;
  }
  __device__ Group(const RouterTask& t, unsigned char* memory)
      : T(int(t.tokens)),
        E(int(t.experts)),
        stride(T | 1),
        rows(t.experts_choose ? T : E),
        columns(t.experts_choose ? E : T),
        experts_choose(t.experts_choose),
        inverse(A(1 / t.gamma)) {
    cuts = reinterpret_cast<Cut<A>*>(memory);
    full = cuts + columns;
    alpha = reinterpret_cast<A*>(full + E);
    m = alpha + rows, v = m + rows, mass = v + rows, gates = mass + rows;
  }
  __device__ A entry(int e, int i) const { return gates[int64_t(e) * stride + i] + alpha[experts_choose ? i : e]; }
  __device__ A over(int e, int i) const {  // gamma times the plan
    return experts_choose ? weight(cuts[e], entry(e, i), i) : weight(cuts[i], entry(e, i), e);
  }
  __device__ A share(int e, int i) const { return over(e, i) * inverse; }
};

// What is cut: entries of a token's or an expert's column, or what tokens give an expert.
enum class Of { token, expert, gifts };

// One function for all, which compiles thrice as fast.
template <class A>
__device__ __noinline__ Cut<A> cut_of(const Group<A>& w, Of of, int j, int k, A scaled, A guess, A reach) {
  const Team team{of == Of::token ? 0 : int(threadIdx.x % 32), of == Of::token ? 1 : 32};
  return cut_column(team, of == Of::token ? w.E : w.T, k, scaled, guess, reach, [&](int i) {
    if (of == Of::gifts) {
      const A s = w.share(j, i);
      return s > 0 ? s : -A(__builtin_inf());
    }
    return of == Of::token ? w.entry(i, j) : w.entry(j, i);
  });
}

// The cut of a token's column for k <= K, in registers
template <int K, class A>
__device__ inline Cut<A> cut_token(const Group<A>& w, int i, int k, A gamma) {
  const A low = -A(__builtin_inf());
  A list[K], next = low;
#pragma unroll
  for (int r = 0; r < K; ++r) list[r] = low;
  for (int e = 0; e < w.E; ++e) {
    A y = w.entry(e, i);
#pragma unroll
    for (int r = 0; r < K; ++r) {
      const A big = y > list[r] ? y : list[r];
      y = y > list[r] ? list[r] : y;
      list[r] = big;
    }
    next = y > next ? y : next;
  }
  Cut<A> cut{list[0], list[0], w.E, low};
  A total = 0;
#pragma unroll
  for (int r = 0; r < K; ++r) {
    total += list[r] - list[0];
    const A tau = (total - gamma) / A(r + 1);
    if (r < k && tau > cut.tau) cut.tau = tau;
    if (r == k) next = list[r];
    if (r == k - 1) cut.edge = list[r];
  }
  if (next == cut.edge && next > low) {
    int places = 0;
#pragma unroll
    for (int r = 0; r < K; ++r) places += r < k && list[r] == cut.edge;
    for (cut.last = -1; places > 0;) places -= w.entry(++cut.last, i) == cut.edge;
  }
  return cut;
}

template <class A>
__device__ void cut_columns(const RouterTask& t, const Group<A>& w, double real, bool first) {
  const int k = int(t.width);
  const A gamma = A(t.gamma), reach = A(2 * t.lr), any = A(1. / w.E);
  if (t.experts_choose) {
    for (int e = threadIdx.x / 32; e < w.E; e += kThreads / 32) {
      const A edge = w.cuts[e].edge, guess = !first && edge > -A(__builtin_inf()) ? edge : any;
      const Cut<A> cut = cut_of(w, Of::expert, e, k, A(t.gamma * real / w.E), guess, reach);
      __syncwarp();
      if (threadIdx.x % 32 == 0) w.cuts[e] = cut;
    }
    return;
  }
  for (int i = threadIdx.x; i < w.T; i += kThreads) {
    const A edge = w.cuts[i].edge, guess = !first && edge > -A(__builtin_inf()) ? edge : any;
    w.cuts[i] = k <= 2   ? cut_token<2>(w, i, k, gamma)
                : k <= 8 ? cut_token<8>(w, i, k, gamma)
                         : cut_of(w, Of::token, i, k, gamma, guess, reach);
  }
}

// f(row, its sum) in one thread
template <class A, class F>
__device__ void each_row(const Group<A>& w, const F& f) {
  if (w.experts_choose) {
    for (int i = threadIdx.x; i < w.T; i += kThreads) {
      A s = 0;
      for (int e = 0; e < w.E; ++e) s += w.over(e, i);
      f(i, s * w.inverse);
    }
    return;
  }
  for (int e = threadIdx.x / 32; e < w.E; e += kThreads / 32) {
    const Team warp{int(threadIdx.x % 32), 32};
    const A s = warp.sum(w.T, [&](int i) { return w.over(e, i); });
    __syncwarp();
    if (warp.lane == 0) f(e, s * w.inverse);
  }
}

// Softmax, a warp per token. Returns how many tokens have a finite logit; negative where there is no softmax.
template <class A>
__device__ double load(const RouterTask& t, const Group<A>& w, int64_t g, double* scratch) {
  const int lane = threadIdx.x % 32;
  const A infinity = A(__builtin_inf());
  double real = 0, bad = 0;
  for (int i = threadIdx.x / 32; i < w.T; i += kThreads / 32) {
    const int64_t first = (g * w.T + i) * w.E;
    const auto logit = [&](int e) { return A(number_at(t.element, t.logits, first + e)); };
    A top = -infinity, total = 0;
    for (int e = lane; e < w.E; e += 32) {
      const A x = logit(e);
      bad += !(x < infinity);
      top = Larger()(x, top);
    }
    top = warp_all(top, Larger());
    for (int e = lane; e < w.E; e += 32) {
      const A x = logit(e);
      const bool masked = !(x > -infinity);
      const A p = masked ? A(0) : exp_of(x - top);
      total += p;
      w.gates[int64_t(e) * w.stride + i] = masked ? -infinity : p;
    }
    total = warp_all(total, Add());
    for (int e = lane; e < w.E; e += 32) w.gates[int64_t(e) * w.stride + i] /= total > 0 ? total : A(1);
    if (lane == 0) {
      real += top > -infinity;
      if (t.experts_choose) w.mass[i] = top > -infinity ? 1 : 0;
    }
  }
  real = block_all(real, 0., scratch, Add());
  bad = block_all(bad, 0., scratch, Add());
  for (int r = threadIdx.x; r < w.rows; r += kThreads) {
    w.alpha[r] = w.m[r] = w.v[r] = 0;
    if (!t.experts_choose) w.mass[r] = A(real / w.E);
  }
  return bad > 0 ? -1 : real;
}

__device__ inline void store(Element e, void* to, int64_t at, double x) {
  if (e == Element::f64) static_cast<double*>(to)[at] = x;
  if (e == Element::f32) static_cast<float*>(to)[at] = float(x);
  if (e == Element::bf16) static_cast<__nv_bfloat16*>(to)[at] = from_double<__nv_bfloat16>(x);
  if (e == Element::f16) static_cast<__half*>(to)[at] = from_double<__half>(x);
}

template <class A>
__device__ void write(const RouterTask& t, const Group<A>& w, int64_t g, int64_t at, int index, int e, int i, A share) {
  const int64_t slot = g * w.columns * t.width + at;
  t.indices[slot] = index;
  static_cast<A*>(t.plan)[slot] = share;
  store(t.element, t.weights, slot, index < 0 ? double(share) : double(w.gates[int64_t(e) * w.stride + i]));
}

// Returns how many tokens this thread has seen without an expert.
template <class A>
__device__ double write_tokens(const RouterTask& t, const Group<A>& w, int64_t g) {
  const int lane = threadIdx.x % 32, k = int(t.width);
  const bool capped = t.capacity >= 0;
  const A infinity = A(__builtin_inf()), half = w.inverse / 2;
  for (int e = threadIdx.x / 32; e < w.E && capped; e += kThreads / 32) {  // of infinite mass: the largest entries
    const Cut<A> cut = cut_of(w, Of::gifts, e, int(t.capacity), infinity, half, half);
    if (lane == 0) w.full[e] = cut;
  }
  __syncthreads();
  const auto kept = [&](int e, int i, A s) { return s > 0 && (!capped || weight(w.full[e], s, i) > 0); };
  for (int e = threadIdx.x / 32; e < w.E; e += kThreads / 32) {
    const int load = Team{lane, 32}.count(w.T, [&](int i) { return kept(e, i, w.share(e, i)); });
    if (lane == 0) t.load[g * w.E + e] = load;
  }
  double unrouted = 0;
  for (int i = threadIdx.x; i < w.T; i += kThreads) {
    int slot = 0, overflow = 0;
    for (int e = 0; e < w.E; ++e) {
      const A s = w.share(e, i);
      if (kept(e, i, s))
        write(t, w, g, int64_t(i) * k + slot++, e, e, i, s);
      else
        overflow += s > 0;
    }
    t.taken[g * w.T + i] = slot, t.overflow[g * w.T + i] = overflow;
    unrouted += slot == 0;
    for (; slot < k; ++slot) write(t, w, g, int64_t(i) * k + slot, -1, 0, 0, A(0));
  }
  return unrouted;
}

template <class A>
__device__ double write_experts(const RouterTask& t, const Group<A>& w, int64_t g) {
  const int lane = threadIdx.x % 32;
  for (int e = threadIdx.x / 32; e < w.E; e += kThreads / 32) {
    int64_t slot = 0;
    for (int b = 0; b < w.T; b += 32) {
      const int i = b + lane;
      const A s = i < w.T ? w.share(e, i) : A(0);
      const unsigned mask = __ballot_sync(0xffffffffu, s > 0);
      if (s > 0) write(t, w, g, e * t.width + slot + __popc(mask & ((1u << lane) - 1)), i, e, i, s);
      slot += __popc(mask);
    }
    if (lane == 0) t.load[g * w.E + e] = slot;
    for (slot += lane; slot < t.width; slot += 32) write(t, w, g, e * t.width + slot, -1, 0, 0, A(0));
  }
  double unrouted = 0;
  for (int i = threadIdx.x; i < w.T; i += kThreads) {
    int taken = 0;
    for (int e = 0; e < w.E; ++e) taken += w.share(e, i) > 0;
    t.taken[g * w.T + i] = taken, t.overflow[g * w.T + i] = 0;
    unrouted += taken == 0;
  }
  return unrouted;
}

template <class A>
__device__ void write_invalid(const RouterTask& t, const Group<A>& w, int64_t g) {
  const A nan = A(__builtin_nan(""));
  for (int64_t s = threadIdx.x; s < w.columns * t.width; s += kThreads) write(t, w, g, s, -1, 0, 0, nan);
  for (int e = threadIdx.x; e < w.E; e += kThreads) t.load[g * w.E + e] = 0;
  for (int i = threadIdx.x; i < w.T; i += kThreads) t.taken[g * w.T + i] = t.overflow[g * w.T + i] = 0;
  if (threadIdx.x == 0) t.dropped[g] = w.T, t.residual[g] = t.value[g] = double(nan);
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    route_group(const __grid_constant__ RouterTask t, unsigned char* memory) {
  __shared__ double scratch[32];
  GRADOPS_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t g = blockIdx.x;
  const Group<A> w(t, memory ? memory + g * Group<A>::bytes(t) : shared);
  const double real = load(t, w, g, scratch);
  if (real < 0) return write_invalid(t, w, g);
  __syncthreads();
  double first = 1, second = 1;
  for (int64_t step = 0; step < t.steps; ++step) {
    cut_columns(t, w, real, step == 0);
    __syncthreads();
    first *= 0.9, second *= 0.999;
    const Adam<A> adam{A(1 / (1 - first)), A(1 / (1 - second)), A(t.lr), 64 * Adam<A>::epsilon()};
    each_row(w, [&](int r, A sum) { adam(sum, w.mass[r], w.alpha[r], w.m[r], w.v[r]); });
    __syncthreads();
  }
  cut_columns(t, w, real, t.steps == 0);
  __syncthreads();
  double value = 0, off = 0, all = 0;
  each_row(w, [&](int r, A sum) {
    value += double(w.alpha[r]) * double(w.mass[r]);
    off += fabs(double(sum) - double(w.mass[r]));
    all += double(w.mass[r]);
  });
  for (int64_t n = threadIdx.x; n < int64_t(w.E) * w.T; n += kThreads) {
    const int e = int(n / w.T), i = int(n % w.T);
    const A over = w.over(e, i);
    if (over > 0) value -= double(over * w.inverse) * (double(w.entry(e, i)) - 0.5 * double(over));
  }
  value = block_all(value, 0., scratch, Add());
  off = block_all(off, 0., scratch, Add());
  all = block_all(all, 0., scratch, Add());
  const double unrouted =
      block_all(t.experts_choose ? write_experts(t, w, g) : write_tokens(t, w, g), 0., scratch, Add());
  if (threadIdx.x == 0) {
    t.value[g] = value, t.residual[g] = all > 0 ? off / all : 0.;
    t.dropped[g] = int64_t(unrouted) - (w.T - int64_t(real));  // masked tokens want no expert
  }
}

int64_t bytes(const RouterTask& t) {
  return t.element == Element::f64 ? Group<double>::bytes(t) : Group<float>::bytes(t);
}
bool fits(const RouterTask& t) { return bytes(t) + 1024 <= int64_t(max_shared_bytes()); }  // and `scratch`

}  // namespace

int64_t cuda::router_workspace(const RouterTask& t) { return fits(t) ? 0 : t.groups * bytes(t); }

void cuda::router(const RouterTask& t, void* workspace, void* stream) {
  const auto kernel = t.element == Element::f64 ? route_group<double> : route_group<float>;
  launch(kernel, blocks(t.groups), kThreads, workspace ? 0 : size_t(bytes(t)), stream, t,
         static_cast<unsigned char*>(workspace));
}

}  // namespace gradops
