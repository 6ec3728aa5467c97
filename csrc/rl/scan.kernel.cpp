// A block of tokens, as many as a vector has doubles, is scanned in registers by shifted steps: lane i holds token i,
// the walk enters at the last lane. Only one multiply-add per block waits for the block before.
#include "rl/scan.h"

#include "common/simd.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int W = kLanes<double>;
using D = Vec<double>;
using M = Vec<int64_t>;  // -1 or 0 in a lane
using Lanes = std::make_integer_sequence<int, W>;

template <int S, class V, int... N>
[[gnu::always_inline]] inline V shift(V x, V fill, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(x, fill, (N + S)...);
}
template <int S, class V>
[[gnu::always_inline]] inline V shift(V x, V fill) {  // lane i takes lane i + S, or the fill
  return shift<S>(x, fill, Lanes());
}
template <int... N>
[[gnu::always_inline]] inline D reverse(D x, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(x, x, (W - 1 - N)...);
}
template <int... N>
[[gnu::always_inline]] inline D first_everywhere(D x, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(x, x, (N * 0)...);
}
[[gnu::always_inline]] inline D all(double x) { return D{} + x; }

// Composes the maps of the lanes: afterwards lane i holds the map of tokens i, i + 1, ..., W - 1. A cut (a = 0)
// hides what lies behind it, NaN included.
template <int S>
[[gnu::always_inline]] inline void compose(D& x, D& a) {
  const M open = a != 0;
  const D y = x + a * shift<S>(x, D{});
  x = open ? y : x;
  a = open ? a * shift<S>(a, all(1)) : a;
  if constexpr (2 * S < W) compose<2 * S>(x, a);
}
template <int S>
[[gnu::always_inline]] inline void next_that_counts(D& v, M& found, D otherwise) {
  const D w = shift<S>(v, otherwise);
  v = found ? v : w;
  found |= shift<S>(found, ~M{});
  if constexpr (2 * S < W) next_that_counts<2 * S>(v, found, otherwise);
}

template <class T>
struct OutOf {
  using type = float;
};
template <>
struct OutOf<double> {
  using type = double;
};

