// team.h: who runs one transport problem. The solvers are templates over a Team, so that one text serves both back
// ends: on the CPU (ot/cpu_team.h) loops, on CUDA a thread block.
//
//   team.each(count, f)              f(i), independent of each other; everyone waits at the end
//   team.sum(count, f) -> double     a fixed tree: the same bits for any number of threads; every thread gets it
//   team.largest(count, f) -> double -infinity for count = 0
//   team.columns(count, work, f)     f(j, lanes): CPU a plain call; CUDA a warp per column, whose lanes all call f;
//                                    work: about how many numbers one call touches, which decides about threads
//   Team::kTogether                  how many columns one call of f had better work on at a time
//   team.once(f)                     one thread, then everyone waits
//   team.pieces(n, m) -> int64_t     into how many pieces sums that scatter over rows are cut, 1 or 8; by size only
//   team.bounds(scan, scaled)        for every column: low becomes a lower bound of its threshold, -infinity if empty
//   team.scan(scan)                  for columns with low < infinity: collects the candidates (ot/column_scan.h);
//                                    count of the other columns becomes 0, their index is left alone
// Lanes share one column:
//   lanes.each(count, f)                              f(k)
//   lanes.sum(count, f), lanes.largest(count, f)      every lane gets it
//   lanes.span(count, f, least, most) -> double       the sum, the smallest and the largest of f(k); NaN may hide in
//                                                     the last two
//   lanes.above(count, x, level, number) -> double    sum of x(k) - level over x(k) > level; number: how many
//   lanes.load_above(count, x, at, less, to, level, number)   to[k] = x[at[k]] - less[k], then above() of to;
//                                                              at null: x[k]
//   lanes.sum_at(count, x, at) -> double              sum of x[at[k]]
//   lanes.add_at(count, at, f, to)                    to[at[k]] += f(k); the at[k] differ
//   lanes.count_at(count, at, x, to)                  to[2 at[k]] += x[k] and to[2 at[k] + 1] += 1
//   lanes.keep(count, load, wanted, put) -> int64_t   put(v, place) of the wanted v = load(k), in order; how many. It
//                                                     may move entries to the front of their own array
//   lanes.once(f)                                     one lane, then all wait
//   lanes.wait()                                      what other lanes wrote before is seen after
//
// Scalars are the same in every thread of a team and control flow depends on them only. Nothing here or in the
// algorithms knows <cuda>, threads or the standard library's containers.
#pragma once
#if defined(__CUDACC__)  // inlined into one another they take ptxas minutes
#define GRADOPS_TEAM __host__ __device__ __noinline__
#else
#define GRADOPS_TEAM inline
#endif
#include <cstdint>

namespace gradops {
namespace {

struct Values {  // an array as one of the functions above
  const double* first;
  GRADOPS_TEAM double operator()(int64_t k) const { return first[k]; }
};

struct Kept {  // numbers that were kept
  int64_t count;
  double sum, squares;  // of their squares
};

}  // namespace
}  // namespace gradops
