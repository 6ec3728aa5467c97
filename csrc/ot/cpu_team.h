// cpu_team.h: the team of one transport problem on the CPU (ot/team.h). For *.kernel.cpp: local to the includer.
#pragma once
#include "common/parallel.h"
#include "ot/column_scan.h"
#include "ot/cpu_pieces.h"
#include "ot/team.h"

namespace gradops {
namespace {

struct CpuLanes {  // one lane
  template <class F>
  void each(int64_t count, const F& f) const {
#pragma GCC ivdep
    for (int64_t k = 0; k < count; ++k) f(k);
  }
  template <class F>
  double sum(int64_t count, const F& f) const {
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

// Threads only share what is independent item by item (each, columns) or a fixed piece (scans, scattered sums), so no
// bit depends on their number. Sums over the vectors of a problem are short: one thread.
class CpuTeam {
 public:
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
  static constexpr int64_t kShare = 1 << 15;  // numbers that are worth a thread's while
  template <class F>
  void share(int64_t count, int64_t work, const F& f) const {
    if (threads_)
      parallel_for(0, count, (kShare + work - 1) / (work > 0 ? work : 1), f);
    else if (count > 0)
      f(0, count);
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
