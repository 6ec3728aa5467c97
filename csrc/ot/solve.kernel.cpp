#include "ot/solve.h"

#include "ot/cpu_team.h"
#include "ot/path_newton.h"

namespace gradops::GRADOPS_ISA {

void solve_transport(const Transport& t, void* workspace, bool threads) {
  CpuTeam team(threads);
  Carve carve(workspace);
  TransportState s;
  plan_state(carve, t, team.pieces(t.cost.n, t.cost.m), s);
  path_newton(team, t, s);
}

}  // namespace gradops::GRADOPS_ISA
