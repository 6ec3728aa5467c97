// huge_pages.h: fresh memory that a kernel is about to fill costs a page fault every 4096 bytes, which can be several
// times the work itself; large arrays ask for pages of 2 MiB instead. A hint only: nothing else changes.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gradops {

inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 4096, kLarge = 8 << 20;
  if (bytes < kLarge) return;
  const int64_t before = -int64_t(reinterpret_cast<uintptr_t>(memory)) & (kPage - 1);
  madvise(static_cast<char*>(memory) + before, size_t((bytes - before) / kPage * kPage), MADV_HUGEPAGE);
#endif
}

}  // namespace gradops
