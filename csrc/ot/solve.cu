#include "ot/solve.h"

#include "ot/ascent.h"
#include "ot/cuda_team.cuh"

namespace gradops {
namespace {

constexpr int64_t kCandidates = 1 << 23;  // of one problem: 300 MB

// A problem's own memory: candidates and evaluations, then its costs if they have to be copied.
struct Room {
  int64_t capacity, state, bytes;
};

__host__ __device__ inline Room room_of(const SolveTask& task) {
  Transport t = task.first;
  const int64_t n = t.cost.n, m = t.cost.m;
  const int64_t most = n * m <= kCandidates ? n : kCandidates / m > 256 ? kCandidates / m : 256;
  t.capacity = most < n ? most : n;
  SolveState s;
  Carve carve(nullptr);
  plan_solve(carve, t, CudaTeam::kWarps, s);
  const int64_t state = carve.bytes();
  if (t.cost.matrix && task.m_len) carve.take<char>(n * m * stored_size(t.cost.element));
  return {t.capacity, state, carve.bytes()};
}

// Rows of a problem's costs without the rest of the batch's row length.
template <class T>
__device__ void copy_costs(const CudaTeam& team, const void* from, int64_t stride, int64_t n, int64_t m, void* to) {
  team.columns(n, m, [&](int64_t i, const CudaLanes& lanes) {
    const T* row = static_cast<const T*>(from) + i * stride;
    lanes.each(m, [&](int64_t j) { static_cast<T*>(to)[i * m + j] = row[j]; });
  });
}

// The whole solve of a problem in one block; `shared` bytes of shared memory for its costs, or 0.
__global__ void __launch_bounds__(CudaTeam::kThreads)
    solve_kernel(const __grid_constant__ SolveTask task, unsigned char* workspace, int64_t shared) {
  __shared__ double scratch[32];
  GRADOPS_DYNAMIC_SHARED(unsigned char, costs);
  CudaTeam team(scratch);
  const Room room = room_of(task);
  unsigned char* memory = workspace + blockIdx.x * room.bytes;
  const int64_t rows = task.first.cost.n, columns = task.first.cost.m;
  for (int64_t item = blockIdx.x; item < task.batch; item += gridDim.x) {
    Transport t = item_of(task, item);
    const bool good = t.cost.n >= 0 && t.cost.n <= rows && t.cost.m >= 0 && t.cost.m <= columns;
    if (!good) t.cost.n = rows, t.cost.m = columns;
    const int64_t n = t.cost.n, m = t.cost.m, width = t.width;
    t.capacity = room.capacity < n ? room.capacity : n;
    team.each(rows, [&](int64_t i) {
      if (i >= n) t.alpha[i] = 0;
    });
    team.each(columns, [&](int64_t j) {
      if (j >= m) t.beta[j] = 0;
    });
    team.each((columns - m) * width, [&](int64_t k) { t.index[m * width + k] = 0, t.weight[m * width + k] = 0; });
    if (t.cost.matrix && (shared || m < columns)) {
      void* to = shared ? costs : memory + room.state;
      const int64_t size = stored_size(t.cost.element);
      if (size == 8)
        copy_costs<uint64_t>(team, t.cost.matrix, columns, n, m, to);
      else if (size == 4)
        copy_costs<uint32_t>(team, t.cost.matrix, columns, n, m, to);
      else
        copy_costs<uint16_t>(team, t.cost.matrix, columns, n, m, to);
      t.cost.matrix = to;
    }
    SolveState s;
    Carve carve(memory);
    plan_solve(carve, t, CudaTeam::kWarps, s);
    s.transport.evaluations = 0;
    if (good)
      solve_one(team, t, s);
    else
      give_up(team, t, s.transport, TransportStatus::invalid);
    __syncthreads();
  }
}

int64_t slots(const SolveTask& task) {  // problems at a time
  const int64_t most = 2 * int64_t(multiprocessors());
  return task.batch < most ? task.batch : most;
}

}  // namespace

int64_t cuda::solve_workspace(const SolveTask& task) { return slots(task) * room_of(task).bytes; }

void cuda::solve(const SolveTask& task, void* workspace, void* stream) {
  if (task.batch == 0) return;
  const Cost& c = task.first.cost;
  const int64_t bytes = c.matrix ? c.n * c.m * stored_size(c.element) : 0;
  const int64_t shared = bytes + 1024 <= int64_t(max_shared_bytes()) ? bytes : 0;
  launch(solve_kernel, blocks(slots(task)), CudaTeam::kThreads, size_t(shared), stream, task,
         static_cast<unsigned char*>(workspace), shared);
}

}  // namespace gradops
