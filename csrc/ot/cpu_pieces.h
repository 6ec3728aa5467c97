// cpu_pieces.h: into how many pieces the CPU cuts what scatters over rows: by size only, so no bit depends on threads.
#pragma once
#include <cstdint>

namespace gradops {
namespace {
inline int64_t cpu_pieces(int64_t n, int64_t m) { return n * m >= 1 << 20 ? 8 : 1; }
}  // namespace
}  // namespace gradops
