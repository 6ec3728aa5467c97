#include "rl/capo_update_moments.h"

#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {
namespace {

constexpr int64_t kWidth = 512;  // columns of one piece of work

[[noreturn]] void refuse(const char* what, int64_t high, int64_t value) {
  throw std::invalid_argument(std::string("capo_update_moments_: ") + what + " must be below " + std::to_string(high) +
                              (*what == 't' ? " and not negative" : "") + ", got " + std::to_string(value));
}

// Counting sort of the places that count by row: begin has count + 1 entries, order one per place.
void sort_places(const CapoUpdate& t, int64_t* begin, int64_t* order) {
  const int64_t k = t.tokens.k;
  for (int64_t r = 0; r <= t.count; ++r) begin[r] = 0;
  for (int64_t n = 0; n < t.tokens.tokens; ++n) {
    if (!t.mask[n]) continue;
    if (t.tokens.action[n] >= k) refuse("action_index", k, t.tokens.action[n]);
    for (int64_t i = n * k; i < (n + 1) * k; ++i) {
      if (t.rows[i] < 0 || t.rows[i] >= t.count) refuse("token_ids", t.count, t.rows[i]);
      ++begin[t.rows[i]];
    }
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
