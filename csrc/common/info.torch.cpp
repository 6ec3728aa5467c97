// What the core found out about this machine, for the command-line tool. CPU library only.
#include "common/isa.h"
#include "common/torch_op.h"

#if GRADOPS_BACKEND_ID == 1
namespace gradops {
namespace {

std::string isa() { return isa_name(best_isa()); }

std::string isa_levels() {
  std::string levels;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4, Isa::v4_bf16, Isa::amx, Isa::amx_twin})
    if (isa_runs(level)) levels += (levels.empty() ? "" : " ") + std::string(isa_name(level));
  return levels;
}

}  // namespace

// No tensor says where these run, so they are registered for every back end at once.
GRADOPS_DEFINE("isa() -> str")
GRADOPS_DEFINE("isa_levels() -> str")
STABLE_TORCH_LIBRARY_IMPL(gradops, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isa_levels", TORCH_BOX(&isa_levels));
}

}  // namespace gradops
#endif
