// The columns' unknowns are eliminated: (diag d - sum_j s_j s_j^T / |S_j|) u = right-hand side, by conjugate gradients
// with the diagonal as preconditioner, in O(entries) a step. One problem is one thread's work, and one order of sums.
#include "ot/plan_vjp.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {
namespace {

struct Graph {  // the support of one problem, column after column
  int64_t n, m;
  int64_t *begin, *root;  // m + 1; n: a row of the same component, the same for all of it
  int32_t* row;           // of every entry
  double *scale, *count;  // n: 1 / diagonal, 0 if that is 0; n: rows of the component, at its root
  double *rest, *z, *step, *image, *sum;
};

int64_t find(int64_t* parent, int64_t i) {
  while (parent[i] != i) i = parent[i] = parent[parent[i]];
  return i;
}

void build(Graph& s, const PlanVjpTask& t, int64_t item) {
  const int64_t* index = t.index + item * t.m * t.width;
  const double* value = t.value + item * t.m * t.width;
  int64_t entries = 0;
  double* degree = s.scale;
  for (int64_t i = 0; i < s.n; ++i) s.root[i] = i, degree[i] = s.count[i] = 0;
  for (int64_t j = 0; j < s.m; ++j) {
    s.begin[j] = entries;
    for (int64_t k = j * t.width; k < (j + 1) * t.width; ++k) {
      if (!(value[k] > 0)) continue;
      if (index[k] < 0 || index[k] >= t.n)
        refuse_value("indices of the plan", "be in [0, " + std::to_string(t.n) + ") where its values are positive",
                     index[k]);
      s.row[entries++] = int32_t(index[k]);
    }
    const double share = 1. / double(entries - s.begin[j]);
    for (int64_t k = s.begin[j]; k < entries; ++k) {
      if (entries - s.begin[j] > 1) degree[s.row[k]] += 1 - share;
      const int64_t a = find(s.root, s.row[s.begin[j]]), b = find(s.root, s.row[k]);
      s.root[a < b ? b : a] = a < b ? a : b;
    }
  }
  s.begin[s.m] = entries;
  for (int64_t i = 0; i < s.n; ++i) {
    s.scale[i] = degree[i] > 0 ? 1 / degree[i] : 0;
    s.root[i] = find(s.root, i);
    s.count[s.root[i]] += 1;
  }
}

void center(const Graph& s, double* x) {
  for (int64_t i = 0; i < s.n; ++i) s.sum[i] = 0;
  for (int64_t i = 0; i < s.n; ++i) s.sum[s.root[i]] += x[i];
  for (int64_t i = 0; i < s.n; ++i) x[i] -= s.sum[s.root[i]] / s.count[s.root[i]];
}

void laplacian(const Graph& s, const double* x, double* y) {  // differences from the mean: constants give 0 exactly
  for (int64_t i = 0; i < s.n; ++i) y[i] = 0;
  for (int64_t j = 0; j < s.m; ++j) {
    const int64_t b = s.begin[j], e = s.begin[j + 1];
    if (e - b < 2) continue;
    double mean = 0;
    for (int64_t k = b; k < e; ++k) mean += x[s.row[k]];
    mean /= double(e - b);
    for (int64_t k = b; k < e; ++k) y[s.row[k]] += x[s.row[k]] - mean;
  }
}

double dot(int64_t n, const double* x, const double* y) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) s += x[i] * y[i];
  return s;
}

