#include "common/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gradops {
namespace {
constexpr int64_t kHugePage = int64_t(1) << 21;  // fewer of them miss the TLB
}

char* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    const int64_t page = bytes < 2 * kHugePage ? 4096 : kHugePage, rounded = (bytes + page - 1) / page * page;
    memory.reset(static_cast<char*>(std::aligned_alloc(page, rounded)));
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (page == kHugePage) madvise(memory.get(), rounded, MADV_HUGEPAGE);  // refused: no harm
#endif
    size = rounded;
  }
  return memory.get();
}
}  // namespace gradops
