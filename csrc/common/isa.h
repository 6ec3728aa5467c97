// isa.h: picks one of several builds of the same kernel source at run time.
//
// CMake compiles every *.kernel.cpp once per level, with -DGRADOPS_ISA=<level> and that level's
// -m flags. Each build puts its functions in namespace gradops::<level>.
//   v2, v3, v4   the x86-64 levels: SSE4.2, AVX2 + FMA, AVX-512
//   v4_bf16      v4 and AVX512_BF16 (vdpbf16ps)
//   amx          v4_bf16 and AMX tiles of bf16, granted by the operating system
//   amx_twin     amx with a plain C++ twin of the tile unit (common/amx.h), for tests on machines
//                without one; only built with GRADOPS_EMU, only used when asked for
// GRADOPS_DECLARE(name, args...) declares a function at v2, v3 and v4; GRADOPS_DECLARE_BF16 at the
// others. GRADOPS_DISPATCH(name) and GRADOPS_DISPATCH_BF16(name) pick the best build for this machine.
#pragma once

namespace gradops {
enum class Isa { v2, v3, v4, v4_bf16, amx, amx_twin };
Isa best_isa();  // honours GRADOPS_ISA=<level> in the environment; a level that cannot run is an error
const char* isa_name(Isa isa);
bool isa_runs(Isa isa);  // built in, and the machine has it
}  // namespace gradops

#if defined(GRADOPS_MULTI_ISA)
#define GRADOPS_DECLARE(result, name, ...) \
  namespace v2 {                           \
  result name(__VA_ARGS__);                \
  }                                        \
  namespace v3 {                           \
  result name(__VA_ARGS__);                \
  }                                        \
  namespace v4 {                           \
  result name(__VA_ARGS__);                \
  }
#define GRADOPS_DISPATCH(name)                                    \
  (gradops::best_isa() >= gradops::Isa::v4   ? &gradops::v4::name \
   : gradops::best_isa() == gradops::Isa::v3 ? &gradops::v3::name \
                                             : &gradops::v2::name)
#define GRADOPS_DECLARE_BF16(result, name, ...) \
  namespace v4_bf16 {                           \
  result name(__VA_ARGS__);                     \
  }                                             \
  namespace amx {                               \
  result name(__VA_ARGS__);                     \
  }                                             \
  namespace amx_twin {                          \
  result name(__VA_ARGS__);                     \
  }
#if defined(GRADOPS_AMX_TWIN)
#define GRADOPS_PICK_TWIN(name) gradops::best_isa() == gradops::Isa::amx_twin ? &gradops::amx_twin::name:
#else
#define GRADOPS_PICK_TWIN(name)
#endif
#define GRADOPS_DISPATCH_BF16(name) /* null below v4_bf16 */                                  \
  (GRADOPS_PICK_TWIN(name) gradops::best_isa() == gradops::Isa::amx ? &gradops::amx::name     \
   : gradops::best_isa() == gradops::Isa::v4_bf16                   ? &gradops::v4_bf16::name \
                                                                    : nullptr)
#else
#define GRADOPS_DECLARE(result, name, ...) \
  namespace v2 {                           \
  result name(__VA_ARGS__);                \
  }
#define GRADOPS_DISPATCH(name) (&gradops::v2::name)
#define GRADOPS_DECLARE_BF16(result, name, ...)
#define GRADOPS_DISPATCH_BF16(name) nullptr
#endif
