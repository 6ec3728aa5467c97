// kept_memory.h: memory for large results, kept for the next one when a result is freed. Fresh pages cost more than
// most kernels that fill them: the system clears each, and a virtual machine may have to find it first.
//
// What is kept is lent: the system takes it back, without asking, when memory is short.
#pragma once
#include <cstdint>

namespace gradops {
// At least `bytes` bytes, aligned to 4096, of any contents, and in `size` how many. Null where there is none: then
// the caller allocates as ever.
void* take_kept_memory(int64_t bytes, int64_t& size);
// Gives back what was taken, with its `size`. Both may be called from any thread.
void give_kept_memory(void* memory, int64_t size);
}  // namespace gradops
