// gram: G = J J^T for a batch of matrices with few rows and many columns, given as blocks of their columns; exactly
// symmetric; sums in double (`wide`) or float. Torch-free interface.
//
// The columns of all blocks are cut into slices and the rows into groups, by the shapes alone; the sums over the slices
// are added in order. So no bit depends on the number of threads.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct GramBlock {  // batch of contiguous rows x cols matrices
  const void* j;
  Element element;
  int64_t cols;
};
struct GramTask {
  const GramBlock* blocks;
  int64_t count;
  void* g;  // batch x rows x rows, double if wide, else float
  int64_t batch, rows;
  bool wide;
};

// One group of rows times another, or itself, over columns [begin, end) of one matrix of one block.
struct GramPiece {
  const void* j;
  Element element;
  bool wide;
  int64_t cols;
  int64_t row, rows, other, others;  // the groups: first row and count; other <= row
  int64_t begin, end;
  bool add;  // to the sum that is there
};
struct GramSpace {
  int64_t sum, packed;  // bytes
};
constexpr int64_t kGramGroup = 256;  // rows that one piece takes
constexpr int64_t kGramPieces = 32;  // of one matrix, where there are columns enough: work for that many threads
GRADOPS_DECLARE(GramSpace, gram_space, int64_t rows, int64_t others, bool wide)
GRADOPS_DECLARE(void, gram_sum, const GramPiece&, void* sum, void* packed)
// g <- the sum of `slices` sums, `stride` bytes apart, and its mirror image. g: the whole matrix, size x size.
GRADOPS_DECLARE(void, gram_write, const GramPiece&, const void* sums, int64_t slices, int64_t stride, void* g,
                int64_t size)

namespace cpu {
void gram(const GramTask&, void* workspace, void* = nullptr);
int64_t gram_workspace(const GramTask&);  // bytes
}  // namespace cpu
namespace cuda {
void gram(const GramTask&, void* workspace, void* stream);
int64_t gram_workspace(const GramTask&);
}  // namespace cuda
}  // namespace gradops