// u from the right-hand side. Conjugate gradients lose orthogonality to rounding, so what is left is computed anew and
// solved for again, while that helps.
void solve(const Graph& s, const double* right, double* u) {
  constexpr int kRounds = 4;
  constexpr double kSmall = 1e-26, kDone = 1e-30;  // squares of relative residuals: of a round, of the whole
  for (int64_t i = 0; i < s.n; ++i) u[i] = 0, s.rest[i] = right[i];
  double first = 0, before = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (int64_t i = 0; i < s.n; ++i) s.step[i] = s.z[i] = s.scale[i] * s.rest[i];
    double rz = dot(s.n, s.rest, s.z);
    if (round == 0) first = rz;
    if (rz != rz) {
      for (int64_t i = 0; i < s.n; ++i) u[i] = rz;
      return;
    }
    if (!(rz > kDone * first) || (round > 0 && rz > .25 * before)) break;
    before = rz;
    const double stop = kSmall * rz;
    for (int64_t k = 0; k < 4 * s.n + 50 && rz > stop; ++k) {
      laplacian(s, s.step, s.image);
      const double length = rz / dot(s.n, s.step, s.image), old = rz;
      for (int64_t i = 0; i < s.n; ++i) {
        u[i] += length * s.step[i];
        s.rest[i] -= length * s.image[i];
        s.z[i] = s.scale[i] * s.rest[i];
      }
      rz = dot(s.n, s.rest, s.z);
      for (int64_t i = 0; i < s.n; ++i) s.step[i] = s.z[i] + rz / old * s.step[i];
    }
    laplacian(s, u, s.image);
    for (int64_t i = 0; i < s.n; ++i) s.rest[i] = right[i] - s.image[i];
    center(s, s.rest);
  }
  center(s, u);
}

void run(Graph& s, const PlanVjpTask& t, int64_t item, double* right) {
  build(s, t, item);
  const double* value = t.value + item * t.m * t.width;
  const double* g = t.g + item * t.m * t.width;
  const double *p = t.p + item * t.n, *q = t.q + item * t.m;
  double *r = t.r + item * t.m * t.width, *u = t.u + item * t.n, *v = t.v + item * t.m;
  double bad = 0;  // NaN if a value of the plan is
  for (int64_t i = 0; i < t.n; ++i) right[i] = p[i];
  for (int64_t j = 0; j < t.m; ++j) {
    const int64_t count = s.begin[j + 1] - s.begin[j];
    double mean = q[j];
    for (int64_t k = 0, e = s.begin[j]; k < t.width; ++k) {
      const double x = value[j * t.width + k], y = g[j * t.width + k];
      if (x != x) bad = x;
      if (!(x > 0)) continue;
      mean += y;
      right[s.row[e++]] += y;
    }
    v[j] = count ? mean / double(count) : 0;
    for (int64_t e = s.begin[j]; e < s.begin[j + 1]; ++e) right[s.row[e]] -= v[j];
  }
  center(s, right);
  solve(s, right, u);
  for (int64_t i = 0; i < t.n; ++i) u[i] += bad;
  for (int64_t j = 0; j < t.m; ++j) {
    double mean = 0;
    for (int64_t e = s.begin[j]; e < s.begin[j + 1]; ++e) mean += u[s.row[e]];
    if (s.begin[j + 1] > s.begin[j]) v[j] -= mean / double(s.begin[j + 1] - s.begin[j]);
    v[j] += bad;
    for (int64_t k = j * t.width, e = s.begin[j]; k < (j + 1) * t.width; ++k)
      r[k] = value[k] > 0 ? g[k] - u[s.row[e++]] - v[j] : bad;
  }
}

}  // namespace

void cpu::plan_vjp(const PlanVjpTask& t) {
  const int64_t doubles = 8 * t.n, bytes = 8 * (doubles + t.m + 1 + t.n) + 4 * t.m * t.width;
  const int64_t grain = 4096 / (t.n + t.m * t.width + 1) + 1;  // problems worth a thread
  parallel_for(0, t.batch, grain, [&](int64_t b, int64_t e) {
    double* memory = reinterpret_cast<double*>(thread_scratch(bytes));
    Graph s{};
    s.n = t.n, s.m = t.m;
    double* right = memory;
    double** vectors[] = {&s.scale, &s.count, &s.rest, &s.z, &s.step, &s.image, &s.sum};
    for (double** x : vectors) *x = memory += t.n;
    s.begin = reinterpret_cast<int64_t*>(memory + t.n);
    s.root = s.begin + t.m + 1;
    s.row = reinterpret_cast<int32_t*>(s.root + t.n);
    for (int64_t i = b; i < e; ++i) run(s, t, i, right);
  });
}

}  // namespace gradops
