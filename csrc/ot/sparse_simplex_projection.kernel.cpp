#include "ot/sparse_simplex_projection.h"

#include "common/widen.h"
#include "ot/column_projection.h"
#include "ot/lane_mask.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int kSets = 64;

// A bound below everything that can stay: the threshold that the largest entries of 64 sets would have alone, or the
// width-th largest of these.
template <class C>
double bound(const C* largest, double z, int64_t width) {
  double most = -__builtin_inf();
  for (int s = 0; s < kSets; ++s) most = double(largest[s]) > most ? double(largest[s]) : most;
  double tau = -z;  // relative to the largest
  for (int turn = 0; turn < 4; ++turn) {
    double sum = 0, size = 0;
#pragma omp simd reduction(+ : sum, size)
    for (int s = 0; s < kSets; ++s) {
      const double y = double(largest[s]) - most;
      sum += y > tau ? y : 0.;
      size += y > tau ? 1. : 0.;
    }
    const double higher = (sum - z) / size;
    tau = higher > tau ? higher : tau;
  }
  double low = most + tau;
  int64_t above = 0;
  for (int s = 0; s < kSets; ++s) above += double(largest[s]) > low;
  if (above > width) {
    double rank = most;  // the least with fewer than `width` above it
    for (int s = 0; s < kSets; ++s) {
      int more = 0;
      for (int r = 0; r < kSets; ++r) more += largest[r] > largest[s];
      if (more < width && double(largest[s]) < rank) rank = double(largest[s]);
    }
    low = rank > low ? rank : low;
  }
  return low - (__builtin_fabs(low) + __builtin_fabs(most) + z) * 0x1p-48;
}

template <class T>
void project(const SparseSimplexTask& t, int64_t v, double* value, int32_t* row) {
  using C = Arithmetic<T>;
  const T* x = static_cast<const T*>(t.x) + v * t.size;
  double low = -__builtin_inf();
  if (t.size >= 4 * kSets) {
    alignas(64) C largest[kSets], wide[kSets];
    for (int s = 0; s < kSets; ++s) largest[s] = -C(__builtin_inf());
    int64_t i = 0;
    for (; i + kSets <= t.size; i += kSets) {
#pragma omp simd
      for (int s = 0; s < kSets; ++s) wide[s] = widen(x[i + s]);
      for (int s = 0; s < kSets; s += kLanes<C>) vec_at(largest + s) = greater(vec_at(wide + s), vec_at(largest + s));
    }
    for (int s = 0; i + s < t.size; ++s) largest[s] = widen(x[i + s]) > largest[s] ? C(widen(x[i + s])) : largest[s];
    low = bound(largest, t.z[v], t.width);
    if (!(low == low)) low = -__builtin_inf();
  }
  int64_t count = 0, i = 0;
  bool good = true;
  const C least = C(low) - (sizeof(C) == 4 ? C(__builtin_fabs(low)) * C(0x1p-22) : C(0));
  const auto take = [&](int64_t at) {
    const double y = double(widen(x[at]));
    good &= y < __builtin_inf();
    value[count] = y;
    row[count++] = int32_t(at);
  };
  for (; i + kSets <= t.size; i += kSets) {
    alignas(64) C wide[kSets];
#pragma omp simd
    for (int s = 0; s < kSets; ++s) wide[s] = widen(x[i + s]);
    uint64_t bits = 0;
    for (int s = 0; s < kSets; s += kLanes<C>) bits |= not_below(vec_at(wide + s), Vec<C>{} + least) << s;
    for (; bits; bits &= bits - 1) take(i + __builtin_ctzll(bits));
  }
  for (; i < t.size; ++i)
    if (!(C(widen(x[i])) < least)) take(i);

  ProjectedColumn p{0, __builtin_nan(""), 0, 0};
  if (good) p = project_column(value, row, count, t.width, 1., t.z[v]);
  const bool nothing = !(p.tau > -__builtin_inf());  // NaN or an infinity in the vector
  narrow(nothing ? __builtin_nan("") : p.tau, static_cast<T*>(t.tau)[v]);
  T* out = static_cast<T*>(t.values) + v * t.width;
  int64_t* index = t.index + v * t.width;
  int64_t others = t.width - p.kept, used = 0;
  for (int64_t r = 0, slot = 0; slot < t.width; ++slot) {
    if (used < p.kept && (others == 0 || row[used] == r)) {
      r = row[used];
      narrow(value[used++], out[slot]);
    } else {
      --others;
      narrow(nothing ? __builtin_nan("") : 0., out[slot]);
    }
    index[slot] = r++;
  }
}

}  // namespace

void sparse_simplex_rows(const SparseSimplexTask& t, int64_t begin, int64_t end, double* scratch, int32_t* rows) {
  with_type(t.element, [&](auto zero) {
    for (int64_t v = begin; v < end; ++v) project<decltype(zero)>(t, v, scratch, rows);
  });
}

}  // namespace gradops::GRADOPS_ISA
