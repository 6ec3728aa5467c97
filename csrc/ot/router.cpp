#include "ot/router.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {

void cpu::router(const RouterTask& t, void*, void*) {
  parallel_for(0, t.groups, 1, [&, kernel = GRADOPS_DISPATCH(router_groups)](int64_t b, int64_t e) {
    kernel(t, b, e, thread_scratch(router_scratch(t)));
  });
}

}  // namespace gradops
