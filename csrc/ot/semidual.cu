#include "common/cuda_launch.h"
#include "ot/semidual.h"

namespace gradops {

int64_t cuda::semidual_workspace(const SemidualTask&) { return 0; }
void cuda::semidual(const SemidualTask&, void*, void*) { throw std::runtime_error("semidual: not on CUDA yet"); }

}  // namespace gradops
