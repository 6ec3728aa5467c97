// scratch.h: memory that a thread keeps between calls; fresh pages for every call would cost page faults.
#pragma once
#include <cstdint>

namespace gradops {
// At least `bytes` bytes, aligned to 4096, owned by the calling thread until its next call or its end.
// A call for no more than the one before gives the same memory, contents kept.
// Throws std::bad_alloc.
char* thread_scratch(int64_t bytes);
}  // namespace gradops
