#include "ot/solve.h"

#include <cstring>
#include <string>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"
#include "ot/cpu_pieces.h"
#include "ot/solve_state.h"

namespace gradops {
namespace {

constexpr int64_t kCandidates = 1 << 22;  // of one problem at first: 150 MB

[[noreturn]] void refuse(const char* name, const char* expected, const std::string& got, int64_t item, int64_t batch) {
  refuse_value(std::string("solve: ") + name, expected, got + (batch > 1 ? " in item " + std::to_string(item) : ""));
}

// The sum of weights, which are finite and not negative.
double checked_sum(const char* name, const double* x, int64_t count, int64_t item, int64_t batch) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(x[i] - x[i] == 0) || x[i] < 0) refuse(name, "be finite and not negative", std::to_string(x[i]), item, batch);
    sum += x[i];
  }
  return sum;
}

// Outputs outside of a ragged problem.
void clear_rest(const SolveTask& task, const Transport& t) {
  const int64_t n = task.first.cost.n, m = task.first.cost.m;
  for (int64_t i = t.cost.n; i < n; ++i) t.alpha[i] = 0;
  for (int64_t j = t.cost.m; j < m; ++j) t.beta[j] = 0;
  for (int64_t k = t.cost.m * t.width; k < m * t.width; ++k) t.index[k] = 0, t.weight[k] = 0;
}

void solve_item(const SolveTask& task, int64_t i, bool threads) {
  Transport t = item_of(task, i);
  const int64_t n = t.cost.n, m = t.cost.m, stride = task.first.cost.m, size = element_size(t.cost.element);
  clear_rest(task, t);
  const int64_t copied = t.cost.matrix && m < stride ? n * m * size : 0;  // the solver knows no strides
  int64_t room = m > 0 ? kCandidates / m : 0;
  for (room = room > 256 ? room : 256;; room *= 4) {
    t.capacity = ((room < n ? room : n) + 7) / 8;
    t.capacity = (t.capacity | 1) * 8;  // powers of two would put all columns into the same few sets of a cache
    SolveState s;
    Carve measure(nullptr);
    plan_solve(measure, t, cpu_pieces(n, m), s);
    char* memory = thread_scratch(measure.bytes() + copied);
    if (copied) {
      char* compact = memory + measure.bytes();
      const char* rows = static_cast<const char*>(item_of(task, i).cost.matrix);
      for (int64_t r = 0; r < n; ++r) std::memcpy(compact + r * m * size, rows + r * stride * size, size_t(m * size));
      t.cost.matrix = compact;
    }
    GRADOPS_DISPATCH(solve_transport)(t, memory, threads);
    if (t.report->status != double(TransportStatus::overflow) || t.capacity >= n) return;
  }
}

}  // namespace

int64_t cpu::solve_workspace(const SolveTask&) { return 0; }

void cpu::solve(const SolveTask& task, void*, void*) {
  for (int64_t i = 0; i < task.batch; ++i) {
    if (task.n_len && (task.n_len[i] < 0 || task.n_len[i] > task.first.cost.n))
      refuse("n_len", ("be in [0, " + std::to_string(task.first.cost.n) + "]").c_str(), std::to_string(task.n_len[i]),
             i, task.batch);
    if (task.m_len && (task.m_len[i] < 0 || task.m_len[i] > task.first.cost.m))
      refuse("m_len", ("be in [0, " + std::to_string(task.first.cost.m) + "]").c_str(), std::to_string(task.m_len[i]),
             i, task.batch);
    const Transport t = item_of(task, i);
    const double a = checked_sum("a", t.a, t.cost.n, i, task.batch);
    const double b = checked_sum("b", t.b, t.cost.m, i, task.batch);
    if (!(a - b <= kMassTolerance * a && b - a <= kMassTolerance * a))
      refuse("b", ("sum to " + std::to_string(a) + " as a does").c_str(), std::to_string(b), i, task.batch);
  }
  if (task.batch < num_threads())
    for (int64_t i = 0; i < task.batch; ++i) solve_item(task, i, true);
  else
    parallel_for(0, task.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) solve_item(task, i, false);
    });
  for (int64_t i = 0; i < task.batch; ++i)
    if (task.first.report[i].status == double(TransportStatus::invalid))
      refuse(task.first.cost.matrix ? "M" : "x and y", "hold finite costs, or +inf where nothing may be moved",
             "NaN or -inf", i, task.batch);
}

}  // namespace gradops
