// capo_update_moments_: for every row r of the vocabulary that a kept token has in its support, with
// g = sum of A v h over those places, average = beta1 average + (1 - beta1) g, squares likewise with g^2.
// Torch-free interface.
#pragma once
#include "rl/capo_curvature.h"

namespace gradops {

struct CapoUpdate {
  CapoTokens tokens;
  const int64_t* rows;      // tokens x k
  const bool* mask;         // tokens
  void *average, *squares;  // count x h, real
  int64_t count;
  double beta1, beta2;
};

// Places i = token * k + position, those of one row in order: row r has order[begin[r]] ... order[begin[r + 1] - 1].
struct CapoSegments {
  const int64_t *order, *begin;
};

// Columns [first, last) of rows [begin, end). `scratch`: last - first doubles and as many reals.
GRADOPS_DECLARE(void, capo_update_rows, const CapoUpdate&, const CapoSegments&, int64_t begin, int64_t end,
                int64_t first, int64_t last, void* scratch)

namespace cpu {
// Throws std::invalid_argument, before anything is modified, for an action or a row that is not there.
void capo_update_moments(const CapoUpdate&, void* workspace, void* = nullptr);
int64_t capo_update_moments_workspace(const CapoUpdate&);  // bytes
}  // namespace cpu
namespace cuda {
// keys[i] = rows[i], or count for a place that does not count
void capo_update_keys(const CapoUpdate&, int64_t* keys, void* stream);
// keys and places, sorted by key, equal keys in the order of the places
void capo_update_sorted(const CapoUpdate&, const int64_t* keys, const int64_t* order, void* stream);
}  // namespace cuda
}  // namespace gradops
