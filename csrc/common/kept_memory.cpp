#include "common/kept_memory.h"

#include <mutex>

#include "common/huge_pages.h"

namespace gradops {

#if defined(__linux__) && defined(MADV_FREE)
namespace {

constexpr int64_t kHugePage = int64_t(1) << 21;
constexpr int kPlaces = 2;  // a kernel of two results, or a result that is the next call's argument

struct Block {
  void* memory = nullptr;
  int64_t size = 0;
};
struct Kept {
  std::mutex mutex;
  Block blocks[kPlaces];  // the newest first
};
Kept& kept() {
  static Kept* const k = new Kept;  // never destroyed: tensors may be freed at the very end
  return *k;
}

// Aligned to huge pages, so that all of it can be such
void* mapped(int64_t size) {
  const size_t n = size_t(size), more = n + size_t(kHugePage);
  void* const p = mmap(nullptr, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  const size_t before = size_t(-reinterpret_cast<uintptr_t>(p)) & size_t(kHugePage - 1);
  char* const start = static_cast<char*>(p) + before;
  if (before) munmap(p, before);
  munmap(start + n, more - n - before);
  prefer_huge_pages(start, size);
  return start;
}

}  // namespace

void* take_kept_memory(int64_t bytes, int64_t& size) {
  {
    Kept& k = kept();
    const std::lock_guard lock(k.mutex);
    for (Block& b : k.blocks)
      if (b.size >= bytes && b.size / 2 <= bytes) {
        void* const memory = b.memory;
        size = b.size;
        b = {};
        return memory;
      }
  }
  size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  return mapped(size);
}

void give_kept_memory(void* memory, int64_t size) {
  Block last{memory, size};
  if (madvise(memory, size_t(size), MADV_FREE) == 0) {  // the system may take the pages, until they are written to
    Kept& k = kept();
    const std::lock_guard lock(k.mutex);
    for (Block& b : k.blocks) {
      const Block older = b;
      b = last, last = older;
      if (!last.memory) return;
    }
  }
  munmap(last.memory, size_t(last.size));
}

#else
void* take_kept_memory(int64_t, int64_t&) { return nullptr; }
void give_kept_memory(void*, int64_t) {}
#endif

}  // namespace gradops
