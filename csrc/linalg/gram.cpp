#include "linalg/gram.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {
namespace {

constexpr int64_t kGroup = 256;   // rows that one piece takes
constexpr int64_t kSlice = 2048;  // columns of a slice at least
constexpr int64_t kPieces = 32;   // of one matrix, where there are columns enough: work for that many threads

int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Plan {
  int64_t groups, pairs, slices, slice, stride, packed;
  explicit Plan(const GramTask& t)
      : groups(up(t.rows, kGroup)),
        pairs(groups * (groups + 1) / 2),
        slices(pairs < kPieces ? kPieces / pairs : 1),
        slice(up(t.cols, slices)) {
    slice = up(slice < kSlice ? kSlice : slice, 64) * 64;
    slices = t.cols > slice ? up(t.cols, slice) : 1;
    const int64_t rows = t.rows < kGroup ? t.rows : kGroup;
    const GramSpace space = GRADOPS_DISPATCH(gram_space)(rows, rows, t.wide);
    stride = up(space.sum, 64) * 64;
    packed = space.packed;
  }
  GramPiece piece(const GramTask& t, int64_t item, int64_t pair) const {
    int64_t i = 0;  // the pair-th of (0, 0), (1, 0), (1, 1), (2, 0), ...
    while (pair > i) pair -= ++i;
    const auto rows = [&](int64_t g) { return t.rows - g * kGroup < kGroup ? t.rows - g * kGroup : kGroup; };
    const char* j = static_cast<const char*>(t.j) + item * t.rows * t.cols * element_size(t.element);
    return {j, t.element, t.wide, t.cols, i * kGroup, rows(i), pair * kGroup, rows(pair), 0, t.cols};
  }
};

}  // namespace

int64_t cpu::gram_workspace(const GramTask& t) {
  const Plan p(t);
  return t.batch * p.pairs * p.slices * p.stride + 64;
}

void cpu::gram(const GramTask& t, void* workspace, void*) {
  if (t.batch == 0 || t.rows == 0) return;
  const Plan p(t);
  char* sums = static_cast<char*>(workspace);
  sums += -reinterpret_cast<uintptr_t>(sums) & 63;
  const auto sum = GRADOPS_DISPATCH(gram_sum);
  const auto write = GRADOPS_DISPATCH(gram_write);
  const int64_t work = t.rows * t.rows / p.pairs * p.slice, grain = work < 65536 ? 65536 / (work + 1) : 1;
  parallel_for(0, t.batch * p.pairs * p.slices, grain, [&](int64_t first, int64_t last) {
    char* packed = thread_scratch(p.packed);
    for (int64_t n = first; n < last; ++n) {
      GramPiece piece = p.piece(t, n / (p.pairs * p.slices), n / p.slices % p.pairs);
      piece.begin = n % p.slices * p.slice;
      piece.end = piece.begin + p.slice < t.cols ? piece.begin + p.slice : t.cols;
      sum(piece, sums + n * p.stride, packed);
    }
  });
  parallel_for(0, t.batch * p.pairs, grain, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t item = n / p.pairs;
      char* g = static_cast<char*>(t.g) + item * t.rows * t.rows * (t.wide ? 8 : 4);
      write(p.piece(t, item, n % p.pairs), sums + n * p.slices * p.stride, p.slices, p.stride, g, t.rows);
    }
  });
}

}  // namespace gradops
