// Arithmetic is float, or double for double logits. Tokens choose: a vector holds W tokens, so that no step of theirs
// runs along the few experts; experts choose: along the tokens.
#include "ot/router.h"

#include "common/exp_log.h"
#include "common/simd.h"
#include "common/widen.h"
#include "ot/lane_mask.h"

#define GRADOPS_FLAT __attribute__((always_inline))
#include "ot/router_column.h"

namespace gradops::GRADOPS_ISA {
namespace {

struct Alone {  // a team of one
  template <class F>
  GRADOPS_SHARED int count(int n, const F& f) const {
    int s = 0;
#pragma omp simd reduction(+ : s)
    for (int i = 0; i < n; ++i) s += f(i) ? 1 : 0;
    return s;
  }
  template <class F>
  GRADOPS_SHARED auto sum(int n, const F& f) const {
    decltype(f(0)) s = 0;
#pragma omp simd reduction(+ : s)
    for (int i = 0; i < n; ++i) s += f(i);
    return s;
  }
  template <class F>
  GRADOPS_SHARED auto largest(int n, const F& f) const {
    decltype(f(0)) s = -__builtin_inf();
#pragma omp simd reduction(max : s)
    for (int i = 0; i < n; ++i) s = f(i) > s ? f(i) : s;
    return s;
  }
};

template <class A>
[[gnu::noinline]] Cut<A> cut_of(const A* x, int n, int k, A scaled, A guess, A reach) {
  return cut_column(Alone(), n, k, scaled, guess, reach, [=](int i) GRADOPS_FLAT { return x[i]; });
}

// One group. Gates and plan are (block of W tokens, expert, token) where tokens choose, else (expert, token).
template <class A>
struct Group {
  static constexpr int W = kLanes<A>;
  using V = Vec<A>;
  using I = Vec<KeyOf<A>>;

  const RouterTask& t;
  int T, E, padded, blocks, rows;  // rows of the plan, whose masses Adam balances; its columns are projected
  int64_t block_stride, expert_stride;
  A *gates, *plan, *alpha, *m, *v, *sum, *mass, *x, *guess;
  V *lanes, *slots;
  int64_t real = 0;  // tokens that have a finite logit

  Group(const RouterTask& task, char* memory)
      : t(task),
        T(int(task.tokens)),
        E(int(task.experts)),
        padded((T + W - 1) / W * W),
        blocks(padded / W),
        rows(task.experts_choose ? T : E),
        block_stride(task.experts_choose ? W : int64_t(E) * W),
        expert_stride(task.experts_choose ? padded : W) {
    const auto take = [&](int64_t count) {
      A* p = reinterpret_cast<A*>(memory);
      memory += (count * int64_t(sizeof(A)) + 63) / 64 * 64;
      return p;
    };
    gates = take(int64_t(padded) * E), plan = take(int64_t(padded) * E);
    alpha = take(rows), m = take(rows), v = take(rows), sum = take(rows), mass = take(rows), x = take(T);
    guess = take(E);
    lanes = reinterpret_cast<V*>(take(int64_t(E) * W));
    slots = reinterpret_cast<V*>(t.experts_choose ? nullptr : take(4 * t.width * W));
  }
  A* at(A* p, int block, int e) const { return p + block * block_stride + e * expert_stride; }

