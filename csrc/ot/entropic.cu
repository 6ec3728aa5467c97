#include "ot/entropic.h"
namespace gradops {
int64_t cuda::entropic_workspace(const EntropicTask&) { return 0; }
void cuda::entropic(const EntropicTask&, void*, void*) {}
}  // namespace gradops
