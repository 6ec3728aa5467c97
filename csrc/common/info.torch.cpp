// What this build and this machine can do, for `gradops info`.
#include "common/isa.h"
#include "common/torch_op.h"

#if GRADOPS_BACKEND_ID == 1
namespace {
std::string isa() { return gradops::isa_name(gradops::best_isa()); }
std::string isa_levels() {
  using gradops::Isa;
  std::string names;
  for (Isa level : {Isa::v2, Isa::v3, Isa::v4, Isa::v4_bf16, Isa::amx, Isa::amx_twin})
    if (gradops::isa_runs(level)) names.append(names.empty() ? "" : " ").append(gradops::isa_name(level));
  return names;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gradops, m) {
  m.def("isa() -> str");
  m.def("isa_levels() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(gradops, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isa_levels", TORCH_BOX(&isa_levels));
}
#endif
