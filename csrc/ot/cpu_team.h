// cpu_team.h: the team of one transport problem on the CPU (ot/team.h). For *.kernel.cpp: local to the includer.
#pragma once
#include "common/parallel.h"
#include "ot/column_scan.h"
#include "ot/cpu_pieces.h"
#include "ot/lane_mask.h"
#include "ot/team.h"

namespace gradops {
namespace {

#if !defined(__AVX512F__)
constexpr int kWide = kLanes<double>;

// Sum and number of what is above a level.
struct All {};
class Above {
 public:
  [[gnu::always_inline]] explicit Above(double level) : level_(Vec<double>{} + level) {}
  [[gnu::always_inline]] void add(Vec<double> v, All = {}) { keep(v - level_, v > level_); }
  [[gnu::always_inline]] void add(Vec<double> v, int64_t count) {  // of the first few
    Vec<int64_t> place;
    for (int l = 0; l < kWide; ++l) place[l] = l;
    keep(v - level_, (v > level_) & (place < count));
  }
  [[gnu::always_inline]] double sum(int64_t& number) const {
    double s = 0;
    number = 0;
    for (int l = 0; l < kWide; ++l) s += sum_[l], number -= number_[l];
    return s;
  }

 private:
  [[gnu::always_inline]] void keep(Vec<double> v, Vec<int64_t> wanted) {
    sum_ += (Vec<double>)((Vec<int64_t>)v & wanted);
    number_ += wanted;
  }
  Vec<double> level_, sum_ = {};
  Vec<int64_t> number_ = {};
};
#endif

struct CpuLanes {  // one lane
  template <class F>
  void each(int64_t count, const F& f) const {
#pragma GCC ivdep
    for (int64_t k = 0; k < count; ++k) f(k);
  }
  template <class F>
  double sum(int64_t count, const F& f) const {
    if (count < 24) {  // most columns of a plan: too short for vectors of gathered numbers
      double even = 0, odd = 0;
      int64_t k = 0;
      for (; k + 2 <= count; k += 2) even += f(k), odd += f(k + 1);
      return k < count ? even + odd + f(k) : even + odd;
    }
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t k = 0; k < count; ++k) s += f(k);
    return s;
  }
  template <class F>
  double largest(int64_t count, const F& f) const {
    double s = -__builtin_huge_val();
#pragma omp simd reduction(max : s)
    for (int64_t k = 0; k < count; ++k) {
      const double v = f(k);
      s = v > s ? v : s;
    }
    return s;
  }
  template <class F>
  double span(int64_t count, const F& f, double& least, double& most) const {
    double s = 0, low = __builtin_huge_val(), high = -low;
#pragma omp simd reduction(+ : s) reduction(min : low) reduction(max : high)
    for (int64_t k = 0; k < count; ++k) {
      const double v = f(k);
      s += v;
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    least = low, most = high;
    return s;
  }
  template <class X>
  double above(int64_t count, const X& x, double level, int64_t& number) const {
    double s = 0, c = 0;  // two doubles share vectors
#pragma omp simd reduction(+ : s, c)
    for (int64_t k = 0; k < count; ++k) {
      const double v = x(k) - level;
      s += v > 0 ? v : 0.;
      c += v > 0 ? 1. : 0.;
    }
    number = int64_t(c);
    return s;
  }
#if defined(__AVX512F__)
  double above(int64_t count, const Values& x, double level, int64_t& number) const {
    const __m512d floor = _mm512_set1_pd(level), zero = _mm512_setzero_pd();
    __m512d sums[2] = {zero, zero};
    int64_t c = 0, k = 0;
    const auto add = [&](__m512d v, __mmask8 there, __m512d& s) {
      v = _mm512_sub_pd(v, floor);
      const __mmask8 wanted = _mm512_mask_cmp_pd_mask(there, v, zero, _CMP_GT_OQ);
      s = _mm512_mask_add_pd(s, wanted, s, v);
      c += __builtin_popcount(wanted);
    };
    for (; k + 16 <= count; k += 16) {
      add(_mm512_loadu_pd(x.first + k), 0xff, sums[0]);
      add(_mm512_loadu_pd(x.first + k + 8), 0xff, sums[1]);
    }
    for (; k < count; k += 8) {
      const __mmask8 there = k + 8 <= count ? 0xff : __mmask8((1 << (count - k)) - 1);
      add(_mm512_maskz_loadu_pd(there, x.first + k), there, sums[0]);
    }
    number = c;
    return _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1]));
  }
