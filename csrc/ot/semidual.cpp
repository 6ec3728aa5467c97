#include "ot/semidual.h"

#include <atomic>
#include <string>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {
namespace {

// A block of columns is scanned by one thread; blocks do not depend on the number of threads. Wide ones read long
// pieces of rows. Of a list, only what is used is touched.
constexpr int64_t kListBytes = 16 << 20;

struct Blocks {
  int64_t capacity, columns, count;
  explicit Blocks(const SemidualTask& t) {
    const int64_t wanted = t.max_nz < t.n ? 4 * t.max_nz + 16 : 1024, most = wanted < t.n ? wanted : t.n;
    capacity = most / 16 * 16 + 24;  // an odd number of cache lines: lists that start alike do not share cache sets
    columns = kListBytes / (12 * capacity) / 64 * 64;
    columns = columns < 64 ? 64 : columns > kMostColumns ? kMostColumns : columns;
    count = (t.m + columns - 1) / columns;
  }
  // Lists are read 16 entries at a time.
  int64_t slots(int64_t n) const { return 8 * (capacity > n ? capacity : (n + 7) / 8 * 8); }
  int64_t bytes(int64_t n) const { return 12 * (columns * capacity + 16) + 8 * slots(n) + 12 * (n + 16); }
};

constexpr double kInfinity = __builtin_inf();

[[noreturn]] void refuse(const char* name, const char* expected, double got, int64_t item, int64_t batch) {
  refuse_value(std::string("semidual: ") + name, expected,
               std::to_string(got) + (batch > 1 ? " in item " + std::to_string(item) : ""));
}
void check(const char* name, const double* x, int64_t batch, int64_t count, bool negative) {
  const double least = negative ? -kInfinity : 0;
  const auto good = [=](double v) { return (v - v == 0) & (v >= least); };
  int64_t bad = 0;
  for (int64_t k = 0; k < batch * count; ++k) bad |= !good(x[k]);  // all of them: without branches it takes no time
  for (int64_t k = 0; bad && k < batch * count; ++k)
    if (!good(x[k])) refuse(name, negative ? "be finite" : "be finite and not negative", x[k], k / count, batch);
}

// In eight parts: a sum that waits for the one before takes longer than what is added.
template <class F>
double sum(int64_t count, const F& f) {
  double part[8] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
    for (int u = 0; u < 8; ++u) part[u] += f(k + u);
  for (; k < count; ++k) part[k % 8] += f(k);
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

}  // namespace

int64_t cpu::semidual_workspace(const SemidualTask& t) { return 8 * 3 * t.batch * t.m + 4 * t.batch * t.m; }

void cpu::semidual(const SemidualTask& t, void* workspace, void*) {
  check("alpha", t.alpha, t.batch, t.n, true);
  check("a", t.a, t.batch, t.n, false);
  check("b", t.b, t.batch, t.m, false);
  double *omega = static_cast<double*>(workspace), *low = omega + t.batch * t.m, *mass = low + t.batch * t.m;
  int32_t* count = reinterpret_cast<int32_t*>(mass + t.batch * t.m);
  const Blocks blocks(t);
  std::atomic<int64_t> bad{t.batch};
  parallel_for(0, t.batch * blocks.count, 1,
               [&, kernel = GRADOPS_DISPATCH(semidual_columns)](int64_t from, int64_t to) {
                 double* slots = reinterpret_cast<double*>(thread_scratch(blocks.bytes(t.n)));
                 double *lists = slots + blocks.slots(t.n), *values = lists + blocks.columns * blocks.capacity + 16;
                 int32_t *row_lists = reinterpret_cast<int32_t*>(values + t.n + 16),
                         *rows = row_lists + blocks.columns * blocks.capacity + 16;
                 for (int64_t k = from; k < to; ++k) {
                   const int64_t item = k / blocks.count, begin = k % blocks.count * blocks.columns;
                   const int64_t end = begin + blocks.columns < t.m ? begin + blocks.columns : t.m, at = item * t.m;
                   const int64_t shift = begin * blocks.capacity;
                   const ColumnScan scan{cost_of(t, item, element_size(t.element)),
                                         t.alpha + item * t.n,
                                         low + at,
                                         row_lists - shift,
                                         count + at,
                                         blocks.capacity,
                                         lists - shift};
                   const SemidualColumns columns{scan,
                                                 t.b + at,
                                                 t.reg,
                                                 t.max_nz,
                                                 t.warm_index ? t.warm_alpha + item * t.n : nullptr,
                                                 t.warm_index ? t.warm_index + at * t.warm_width : nullptr,
                                                 t.warm_index ? t.warm_weight + at * t.warm_width : nullptr,
                                                 t.warm_index ? t.warm_tau + at : nullptr,
                                                 t.warm_width,
                                                 t.width,
                                                 t.index + at * t.width,
                                                 t.weight + at * t.width,
                                                 t.tau + at,
                                                 t.kept + at,
                                                 omega + at,
                                                 mass + at,
                                                 slots,
                                                 values,
                                                 rows};
                   if (kernel(columns, begin, end) < 0) continue;
                   int64_t first = bad.load();
                   while (item < first && !bad.compare_exchange_weak(first, item)) {
                   }
                 }
               });
  if (bad < t.batch)
    refuse_value(t.matrix ? "semidual: M" : "semidual: x and y",
                 "hold finite costs, or +inf where nothing may be moved",
                 "NaN or -inf" + (t.batch > 1 ? " in item " + std::to_string(bad.load()) : ""));
  parallel_for(0, t.batch, 1, [&](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; ++item) {  // in one order, whatever the number of threads
      const double *alpha = t.alpha + item * t.n, *a = t.a + item * t.n;
      double* grad = t.grad + item * t.n;
      for (int64_t i = 0; i < t.n; ++i) grad[i] = 0;
      for (int64_t j = item * t.m; j < (item + 1) * t.m; ++j) {
        const int64_t kept = t.kept[j] < t.width ? t.kept[j] : t.width;
        for (int64_t r = j * t.width; r < j * t.width + kept; ++r) grad[t.index[r]] += t.weight[r];
      }
      for (int64_t i = 0; i < t.n; ++i) grad[i] = a[i] - grad[i];
      t.value[item] = sum(t.n, [=](int64_t i) { return alpha[i] * a[i]; }) -
                      sum(t.m, [w = omega + item * t.m](int64_t j) { return w[j]; });
    }
  });
}

}  // namespace gradops
