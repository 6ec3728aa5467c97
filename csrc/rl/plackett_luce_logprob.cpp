#include "rl/plackett_luce_logprob.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {

void cpu::plackett_luce(const PlackettLuce& t, void*, void*) {
  parallel_for(0, t.rows, 4096 / (t.n + t.k + 8) + 1,
               [&, kernel = GRADOPS_DISPATCH(plackett_luce_rows)](int64_t b, int64_t e) {
                 const int64_t bad = kernel(t, b, e, thread_scratch(plackett_luce_scratch(t)));
                 if (bad >= 0)
                   refuse_value("permutation", "have items below " + std::to_string(t.n) + ", each at most once",
                                "others in row " + std::to_string(bad));
               });
}

}  // namespace gradops