#else
  // Reads whole vectors: there is room for them.
  double above(int64_t count, const Values& x, double level, int64_t& number) const {
    Above all(level);
    int64_t k = 0;
    for (; k + kWide <= count; k += kWide) all.add(load_anywhere(x.first + k));
    if (k < count) all.add(load_anywhere(x.first + k), count - k);
    return all.sum(number);
  }
#endif
  // to[k] = x[at[k]] - less[k], or x[k] - less[k]; returns what above(count, Values{to}, level, number) does.
  double load_above(int64_t count, const double* x, const int32_t* at, const double* less, double* to, double level,
                    int64_t& number) const {
#if defined(__AVX512F__) && defined(__AVX512VL__)
    const __m512d floor = _mm512_set1_pd(level), zero = _mm512_setzero_pd();
    __m512d s = zero;
    int64_t c = 0, k = 0;
    const auto add = [&](__m512d from, __mmask8 there) {
      const __m512d v = _mm512_sub_pd(from, _mm512_maskz_loadu_pd(there, less + k)), rest = _mm512_sub_pd(v, floor);
      _mm512_mask_storeu_pd(to + k, there, v);
      const __mmask8 wanted = _mm512_mask_cmp_pd_mask(there, rest, zero, _CMP_GT_OQ);
      s = _mm512_mask_add_pd(s, wanted, s, rest);
      c += __builtin_popcount(wanted);
    };
    for (; !at && k + 8 <= count; k += 8) add(_mm512_loadu_pd(x + k), 0xff);
    for (; k + 8 <= count; k += 8) {  // faster than a gather
      const int32_t* i = at + k;
      add(_mm512_setr_pd(x[i[0]], x[i[1]], x[i[2]], x[i[3]], x[i[4]], x[i[5]], x[i[6]], x[i[7]]), 0xff);
    }
    if (k < count) {
      const __mmask8 there = __mmask8((1 << (count - k)) - 1);
      add(at ? _mm512_mask_i32gather_pd(zero, there, _mm256_maskz_loadu_epi32(there, at + k), x, 8)
             : _mm512_maskz_loadu_pd(there, x + k),
          there);
    }
    number = c;
    return _mm512_reduce_add_pd(s);
#else
    Above all(level);
    int64_t k = 0;
    const auto add = [&](const auto& number_at, const auto& counted) __attribute__((always_inline)) {
      Vec<double> v;
      for (int l = 0; l < kWide; ++l) v[l] = number_at(k + l);
      v -= load_anywhere(less + k);
      store_anywhere(to + k, v);
      all.add(v, counted);
    };
    const auto load = [&](const auto& number_at) {
      for (; k + kWide <= count; k += kWide) add(number_at, All());
      if (k < count) add([&](int64_t i) { return number_at(i < count ? i : k); }, count - k);
    };
    if (at)
      load([=](int64_t i) { return x[at[i]]; });
    else
      load([=](int64_t i) { return x[i]; });
    return all.sum(number);
#endif
  }
  double sum_at(int64_t count, const double* x, const int32_t* at) const {
    double s[4] = {};
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) s[0] += x[at[k]], s[1] += x[at[k + 1]], s[2] += x[at[k + 2]], s[3] += x[at[k + 3]];
    for (; k < count; ++k) s[0] += x[at[k]];
    return (s[0] + s[1]) + (s[2] + s[3]);
  }
  template <class F>
  void add_at(int64_t count, const int32_t* at, const F& f, double* to) const {
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k) to[at[k]] += f(k);  // vectors would have to be taken apart
  }
  void count_at(int64_t count, const int32_t* at, const double* x, double* to) const {
    typedef double Pair __attribute__((vector_size(16), may_alias));
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k) *reinterpret_cast<Pair*>(to + 2 * at[k]) += Pair{x[k], 1.};
  }
  template <class L, class W, class P>
  int64_t keep(int64_t count, const L& load, const W& wanted, const P& put) const {
    int64_t place = 0;
    for (int64_t k = 0; k < count; ++k) {
      const auto v = load(k);
      put(v, place);  // at most at k: nothing unread is lost, and no branch is guessed
      place += wanted(v) ? 1 : 0;
    }
    return place;
  }
  template <class F>
  void once(const F& f) const {
    f();
  }
  void wait() const {}
};

