#include "rl/capo_update_moments.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {
namespace {

constexpr int64_t kWidth = 512;  // columns of one piece of work

// Counting sort of the places that count by row: begin has count + 1 entries, order one per place.
void sort_places(const CapoUpdate& t, int64_t* begin, int64_t* order) {
  const int64_t k = t.tokens.k;
  for (int64_t r = 0; r <= t.count; ++r) begin[r] = 0;
  for (int64_t n = 0; n < t.tokens.tokens; ++n) {
    if (!t.mask[n]) continue;
    check_ids("action_index", t.tokens.action + n, 1, k, INT64_MIN);
    check_ids("token_ids", t.rows + n * k, k, t.count);
    for (int64_t i = n * k; i < (n + 1) * k; ++i) ++begin[t.rows[i]];
  }
  int64_t sum = 0;  // begin[r] becomes where row r ends; filling from the back brings it to where it begins
  for (int64_t r = 0; r <= t.count; ++r) begin[r] = sum += begin[r];
  for (int64_t n = t.tokens.tokens; n-- > 0;)
    if (t.mask[n])
      for (int64_t i = (n + 1) * k; i-- > n * k;) order[--begin[t.rows[i]]] = i;
}

}  // namespace

int64_t cpu::capo_update_moments_workspace(const CapoUpdate& t) {
  return 8 * (t.count + 1 + t.tokens.tokens * t.tokens.k);
}

void cpu::capo_update_moments(const CapoUpdate& t, void* workspace, void*) {
  int64_t* begin = static_cast<int64_t*>(workspace);
  int64_t* order = begin + t.count + 1;
  sort_places(t, begin, order);
  // Piece p is some columns of one row. Neighbours differ in the row, so that a thread stays in the same columns.
  const int64_t h = t.tokens.h, strips = (h + kWidth - 1) / kWidth;
  const auto kernel = GRADOPS_DISPATCH(capo_update_rows);
  parallel_for(0, strips * t.count, 64, [&](int64_t b, int64_t e) {
    void* scratch = thread_scratch(2 * kWidth * int64_t(sizeof(double)));
    while (b < e) {
      const int64_t strip = b / t.count, row = b % t.count, first = strip * kWidth;
      const int64_t stop = row + (e - b) < t.count ? row + (e - b) : t.count;
      kernel(t, {order, begin}, row, stop, first, first + kWidth < h ? first + kWidth : h, scratch);
      b += stop - row;
    }
  });
}

}  // namespace gradops
