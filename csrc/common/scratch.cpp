#include "common/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace gradops {
char* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, rounded)));
    if (!memory) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}
}  // namespace gradops