  // Softmax; -infinity for masked experts and tokens. False where there is none.
  template <class T_>
  bool load(const T_* logits) {
    const V infinity = V{} + A(__builtin_inf());
    I bad{};
    real = 0;
    for (int b = 0; b < blocks; ++b) {
      V* block = t.experts_choose ? lanes : &vec_at(at(gates, b, 0));
      A* numbers = reinterpret_cast<A*>(block);
      const int here = T - b * W < W ? T - b * W : W;
      for (int i = 0; i < here; ++i) {
        const T_* from = logits + (int64_t(b) * W + i) * E;
        for (int e = 0; e < E; ++e) numbers[e * W + i] = widen(from[e]);
      }
      for (int i = here; i < W; ++i)
        for (int e = 0; e < E; ++e) numbers[e * W + i] = -infinity[0];
      V top = -infinity, total{};
      for (int e = 0; e < E; ++e) {
        bad |= ~(block[e] < infinity);
        top = block[e] > top ? block[e] : top;
      }
      for (int i = 0; i < here; ++i) {
        real += top[i] > -infinity[0];
        if (t.experts_choose) mass[b * W + i] = top[i] > -infinity[0] ? 1 : 0;
      }
      top = top > -infinity ? top : V{};
      for (int e = 0; e < E; ++e) block[e] -= top;
#pragma omp simd
      for (int i = 0; i < E * W; ++i) numbers[i] = numbers[i] > -infinity[0] ? exp_of(numbers[i]) : A(-1);
      for (int e = 0; e < E; ++e) total += block[e] > 0 ? block[e] : V{};
      total = A(1) / (total > 0 ? total : V{} + A(1));
      for (int e = 0; e < E; ++e) vec_at(at(gates, b, e)) = block[e] < 0 ? -infinity : block[e] * total;
    }
    if (!t.experts_choose)
      for (int e = 0; e < E; ++e) mass[e] = A(double(real) / E);
    for (int i = 0; i < rows; ++i) alpha[i] = m[i] = v[i] = 0;
    for (int e = 0; e < E; ++e) guess[e] = A(1. / E);
    for (int i = 0; i < W; ++i)
      if (bad[i]) return false;
    return true;
  }

  // The K largest entries of W tokens' columns (K = 0: t.width, in memory), then sink(expert, entry, gamma * weight).
  template <int K, class Sink>
  GRADOPS_SHARED void choose(int block, const Sink& sink) {
    const int k = int(t.width);
    const V low = V{} - A(__builtin_inf());
    V local[K ? K : 1];
    V* list = K ? local : slots;
    const auto each = [&](const auto& f) GRADOPS_FLAT {
      if constexpr (K > 0) {
#pragma GCC unroll 8
        for (int r = 0; r < K; ++r) f(r);
      } else {
        for (int r = 0; r < k; ++r) f(r);
      }
    };
    each([&](int r) GRADOPS_FLAT { list[r] = low; });
    V next = low;  // the largest entry that found no place
    for (int e = 0; e < E; ++e) {
      V y = vec_at(at(gates, block, e)) + alpha[e];
      each([&](int r) GRADOPS_FLAT {
        const V more = greater(y, list[r]);
        y = lesser(y, list[r]);
        list[r] = more;
      });
      next = greater(y, next);
    }
    // Column sums of 1; tau is the largest of (sum of the first r - gamma) / r
    const V top = list[0];
    V total{}, tau = low, edge = list[0];
    each([&](int r) GRADOPS_FLAT {
      total += list[r] - top;
      const V threshold = (total - A(t.gamma)) * (A(1) / A(r + 1));
      tau = (r < k ? threshold : low) > tau ? threshold : tau;
      next = r == k ? list[r] : next;
      edge = r == k - 1 ? list[r] : edge;
    });
    const I tied = (next == edge) & (edge > low);
    bool any = false;
    for (int i = 0; i < W; ++i) any |= tied[i] != 0;
    if (!any) {
      for (int e = 0; e < E; ++e) {
        const V y = vec_at(at(gates, block, e)) + alpha[e], w = (y - top) - tau, positive = w > 0 ? w : V{};
        sink(e, y, y >= edge ? positive : V{});
      }
      return;
    }
    I ties{};  // places for entries at the edge
    each([&](int r) GRADOPS_FLAT { ties -= r < k ? list[r] == edge : I{}; });
    for (int e = 0; e < E; ++e) {
      const V y = vec_at(at(gates, block, e)) + alpha[e], w = (y - top) - tau;
      const I equal = (y == edge) & (ties > 0);
      ties += equal;
      sink(e, y, ((y > edge) | equal) & (w > 0) ? w : V{});
    }
  }

