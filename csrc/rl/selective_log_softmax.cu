#include "rl/selective_log_softmax.h"

#include "common/cuda_launch.h"

namespace gradops {

int64_t cuda::selective_log_softmax_workspace(const LogSoftmaxTask&) { return 0; }
void cuda::selective_log_softmax(const LogSoftmaxTask&, void*, void*) { throw std::runtime_error("not there yet"); }
void cuda::selective_log_softmax_backward(const LogSoftmaxGradTask&, void*) {
  throw std::runtime_error("not there yet");
}

}  // namespace gradops
