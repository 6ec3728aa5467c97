#include "ot/solve.h"

#include "ot/ascent.h"
#include "ot/cpu_team.h"

namespace gradops::GRADOPS_ISA {

void solve_transport(const Transport& t, void* workspace, bool threads) {
  CpuTeam team(threads);
  Carve carve(workspace);
  SolveState s;
  plan_solve(carve, t, team.pieces(t.cost.n, t.cost.m), s);
  solve_one(team, t, s);
}

}  // namespace gradops::GRADOPS_ISA