#if defined(__AVX512F__) && defined(__AVX512VL__)
// ot/evaluate.h has it for any lanes; this one packs eight entries at a time.
inline Kept keep_above(const CpuLanes&, int64_t count, const int32_t* index, double* x, double level, int32_t* row) {
  const __m512d floor = _mm512_set1_pd(level);
  __m512d sums = _mm512_setzero_pd(), products = sums;
  int64_t place = 0, k = 0;
  for (; k + 8 <= count; k += 8) {  // whole vectors are stored: what is behind the wanted ones is read already
    const __m512d v = _mm512_sub_pd(_mm512_loadu_pd(x + k), floor);
    const __mmask8 wanted = _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_GT_OQ);
    const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + k));
    const __m512d kept = _mm512_maskz_compress_pd(wanted, v);
    sums = _mm512_add_pd(sums, kept), products = _mm512_fmadd_pd(kept, kept, products);
    _mm512_storeu_pd(x + place, kept);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + place), _mm256_maskz_compress_epi32(wanted, rows));
    place += __builtin_popcount(wanted);
  }
  if (k < count) {
    const __mmask8 there = __mmask8((1 << (count - k)) - 1);
    const __m512d v = _mm512_sub_pd(_mm512_maskz_loadu_pd(there, x + k), floor);
    const __mmask8 wanted = _mm512_mask_cmp_pd_mask(there, v, _mm512_setzero_pd(), _CMP_GT_OQ);
    const int number = __builtin_popcount(wanted);
    const __mmask8 to = __mmask8((1 << number) - 1);
    const __m512d kept = _mm512_maskz_compress_pd(wanted, v);
    sums = _mm512_add_pd(sums, kept), products = _mm512_fmadd_pd(kept, kept, products);
    _mm512_mask_storeu_pd(x + place, to, kept);
    _mm256_mask_storeu_epi32(row + place, to,
                             _mm256_maskz_compress_epi32(wanted, _mm256_maskz_loadu_epi32(there, index + k)));
    place += number;
  }
  return {place, _mm512_reduce_add_pd(sums), _mm512_reduce_add_pd(products)};
}
#elif defined(__AVX2__) && defined(__FMA__)
// The same, four entries at a time.
inline Kept keep_above(const CpuLanes&, int64_t count, const int32_t* index, double* x, double level, int32_t* row) {
  const __m256d floor = _mm256_set1_pd(level), zero = _mm256_setzero_pd();
  __m256d sums = zero, products = zero;
  int64_t place = 0;
  for (int64_t k = 0; k < count; k += 4) {  // whole vectors: there is room, and what is behind is read already
    const __m256d v = _mm256_sub_pd(_mm256_loadu_pd(x + k), floor);
    const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index + k));
    __m256d above = _mm256_cmp_pd(v, zero, _CMP_GT_OQ);
    if (k + 4 > count) above = _mm256_and_pd(above, _mm256_castsi256_pd(first_lanes(count - k)));
    const __m256d kept = _mm256_and_pd(v, above);
    sums = _mm256_add_pd(sums, kept), products = _mm256_fmadd_pd(kept, kept, products);
    const unsigned set = unsigned(_mm256_movemask_pd(above));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + place), to_front(_mm256_castpd_si256(v), set));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + place), to_front(rows, set));
    place += __builtin_popcount(set);
  }
  const auto reduce = [](__m256d v) { return (v[0] + v[1]) + (v[2] + v[3]); };
  return {place, reduce(sums), reduce(products)};
}
#endif

