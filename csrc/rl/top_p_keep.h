// top_p_keep: which entries of a row of logits belong to its nucleus: from the likeliest on, all whose likelier ones
// have a mass below p, and at least min_keep. Among equal logits lower ids come first. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct TopPTask {  // rows x cols logits, contiguous; mask: one byte per logit
  const void* logits;
  Element element;
  int64_t rows, cols;
  double p;
  int64_t min_keep;
  bool* mask;
};

constexpr int64_t top_p_scratch(int64_t cols) { return 16 * cols + 256; }  // bytes, for a row

GRADOPS_DECLARE(void, top_p_rows, const TopPTask&, int64_t begin, int64_t end, char* scratch)

namespace cpu {
void top_p_keep(const TopPTask&, void* = nullptr);
}  // namespace cpu
namespace cuda {
void top_p_keep(const TopPTask&, void* stream);
}  // namespace cuda
}  // namespace gradops