  // Row sums of the plan; with `last`, the plan itself and its terms of the dual value.
  template <int K, bool kLast>
  [[gnu::noinline]] double tokens_sums() {
    const A inverse = A(1 / t.gamma);
    double value = 0;
    for (int e = 0; e < E; ++e) lanes[e] = V{};
    for (int b = 0; b < blocks; ++b) {
      V omega{};
      choose<K>(b, [&](int e, V y, V w) GRADOPS_FLAT {
        lanes[e] += w;
        if constexpr (kLast) {
          const V weight = w * inverse;
          vec_at(at(plan, b, e)) = weight;
          omega += weight > 0 ? weight * (y - A(0.5) * w) : V{};
        }
      });
      for (int i = 0; i < W; ++i) value += double(omega[i]);
    }
    for (int e = 0; e < E; ++e) {
      double s = 0;
      for (int i = 0; i < W; ++i) s += double(lanes[e][i]);
      sum[e] = A(s / t.gamma);
    }
    return value;
  }

  template <bool kLast>
  [[gnu::noinline]] double experts_sums() {
    const A inverse = A(1 / t.gamma), scaled = A(t.gamma * double(real) / E), reach = A(2 * t.lr);
    double value = 0;
    for (int i = 0; i < T; ++i) sum[i] = 0;
    for (int e = 0; e < E; ++e) {
      const A* g = at(gates, 0, e);
#pragma omp simd
      for (int i = 0; i < T; ++i) x[i] = g[i] + alpha[i];
      const Cut<A> cut = cut_of(x, T, int(t.width), scaled, guess[e], reach);
      if (cut.edge > -A(__builtin_inf())) guess[e] = cut.edge;
      A omega = 0;
      A* out = at(plan, 0, e);
#pragma omp simd reduction(+ : omega)
      for (int i = 0; i < T; ++i) {
        const A w = weight(cut, x[i], i), share = w * inverse;
        sum[i] += share;
        if constexpr (kLast) {
          out[i] = share;
          const A y = share > 0 ? x[i] : A(0);
          omega += share * (y - A(0.5) * w);
        }
      }
      value += double(omega);
    }
    return value;
  }

  template <bool kLast>
  double sums() {
    if (t.experts_choose) return experts_sums<kLast>();
    if constexpr (sizeof(A) == 4 && !kLast) {  // where the time goes; the rest is not worth compiling
      if (t.width == 1) return tokens_sums<1, kLast>();
      if (t.width == 2) return tokens_sums<2, kLast>();
      if (t.width <= 4) return tokens_sums<4, kLast>();
      if (t.width <= 8) return tokens_sums<8, kLast>();
    }
    return tokens_sums<0, kLast>();
  }

  void solve(double* residual, double* value) {
    double first = 1, second = 1;
    for (int64_t step = 0; step < t.steps; ++step) {
      sums<false>();
      first *= 0.9, second *= 0.999;
      const Adam<A> adam{A(1 / (1 - first)), A(1 / (1 - second)), A(t.lr), 64 * Adam<A>::epsilon()};
#pragma omp simd
      for (int i = 0; i < rows; ++i) adam(sum[i], mass[i], alpha[i], m[i], v[i]);
    }
    *value = -sums<true>();
    double off = 0, all = 0;
    for (int i = 0; i < rows; ++i) {
      *value += double(alpha[i]) * double(mass[i]);
      off += __builtin_fabs(double(sum[i]) - double(mass[i]));
      all += double(mass[i]);
    }
    *residual = all > 0 ? off / all : 0.;
  }

  // Tokens choose: an expert keeps the tokens that give it most, ties to the first.
  void refuse(int64_t* overflow) {
    const A infinity = A(__builtin_inf());
    for (int e = 0; e < E; ++e) {
      int64_t count = 0;
      for (int b = 0; b < blocks; ++b) {
        const A* w = at(plan, b, e);
        for (int i = 0; i < W; ++i) count += w[i] > 0;
      }
      if (count <= t.capacity) continue;
      for (int b = 0; b < blocks; ++b)
        for (int i = 0; i < W && b * W + i < T; ++i)
          x[b * W + i] = at(plan, b, e)[i] > 0 ? at(plan, b, e)[i] : -infinity;
      const A half = A(0.5 / t.gamma);
      const Cut<A> cut = cut_of(x, T, int(t.capacity), infinity, half, half);  // of infinite mass: the largest entries
      for (int i = 0; i < T; ++i)
        if (x[i] > 0 && !(weight(cut, x[i], i) > 0)) at(plan, i / W, e)[i % W] = 0, ++overflow[i];
    }
  }

