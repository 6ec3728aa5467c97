// solve: batches of sparse optimal transport problems (ot/transport.h). Torch-free interface.
#pragma once
#include "common/isa.h"
#include "ot/transport.h"

namespace gradops {

struct SolveTask {
  Transport first;  // problem 0, its sizes those of all; capacity 0: the driver chooses
  int64_t batch;
  const int64_t *n_len, *m_len;  // batch each, or null: problem i is the upper left n_len[i] x m_len[i] part
};

// One problem. threads: whether it may share its loops.
GRADOPS_DECLARE(void, solve_transport, const Transport&, void* workspace, bool threads)

namespace cpu {
void solve(const SolveTask&, void* = nullptr, void* = nullptr);
int64_t solve_workspace(const SolveTask&);
}  // namespace cpu
namespace cuda {
void solve(const SolveTask&, void* workspace, void* stream);
int64_t solve_workspace(const SolveTask&);
}  // namespace cuda
}  // namespace gradops
