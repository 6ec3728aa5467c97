// A block of tokens, as many as a vector has doubles, is scanned in registers by shifted steps: lane i holds token i,
// the walk enters at the last lane. Only one multiply-add per block waits for the block before.
#include "rl/scan.h"

#include "rl/scan_lanes.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <class T>
struct Walk {
  using Out = Arithmetic<T>;
  const ScanTask& t;
  const bool write, fold;                       // fold: the map of the piece is wanted
  D carry, following, x_all{}, a_all = all(1);  // each the same in all lanes

  Walk(const ScanTask& task, const ScanPiece& piece, bool w, bool f)
      : t(task), write(w), fold(f), carry(all(piece.carry)), following(all(piece.following)) {}

  // Lanes [lo, hi) of the block at token p exist.
  [[gnu::always_inline]] D get(const void* from, int64_t p, int lo, int hi) const {
    const T* x = static_cast<const T*>(from) + p;
    if (hi == W && p >= 0) return load(x);  // lanes below lo hold tokens of the row before
    T some[W] = {};
    for (int i = lo; i < hi; ++i) some[i] = x[i];
    return load(some);
  }
  [[gnu::always_inline]] static M flags(const uint8_t* from, int64_t p, int lo, int hi) {
    if (hi == W && p >= 0) return load_flags(from + p);
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

  // A full block where every token counts and multiplies by q = gamma lam: the steps' factors are known.
  struct Plain {
    D steps[3] = {}, to_carry = all(1), block;
    double weight;  // of the value that follows
    explicit Plain(const ScanTask& t) {
      const double q = t.gamma * t.lam;
      for (int i = W; i-- > 0;)
        for (int k = i; k < W; ++k) to_carry[i] *= q;
      for (int k = 0, s = 1; s < W; ++k, s *= 2)
        for (int i = 0; i + s < W; ++i) steps[k][i] = to_carry[W - s];
      block = all(to_carry[0]);
      weight = t.kind == ScanKind::advantages ? t.gamma : t.gamma - q;
    }
  };
  template <int S>
  [[gnu::always_inline]] static void steps(D& x, const D* factor) {
    x += *factor * shift<S>(x, D{});
    if constexpr (2 * S < W) steps<2 * S>(x, factor + 1);
  }
  [[gnu::always_inline]] void plain(int64_t p, const Plain& c) {
    D x = load(static_cast<const T*>(t.rewards) + p), v{};
    if (t.values) {
      v = load(static_cast<const T*>(t.values) + p);
      const D n = shift<1>(v, following);
      following = first_everywhere(v, Lanes());
      x += c.weight * n;
      if (t.kind == ScanKind::advantages) x -= v;
    }
    steps<1>(x, c.steps);
    const D y = x + c.to_carry * carry, x0 = first_everywhere(x, Lanes());
    carry = x0 + c.block * carry;
    if (fold) {
      x_all = x0 + c.block * x_all;
      a_all *= c.block;
    }
    if (!write) return;
    store(y, static_cast<Out*>(t.first) + p);
    if (t.kind == ScanKind::advantages) store(y + v, static_cast<Out*>(t.second) + p);
  }

  // W flags as one number.
  static constexpr uint64_t kAllSet = 0x0101010101010101 >> (64 - 8 * W);
  [[gnu::always_inline]] static uint64_t packed(const uint8_t* flags) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, flags, W);
    return bits;
  }
  // The processors' own prefetchers follow a walk towards lower addresses badly.
  [[gnu::always_inline]] static void prefetch(const void* from, int64_t p) {
    constexpr uintptr_t kAhead = 2048;
    __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(static_cast<const T*>(from) + p) - kAhead));
  }
  [[gnu::always_inline]] void backward(int64_t begin, int64_t end) {
    const Plain c(t);
    // gamma (1 - lam) = 0 must hide a NaN among the values
    const bool steady = !t.next_values && !t.ratios && t.gamma * t.lam != 0 &&
                        (t.kind == ScanKind::advantages || !t.values || t.lam != 1);
    int64_t p = end - W;
    for (; p >= begin; p -= W) {
      prefetch(t.rewards, p);
      if (t.values) prefetch(t.values, p);
      const uint64_t counts = t.mask ? packed(t.mask + p) : kAllSet;
      if (steady && counts == kAllSet && !(t.terminated && packed(t.terminated + p))) {
        plain(p, c);
      } else if (counts) {
        general(p, 0, W);
      } else if (write) {
        put(D{}, t.first, p, 0, W);
        if (t.kind == ScanKind::advantages) put(D{}, t.second, p, 0, W);
      }
    }
    if (p + W > begin) general(p, int(begin - p), W);
  }

  [[gnu::always_inline]] void forward(int64_t p, int hi) {
    D x = reverse(get(t.rewards, p, 0, hi), Lanes()), a = reverse(get(t.ratios, p, 0, hi), Lanes());
    for (int i = 0; i < W - hi; ++i) a[i] = 1;
    compose<1>(x, a);
    const D before = carry, y = advance(x, a);
    if (write) put(reverse(shift<1>(y, before), Lanes()), t.first, p, 0, hi);
  }

  [[gnu::always_inline]] void run(int64_t begin, int64_t end) {
    if (t.kind != ScanKind::carry) return backward(begin, end);
    for (; begin + W <= end; begin += W) forward(begin, W);
    if (begin < end) forward(begin, int(end - begin));
  }
};

template <class T>
[[gnu::noinline]] ScanMap walk(const ScanTask& t, ScanPiece& piece, bool write,
                               bool fold) {  // one copy: all callers round alike
  Walk<T> w(t, piece, write, fold);
  if constexpr (sizeof(T) >= 4)
    flushing_denormals([&]() __attribute__((always_inline)) {
      w.run(piece.begin, piece.end);
    });  // a carry that fades out would end among them
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
  if (t.kind == ScanKind::carry) static_cast<Arithmetic<T>*>(t.second)[row] = carry;
}

}  // namespace

ScanMap scan_piece(const ScanTask& t, ScanPiece& piece, bool write) {
  ScanMap map{};
  with_type(t.element, [&](auto zero) { map = walk<decltype(zero)>(t, piece, write, true); });
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
    for (int64_t row = last; row-- > first;) {  // downwards, as the walk: memory is read in one direction
      const int64_t begin = t.offsets ? t.offsets[row] : row * t.length;
      const int64_t end = t.offsets ? t.offsets[row + 1] : begin + t.length;
      ScanPiece piece = start<T>(t, row, begin, end);
      const bool fold = t.kind == ScanKind::carry || end - begin > kScanChunk;
      for (int64_t done = 0; done < end - begin; done += kScanChunk) {
        const int64_t size = end - begin - done < kScanChunk ? end - begin - done : kScanChunk;
        piece.begin = t.kind == ScanKind::carry ? begin + done : end - done - size;
        piece.end = piece.begin + size;
        piece.carry = scan_fold(walk<T>(t, piece, true, fold), piece.carry);
      }
      finish<T>(t, row, piece.carry);
    }
  });
}

}  // namespace gradops::GRADOPS_ISA
