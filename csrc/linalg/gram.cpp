#include "linalg/gram.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "linalg/gram_pairs.h"

namespace gradops {
namespace {

constexpr int64_t kSlice = 2048;  // columns of a slice at least

struct Plan {
  int64_t cols = 0, groups, pairs, slices, slice, stride, packed;
  explicit Plan(const GramTask& t)
      : groups(up(t.rows, kGramGroup)),
        pairs(groups * (groups + 1) / 2),
        slices(pairs < kGramPieces ? kGramPieces / pairs : 1) {
    for (int64_t b = 0; b < t.count; ++b) cols += t.blocks[b].cols;
    slice = up(cols, slices);
    slice = up(slice < kSlice ? kSlice : slice, 64) * 64;
    slices = cols > slice ? up(cols, slice) : 1;
    const int64_t rows = t.rows < kGramGroup ? t.rows : kGramGroup;
    const GramSpace space = GRADOPS_DISPATCH(gram_space)(rows, rows, t.wide);
    stride = up(space.sum, 64) * 64;
    packed = space.packed;
  }
  GramPiece piece(const GramTask& t, int64_t pair) const {
    const auto [i, j] = pair_of(pair);
    const auto rows = [&](int64_t g) {
      return t.rows - g * kGramGroup < kGramGroup ? t.rows - g * kGramGroup : kGramGroup;
    };
    return {nullptr, {}, t.wide, 0, i * kGramGroup, rows(i), j * kGramGroup, rows(j), 0, 0, false};
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
      const int64_t item = n / (p.pairs * p.slices), begin = n % p.slices * p.slice, end = begin + p.slice;
      GramPiece piece = p.piece(t, n / p.slices % p.pairs);
      int64_t at = 0;  // first column of the block
      for (const GramBlock* b = t.blocks; b < t.blocks + t.count; at += b++->cols) {
        if (begin >= at + b->cols || at >= end) continue;
        piece.j = static_cast<const char*>(b->j) + item * t.rows * b->cols * element_size(b->element);
        piece.element = b->element;
        piece.cols = b->cols;
        piece.begin = begin > at ? begin - at : 0;
        piece.end = end - at < b->cols ? end - at : b->cols;
        sum(piece, sums + n * p.stride, packed);
        piece.add = true;
      }
      if (!piece.add) sum(piece, sums + n * p.stride, packed);  // no columns at all
    }
  });
  parallel_for(0, t.batch * p.pairs, grain, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      char* g = static_cast<char*>(t.g) + n / p.pairs * t.rows * t.rows * (t.wide ? 8 : 4);
      write(p.piece(t, n % p.pairs), sums + n * p.slices * p.stride, p.slices, p.stride, g, t.rows);
    }
  });
}

}  // namespace gradops
