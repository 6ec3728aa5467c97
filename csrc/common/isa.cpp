#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gradops {
namespace {

#if defined(__x86_64__) && defined(GRADOPS_MULTI_ISA)
bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}

// Tiles need the processor and, because their state is large, a permission from the kernel.
bool have_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr int edx = 3;
  return cpuid_bit(7, 0, edx, 24) && cpuid_bit(7, 0, edx, 22) &&  // amx-tile, amx-bf16
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool have(Isa isa) {
  __builtin_cpu_init();
  constexpr int eax = 0;
  switch (isa) {
    case Isa::v2:
      return true;
    case Isa::v3:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case Isa::v4:
      return have(Isa::v3) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::v4_bf16:
      return have(Isa::v4) && cpuid_bit(7, 1, eax, 5);
    case Isa::amx:
      return have(Isa::v4_bf16) && have_amx();
    case Isa::amx_twin:
#if defined(GRADOPS_AMX_TWIN)
      return have(Isa::v4_bf16);
#else
      return false;
#endif
  }
  return false;
}
#else
bool have(Isa isa) { return isa == Isa::v2; }
#endif

constexpr Isa kLevels[] = {Isa::amx, Isa::v4_bf16, Isa::v4, Isa::v3, Isa::v2};

Isa choose() {
  if (const char* want = std::getenv("GRADOPS_ISA")) {
    for (Isa isa : {Isa::v2, Isa::v3, Isa::v4, Isa::v4_bf16, Isa::amx, Isa::amx_twin})
      if (std::string(want) == isa_name(isa)) {
        if (!have(isa))
          throw std::runtime_error(std::string("GRADOPS_ISA=") + want + ": not available on this machine");
        return isa;
      }
    throw std::runtime_error(std::string("GRADOPS_ISA=") + want + ": expected v2, v3, v4, v4_bf16 or amx");
  }
  for (Isa isa : kLevels)
    if (have(isa)) return isa;
  return Isa::v2;
}
}  // namespace

Isa best_isa() {
  static const Isa isa = choose();
  return isa;
}

bool isa_runs(Isa isa) { return have(isa); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::v2:
      return "v2";
    case Isa::v3:
      return "v3";
    case Isa::v4:
      return "v4";
    case Isa::v4_bf16:
      return "v4_bf16";
    case Isa::amx:
      return "amx";
    case Isa::amx_twin:
      return "amx_twin";
  }
  return "?";
}
}  // namespace gradops