template <class T>
[[gnu::always_inline]] inline D load(const T* p) {
  D x;
  if constexpr (sizeof(T) >= 4) {
    typedef T Few __attribute__((vector_size(W * sizeof(T)), aligned(sizeof(T)), may_alias));
    x = __builtin_convertvector(*reinterpret_cast<const Few*>(p), D);
  } else {
    for (int i = 0; i < W; ++i) x[i] = widen(p[i]);
  }
  return x;
}
template <class T>
[[gnu::always_inline]] inline void store(D x, T* p) {
  typedef T Few __attribute__((vector_size(W * sizeof(T)), aligned(sizeof(T)), may_alias));
  *reinterpret_cast<Few*>(p) = __builtin_convertvector(x, Few);
}
[[gnu::always_inline]] inline M load_flags(const uint8_t* p) {
  typedef uint8_t Few __attribute__((vector_size(W), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Few*>(p), M) != 0;
}

template <class T>
struct Walk {
  using Out = typename OutOf<T>::type;
  const ScanTask& t;
  const bool write;
  D carry, following, x_all{}, a_all = all(1);  // each the same in all lanes

  Walk(const ScanTask& task, const ScanPiece& piece, bool w)
      : t(task), write(w), carry(all(piece.carry)), following(all(piece.following)) {}

  // Lanes [lo, hi) of the block at token p exist.
  [[gnu::always_inline]] D get(const void* from, int64_t p, int lo, int hi) const {
    const T* x = static_cast<const T*>(from) + p;
    if (lo == 0 && hi == W) return load(x);
    T some[W] = {};
    for (int i = lo; i < hi; ++i) some[i] = x[i];
    return load(some);
  }
  [[gnu::always_inline]] static M flags(const uint8_t* from, int64_t p, int lo, int hi) {
    if (lo == 0 && hi == W) return load_flags(from + p);
    uint8_t some[W] = {};
    for (int i = lo; i < hi; ++i) some[i] = from[p + i];
    return load_flags(some);
  }
  [[gnu::always_inline]] void put(D x, void* to, int64_t p, int lo, int hi) const {
    Out* y = static_cast<Out*>(to) + p;
    if (lo == 0 && hi == W) return store(x, y);
    Out some[W];
    store(x, some);
    for (int i = lo; i < hi; ++i) y[i] = some[i];
  }
  // Applies the lanes' composed maps to the carry and moves on; returns y of every lane.
  [[gnu::always_inline]] D advance(D x, D a) {
    const D y = a != 0 ? x + a * carry : x;
    const D x0 = first_everywhere(x, Lanes()), a0 = first_everywhere(a, Lanes());
    const M open = a0 != 0;
    carry = open ? x0 + a0 * carry : x0;
    x_all = open ? x0 + a0 * x_all : x0;
    a_all = open ? a0 * a_all : a0;
    return y;
  }

  // Any block of advantages and returns.
  [[gnu::always_inline]] void general(int64_t p, int lo, int hi) {
    M counts{};
    for (int i = 0; i < W; ++i) counts[i] = -int64_t(i >= lo && i < hi);
    if (t.mask) counts &= flags(t.mask, p, lo, hi);
    const M ends = t.terminated ? flags(t.terminated, p, lo, hi) : M{};
    const M cut = t.truncated ? ends | flags(t.truncated, p, lo, hi) : ends;
    const D v = t.values ? get(t.values, p, lo, hi) : D{};
    D n{};
    if (t.values) {
      n = shift<1>(v, following);
      M found = shift<1>(counts, ~M{});
      next_that_counts<1>(n, found, following);
      following = first_everywhere(counts ? v : n, Lanes());
    }
    if (t.next_values) n = get(t.next_values, p, lo, hi);
    n = ends ? D{} : n;
    const D reward = get(t.rewards, p, lo, hi), g = cut ? D{} : all(t.gamma);
    D x, a = g * t.lam, d{}, rho = all(1);
    if (t.kind == ScanKind::advantages) {
      x = d = reward + t.gamma * n - v;
      if (t.ratios) {
        const D ratio = get(t.ratios, p, lo, hi);
        rho = ratio > t.rho_clip ? all(t.rho_clip) : ratio;
        const D c = ratio > t.c_clip ? all(t.c_clip) : ratio;
        x = rho * d;
        a = a != 0 ? a * c : a;
      }
    } else {
      const D weight = t.gamma - a;
      x = weight != 0 ? reward + weight * n : reward;
    }
    x = counts ? x : D{};
    a = counts ? a : all(1);
    compose<1>(x, a);
    const D before = carry, y = advance(x, a);
    if (!write) return;
    D first = y;
    if (t.ratios) {
      const D d_all = g != 0 ? d + g * shift<1>(y, before) : d;
      first = rho * d_all;
    }
    put(counts ? first : D{}, t.first, p, lo, hi);
    if (t.kind == ScanKind::advantages) put(counts ? y + v : D{}, t.second, p, lo, hi);
  }

  // A full block of advantages or returns where every token counts and multiplies by q.
  template <int S>
  [[gnu::always_inline]] static void steps(D& x, const D* factor) {
    x += *factor * shift<S>(x, D{});
    if constexpr (2 * S < W) steps<2 * S>(x, factor + 1);
  }
  [[gnu::always_inline]] void plain(int64_t p, const D* factors, D to_carry, D block, double weight) {
    D x = load(static_cast<const T*>(t.rewards) + p), v{};
    if (t.values) {
      v = load(static_cast<const T*>(t.values) + p);
      const D n = shift<1>(v, following);
      following = first_everywhere(v, Lanes());
      x += weight * n;
      if (t.kind == ScanKind::advantages) x -= v;
    }
    steps<1>(x, factors);
    const D y = x + to_carry * carry, x0 = first_everywhere(x, Lanes());
    carry = x0 + block * carry;
    x_all = x0 + block * x_all;
    a_all *= block;
    if (!write) return;
    store(y, static_cast<Out*>(t.first) + p);
    if (t.kind == ScanKind::advantages) store(y + v, static_cast<Out*>(t.second) + p);
  }
  void plain_blocks(int64_t& p, int64_t begin) {
    const double q = t.gamma * t.lam, weight = t.kind == ScanKind::advantages ? t.gamma : t.gamma - q;
    D factors[3] = {}, power = all(1);
    for (int i = W; i-- > 0;)
      for (int k = i; k < W; ++k) power[i] *= q;
    for (int k = 0, s = 1; s < W; ++k, s *= 2)
      for (int i = 0; i + s < W; ++i) factors[k][i] = power[W - s];
    const D block = all(power[0]);
    for (; p - W >= begin; p -= W) plain(p - W, factors, power, block, weight);
  }

  [[gnu::always_inline]] void forward(int64_t p, int hi) {
    D x = reverse(get(t.rewards, p, 0, hi), Lanes()), a = reverse(get(t.ratios, p, 0, hi), Lanes());
    for (int i = 0; i < W - hi; ++i) a[i] = 1;
    compose<1>(x, a);
    const D before = carry, y = advance(x, a);
    if (write) put(reverse(shift<1>(y, before), Lanes()), t.first, p, 0, hi);
  }

  void run(int64_t begin, int64_t end) {
    int64_t p = end;
    if (t.kind == ScanKind::carry) {
      for (p = begin; p + W <= end; p += W) forward(p, W);
      if (p < end) forward(p, int(end - p));
      return;
    }
    const bool flags = t.terminated || t.truncated || t.mask;
    const bool steady = !flags && !t.next_values && !t.ratios && t.gamma * t.lam != 0;
    // gamma (1 - lam) = 0 must hide a NaN among the values
    if (steady && (t.kind == ScanKind::advantages || !t.values || t.lam != 1)) plain_blocks(p, begin);
    for (; p - W >= begin; p -= W) general(p - W, 0, W);
    if (p > begin) general(p - W, int(W - (p - begin)), W);
  }
};

template <class T>
[[gnu::noinline]] ScanMap walk(const ScanTask& t, ScanPiece& piece, bool write) {  // one copy: all callers round alike
  Walk<T> w(t, piece, write);
  if constexpr (sizeof(T) >= 4)
    flushing_denormals([&] { w.run(piece.begin, piece.end); });  // a carry that fades out would end among them
  else
    w.run(piece.begin, piece.end);
  piece.following = w.following[0];
  return {w.x_all[0], w.a_all[0]};
}

template <class T>
double number(const void* from, int64_t i) {
  return from ? double(widen(static_cast<const T*>(from)[i])) : 0.;
}

template <class T>
ScanPiece start(const ScanTask& t, int64_t row, int64_t begin, int64_t end) {
  ScanPiece piece{begin, end, 0, 0};
  if (t.kind == ScanKind::carry) return piece;
  piece.following = number<T>(t.last_values, row);
  if (t.kind == ScanKind::advantages) return piece;
  piece.carry = piece.following;
  if (t.next_values)
    for (int64_t i = end; i-- > begin;)
      if (!t.mask || t.mask[i]) {
        piece.carry = number<T>(t.next_values, i);
        break;
      }
  return piece;
}

template <class T>
void finish(const ScanTask& t, int64_t row, double carry) {
  if (t.kind == ScanKind::carry) static_cast<typename OutOf<T>::type*>(t.second)[row] = carry;
}

}  // namespace

