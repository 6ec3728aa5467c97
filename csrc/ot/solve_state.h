// solve_state.h: what one call of solve keeps besides its problem, and the problems of a batch. For both back ends;
// functions are local to the includer.
#pragma once
#include "ot/solve.h"

namespace gradops {

// What the smoothed evaluations keep beside an Evaluation (whose tau is here tau, and value the smoothed dual value).
struct SmoothEvaluation {
  Evaluation e;
  double *theta, *full;  // m: how many entries are full
  double* level;         // m: tau + theta, above which a column has entries
};

// A plan, as those of evaluations.
struct SparseColumns {
  int32_t* support;  // m x capacity
  double* weight;    // m x capacity
  int32_t* count;    // m
};

struct AscentState {
  SmoothEvaluation now, trial;
  double *tau, *theta;  // m: guesses
  SparseColumns center;
  double* best;  // n: the alpha to return
};

struct SolveState {
  TransportState transport;
  AscentState ascent;  // max_nz > 0
};

namespace {

GRADOPS_TEAM int64_t stored_size(Element e) {  // element_size, for kernels too
  return e == Element::f64 ? 8 : e == Element::f32 ? 4 : 2;
}

GRADOPS_TEAM void plan_solve(Carve& carve, const Transport& t, int64_t pieces, SolveState& all) {
  plan_state(carve, t, pieces, all.transport);
  if (t.max_nz == 0) return;
  AscentState& s = all.ascent;
  double** vectors[] = {&s.now.theta, &s.now.full, &s.now.level, &s.trial.theta, &s.trial.full, &s.trial.level};
  for (double** p : vectors) *p = carve.take<double>(t.cost.m);
  s.tau = carve.take<double>(t.cost.m);
  s.theta = carve.take<double>(t.cost.m);
  s.center = {carve.take<int32_t>(t.cost.m * t.capacity), carve.take<double>(t.cost.m * t.capacity),
              carve.take<int32_t>(t.cost.m)};
  s.best = carve.take<double>(t.cost.n);
}

// Problem i of the batch, as if it were alone; its costs keep the batch's row length, task.first.cost.m.
GRADOPS_TEAM Transport item_of(const SolveTask& task, int64_t i) {
  Transport t = task.first;
  Cost& c = t.cost;
  const int64_t n = c.n, m = c.m, size = stored_size(c.element);
  const auto skip = [=](const void* p, int64_t count) {
    return p ? static_cast<const char*>(p) + i * count * size : p;
  };
  c.matrix = skip(c.matrix, n * m), c.x = skip(c.x, n * c.d), c.y = skip(c.y, m * c.d);
  t.a += i * n, t.b += i * m, t.alpha += i * n, t.beta += i * m, t.report += i;
  if (t.alpha0) t.alpha0 += i * n;
  t.index += i * m * t.width, t.weight += i * m * t.width;
  if (task.n_len) c.n = task.n_len[i];
  if (task.m_len) c.m = task.m_len[i];
  return t;
}

}  // namespace
}  // namespace gradops
