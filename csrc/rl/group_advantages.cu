#include "rl/group_advantages.h"
#include <stdexcept>
namespace gradops {
int64_t cuda::group_advantages_workspace(const GroupTask&) { return 0; }
void cuda::group_advantages(const GroupTask&, void*, void*) { throw std::runtime_error("soon"); }
}