ScanMap scan_piece(const ScanTask& t, ScanPiece& piece, bool write) {
  ScanMap map{};
  with_type(t.element, [&](auto zero) { map = walk<decltype(zero)>(t, piece, write); });
  return map;
}

ScanPiece scan_start(const ScanTask& t, int64_t row, int64_t begin, int64_t end) {
  ScanPiece piece{};
  with_type(t.element, [&](auto zero) { piece = start<decltype(zero)>(t, row, begin, end); });
  return piece;
}

double scan_first_value(const ScanTask& t, int64_t begin, int64_t end, double otherwise) {
  with_type(t.element, [&](auto zero) {
    for (int64_t i = begin; i < end; ++i)
      if (!t.mask || t.mask[i]) {
        otherwise = number<decltype(zero)>(t.values, i);
        break;
      }
  });
  return otherwise;
}

void scan_finish(const ScanTask& t, int64_t row, double carry) {
  with_type(t.element, [&](auto zero) { finish<decltype(zero)>(t, row, carry); });
}

void scan_rows(const ScanTask& t, int64_t first, int64_t last) {
  with_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = t.offsets ? t.offsets[row] : row * t.length;
      const int64_t end = t.offsets ? t.offsets[row + 1] : begin + t.length;
      ScanPiece piece = start<T>(t, row, begin, end);
      for (int64_t done = 0; done < end - begin; done += kScanChunk) {
        const int64_t size = end - begin - done < kScanChunk ? end - begin - done : kScanChunk;
        piece.begin = t.kind == ScanKind::carry ? begin + done : end - done - size;
        piece.end = piece.begin + size;
        piece.carry = scan_fold(walk<T>(t, piece, true), piece.carry);
      }
      finish<T>(t, row, piece.carry);
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
