// gram_main: the kernels of gram and gram_outer against plain loops, without torch. 70 rows are two tiles, and 600
// columns two slices.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "linalg/gram.h"
#include "linalg/gram_outer.h"

using namespace gradops;
using Numbers = std::vector<double>;

static Numbers random(size_t size) {
  static std::mt19937 rng(0);
  std::normal_distribution<double> normal;
  Numbers x(size);
  for (double& v : x) v = normal(rng);
  return x;
}

static double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

static double difference(const Numbers& got, const Numbers& want) {
  double worst = 0;
  for (size_t e = 0; e < got.size(); ++e)
    worst = std::fmax(worst, std::isnan(got[e]) ? 1 : std::fabs(got[e] - want[e]));
  return worst;
}

int main() {
  const int64_t rows = 70, d = 600, p = 40, samples = 35, tokens = 2;
  const Numbers x = random(size_t(rows * d)), g = random(size_t(rows * p));
  Numbers got(size_t(rows * rows), NAN), want(got.size());
  const GramBlock blocks[] = {{x.data(), Element::f64, d}, {g.data(), Element::f64, p}};
  const GramTask task{blocks, 2, got.data(), 1, rows, true};
  std::vector<char> memory(size_t(cuda::gram_workspace(task)), -1);
  cuda::gram(task, memory.data(), nullptr);
  const auto both = [&](int64_t i, int64_t j) {
    return Numbers{dot(&x[size_t(i * d)], &x[size_t(j * d)], d), dot(&g[size_t(i * p)], &g[size_t(j * p)], p)};
  };
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j) want[size_t(i * rows + j)] = both(i, j)[0] + both(i, j)[1];
  double worst = difference(got, want);

  got.assign(size_t(samples * samples), NAN);
  want.assign(got.size(), 0);
  const OuterLayer layer{x.data(), g.data(), Element::f64, Element::f64, tokens, d, p, true};
  const GramOuterTask outer{&layer, 1, samples, got.data()};
  memory.assign(size_t(cuda::gram_outer_workspace(outer)), -1);
  cuda::gram_outer(outer, memory.data(), nullptr);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j)
      want[size_t(i / tokens * samples + j / tokens)] += (both(i, j)[0] + 1) * both(i, j)[1];
  worst = std::fmax(worst, difference(got, want));
  std::printf("gram and gram_outer: largest difference %g\n", worst);
  return worst > 1e-8;
}
