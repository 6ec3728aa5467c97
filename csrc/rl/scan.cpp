#include "rl/scan.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/value_error.h"

namespace gradops {
namespace {

constexpr int64_t kGrain = 16384;  // tokens

struct Chunk {
  ScanPiece piece;
  ScanMap map;
};

int64_t row_begin(const ScanTask& t, int64_t row) { return t.offsets ? t.offsets[row] : row * t.length; }

// The first row that begins at or after this token.
int64_t row_from(const ScanTask& t, int64_t token) {
  if (!t.offsets) return (token + t.length - 1) / t.length;
  return std::lower_bound(t.offsets, t.offsets + t.rows, token) - t.offsets;
}

// One row, its chunks shared among the threads. Same numbers as scan_rows.
void long_row(const ScanTask& t, int64_t row, Chunk* chunks) {
  const auto piece_of = GRADOPS_DISPATCH(scan_piece);
  const auto first_value = GRADOPS_DISPATCH(scan_first_value);
  const int64_t begin = row_begin(t, row), end = row_begin(t, row + 1);
  const int64_t count = (end - begin + kScanChunk - 1) / kScanChunk;
  ScanPiece at = GRADOPS_DISPATCH(scan_start)(t, row, begin, end);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t done = i * kScanChunk, size = std::min(kScanChunk, end - begin - done);
    chunks[i].piece = at;
    chunks[i].piece.begin = t.kind == ScanKind::carry ? begin + done : end - done - size;
    chunks[i].piece.end = chunks[i].piece.begin + size;
    if (t.values) at.following = first_value(t, chunks[i].piece.begin, chunks[i].piece.end, at.following);
  }
  parallel_for(0, count, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      ScanPiece piece = chunks[i].piece;
      chunks[i].map = piece_of(t, piece, false);
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    chunks[i].piece.carry = at.carry;
    at.carry = scan_fold(chunks[i].map, at.carry);
  }
  parallel_for(0, count, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) piece_of(t, chunks[i].piece, true);
  });
  GRADOPS_DISPATCH(scan_finish)(t, row, at.carry);
}

}  // namespace

int64_t cpu::scan_workspace(const ScanTask& t) { return (t.tokens / kScanChunk + 1) * int64_t(sizeof(Chunk)); }

void cpu::scan(const ScanTask& t, void* workspace, void*) {
  if (t.offsets) check_offsets("cu_seqlens", t.offsets, t.rows, t.tokens);
  const auto rows = GRADOPS_DISPATCH(scan_rows);
  if (t.tokens == 0) return rows(t, 0, t.rows);
  // A row of more than one thread's share is left for all of them.
  const int64_t share = std::max(2 * kScanChunk, t.tokens / num_threads());
  const auto is_long = [&](int64_t row) { return row_begin(t, row + 1) - row_begin(t, row) > share; };
  parallel_for(0, t.tokens, kGrain, [&](int64_t b, int64_t e) {
    const int64_t last = e == t.tokens ? t.rows : row_from(t, e);
    for (int64_t row = row_from(t, b), end; row < last; row = end + 1) {
      for (end = row; end < last && !is_long(end);) ++end;
      rows(t, row, end);
    }
  });
  for (int64_t row = 0; row < t.rows; ++row)
    if (is_long(row)) long_row(t, row, static_cast<Chunk*>(workspace));
}

}  // namespace gradops