  template <class T_>
  void write_tokens(int64_t* indices, T_* weights, A* shares, int64_t* taken) {
    const int k = int(t.width);
    I* index = reinterpret_cast<I*>(slots);
    V *share = slots + k, *gate = slots + 2 * k;
    for (int b = 0; b < blocks; ++b) {
      for (int s = 0; s < k; ++s) index[s] = I{} - 1, share[s] = gate[s] = V{};
      I count{};
      for (int e = 0; e < E; ++e) {
        const V w = vec_at(at(plan, b, e)), g = vec_at(at(gates, b, e));
        const I on = w > 0;
        for (int s = 0; s < k; ++s) {
          const I here = on & (count == s);
          index[s] = here ? I{} + e : index[s];
          share[s] = here ? w : share[s];
          gate[s] = here ? g : gate[s];
        }
        count -= on;
      }
      for (int i = 0; i < W && b * W + i < T; ++i) {
        const int64_t first = (int64_t(b) * W + i) * k;
        for (int s = 0; s < k; ++s) {
          indices[first + s] = index[s][i], shares[first + s] = share[s][i];
          narrow(gate[s][i], weights[first + s]);
        }
        taken[b * W + i] = count[i];
      }
    }
  }

  template <class T_>
  void write_experts(int64_t* indices, T_* weights, A* shares, int64_t* taken) {
    int* list = reinterpret_cast<int*>(x);
    for (int e = 0; e < E; ++e) {
      const A *w = at(plan, 0, e), *g = at(gates, 0, e);
      int64_t to = e * t.width;
      const int64_t end = to + t.width;
      int count = 0;
      for (int i = 0; i < T; ++i) {  // without a branch, which would be mispredicted
        list[count] = i;
        count += w[i] > 0;
      }
      for (int s = 0; s < count; ++s, ++to) {
        const int i = list[s];
        indices[to] = i, shares[to] = w[i], ++taken[i];
        narrow(g[i], weights[to]);
      }
      for (; to < end; ++to) {
        indices[to] = -1, shares[to] = 0;
        narrow(A(0), weights[to]);
      }
    }
  }
};

template <class T, class A>
void route(const RouterTask& t, int64_t g, Group<A>& group) {
  const int64_t lists = t.experts_choose ? t.experts : t.tokens, first = g * lists * t.width;
  int64_t *indices = t.indices + first, *load = t.load + g * t.experts, *taken = t.taken + g * t.tokens,
          *overflow = t.overflow + g * t.tokens;
  T* weights = static_cast<T*>(t.weights) + first;
  A* shares = static_cast<A*>(t.plan) + first;
  for (int64_t e = 0; e < t.experts; ++e) load[e] = 0;
  for (int64_t i = 0; i < t.tokens; ++i) taken[i] = overflow[i] = 0;
  if (!group.load(static_cast<const T*>(t.logits) + g * t.tokens * t.experts)) {
    const A nan = A(__builtin_nan(""));
    for (int64_t i = 0; i < lists * t.width; ++i) indices[i] = -1, shares[i] = nan, narrow(nan, weights[i]);
    t.dropped[g] = t.tokens, t.residual[g] = t.value[g] = __builtin_nan("");
    return;
  }
  group.solve(t.residual + g, t.value + g);
  if (t.experts_choose) {
    group.write_experts(indices, weights, shares, taken);
  } else {
    if (t.capacity >= 0) group.refuse(overflow);
    group.write_tokens(indices, weights, shares, taken);
  }
  for (int64_t i = 0; i < lists * t.width; ++i)
    if (indices[i] >= 0) ++load[t.experts_choose ? i / t.width : indices[i]];
  int64_t unrouted = 0;
  for (int64_t i = 0; i < t.tokens; ++i) unrouted += taken[i] == 0;
  t.dropped[g] = unrouted - (t.tokens - group.real);  // masked tokens want no expert
}

}  // namespace

void router_groups(const RouterTask& t, int64_t begin, int64_t end, char* scratch) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    Group<decltype(widen(T()))> group(t, scratch);
    for (int64_t g = begin; g < end; ++g) route<T>(t, g, group);
  });
}

}  // namespace gradops::GRADOPS_ISA
