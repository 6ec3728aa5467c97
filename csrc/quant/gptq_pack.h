// gptq_pack, gptq_unpack: codes of 2, 3, 4 or 8 bits side by side in 32-bit words, as GPTQ checkpoints hold them.
// A row of codes is one stream of bits, lowest first: code i is bits i * b .. i * b + b - 1. With 3 bits a code may
// lie across two words. Torch-free.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace gradops {

struct PackTask {
  uint8_t* codes;   // batch x rows x cols
  uint32_t* words;  // batch x rows x ceil(cols * bits / 32), or x that x rows if transposed; bits left over are zero
  int64_t batch, rows, cols;
  int bits;
  bool transposed;
};
constexpr int64_t packed_cols(int64_t cols, int64_t bits) { return (cols * bits + 31) / 32; }

constexpr int64_t kPackRows = 16;  // a tile: in transposed words, a cache line of each
// Tiles [begin, end) of batch * ceil(rows / kPackRows)
GRADOPS_DECLARE(void, gptq_pack_tiles, const PackTask&, int64_t begin, int64_t end)
GRADOPS_DECLARE(void, gptq_unpack_tiles, const PackTask&, int64_t begin, int64_t end)

namespace cpu {
void gptq_pack(const PackTask&, void* = nullptr);
void gptq_unpack(const PackTask&, void* = nullptr);
}  // namespace cpu
namespace cuda {
void gptq_pack(const PackTask&, void* stream);
void gptq_unpack(const PackTask&, void* stream);
}  // namespace cuda
}  // namespace gradops
