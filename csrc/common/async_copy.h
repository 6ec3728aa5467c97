// async_copy.h: 16 bytes from global to shared memory, without waiting (cp.async, sm_80 and later).
//
// wait_async() waits for all copies of the calling thread; other threads see them after the next
// barrier. In the emulator a copy ruins its destination at once and arrives at the wait: a missing
// wait shows as NaN, and TSan sees both the early and the late write.
#pragma once
#include "common/cuda_launch.h"

namespace gradops {

__device__ inline void copy_async(void* shared, const void* global GRADOPS_SITE) {
#if defined(GRADOPS_CUDA_EMU)
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emu::fail("copy_async: an address is not 16-byte aligned", site);
  std::memset(shared, 0xff, 16);
  emu::remember_copy(shared, global, site);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
#endif
}

__device__ inline void wait_async(GRADOPS_ONLY_SITE) {
#if defined(GRADOPS_CUDA_EMU)
  if (emu::skipped(site)) return;
  for (const emu::Copy& c : emu::take_copies()) std::memcpy(c.shared, c.global, 16);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace gradops