// Threads only share what is independent item by item (each, columns) or a fixed piece (scans, scattered sums), so no
// bit depends on their number. Sums over the vectors of a problem are short: one thread.
class CpuTeam {
 public:
  static constexpr int kTogether = 16;

  // threads: false inside a parallel_for over problems.
  explicit CpuTeam(bool threads) : threads_(threads) {}

  template <class F>
  void each(int64_t count, const F& f) const {
    share(count, 1, [&](int64_t begin, int64_t end) {
#pragma GCC ivdep
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
  template <class F>
  double sum(int64_t count, const F& f) const {
    return CpuLanes().sum(count, f);
  }
  template <class F>
  double largest(int64_t count, const F& f) const {
    return CpuLanes().largest(count, f);
  }
  template <class F>
  void columns(int64_t count, int64_t work, const F& f) const {
    share(count, work, [&](int64_t begin, int64_t end) {
      const CpuLanes lanes;
      for (int64_t j = begin; j < end; ++j) f(j, lanes);
    });
  }
  template <class F>
  void once(const F& f) const {
    f();
  }
  int64_t pieces(int64_t n, int64_t m) const { return cpu_pieces(n, m); }

  void scan(const ColumnScan& t) const {
    scan_blocks(t, [&](int64_t begin, int64_t end) { GRADOPS_ISA::scan_columns(t, begin, end); });
  }
  void bounds(const ColumnScan& t, const double* scaled, int64_t max_nz) const {
    const int64_t most = max_nz > 0 ? max_nz : t.cost.n;
    scan_blocks(t, [&](int64_t begin, int64_t end) { GRADOPS_ISA::scan_bounds(t, scaled, most, begin, end); });
  }

 private:
  static constexpr int64_t kShare = 1 << 14;  // numbers that are worth a thread's while
  // One compiled body, with or without threads: another copy of it might be vectorized into another order of sums.
  template <class F>
  [[gnu::noipa]] static void range(int64_t begin, int64_t end, void* f) {
    (*static_cast<const F*>(f))(begin, end);
  }
  template <class F>
  void share(int64_t count, int64_t work, const F& f) const {
    void* context = const_cast<F*>(&f);
    if (threads_)
      run_parallel(0, count, (kShare + work - 1) / (work > 0 ? work : 1), range<F>, context);
    else if (count > 0)
      range<F>(0, count, context);
  }
  // Blocks of columns in which a candidate is wanted; rows of a block are whole cache lines.
  template <class F>
  void scan_blocks(const ColumnScan& t, const F& f) const {
    constexpr int64_t kBlock = 64;
    const int64_t m = t.cost.m, blocks = (m + kBlock - 1) / kBlock;
    share(blocks, t.cost.n * kBlock, [&](int64_t begin, int64_t end) {
      int64_t from = -1;  // of a run of wanted blocks
      for (int64_t k = begin; k <= end; ++k) {
        bool wanted = false;
        for (int64_t j = k * kBlock; k < end && j < m && j < (k + 1) * kBlock; ++j)
          wanted |= t.low[j] < __builtin_huge_val();
        if (wanted && from < 0) from = k;
        if (!wanted && from >= 0) {
          f(from * kBlock, k * kBlock < m ? k * kBlock : m);
          from = -1;
        }
        if (!wanted && k < end)
          for (int64_t j = k * kBlock; j < m && j < (k + 1) * kBlock; ++j) t.count[j] = 0;
      }
    });
  }
  bool threads_;
};

}  // namespace
}  // namespace gradops
