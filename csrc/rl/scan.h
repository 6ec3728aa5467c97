// scan: affine recurrences along the tokens of many rows. Torch-free interface.
//
// A row is walked from its end (from its start for `carry`). A token maps the carry y to x + a y; one that does not
// count leaves it as it is. All arithmetic is in double. A row is cut into chunks of kScanChunk tokens, counted from
// where the walk starts; the map of a chunk is folded from 0 and then applied to the carry, whoever does it, so that
// results depend neither on the number of threads nor on the other rows.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

// What a token does. n: the value that follows it, from next_values, else of the next token that counts, else from
// last_values; 0 if terminated. g = 0 where terminated or truncated, else gamma.
enum class ScanKind : int {
  // d = reward + gamma n - value, x = rho d, a = g lam c; rho and c: the clipped ratios, or 1.
  // first = y, or with ratios rho (d + g y_next); second = y + value.
  advantages,
  // x = reward + (gamma - g lam) n, a = g lam. The walk starts with last_values, or with next_values of the last token
  // that counts. first = y.
  returns,
  // x = reward, a = ratio. first = the carry before the token, from 0; second = the carry after the row.
  carry,
};

constexpr int64_t kScanChunk = 8192;

struct ScanTask {
  ScanKind kind;
  Element element;                                                    // of what comes in; f64 goes out as f64, else f32
  const void *rewards, *values, *next_values, *last_values, *ratios;  // all but rewards may be null
  const uint8_t *terminated, *truncated, *mask;                       // bool, may be null; mask: what counts
  const int64_t* offsets;  // rows + 1 of them, or null: every row has `length` tokens
  int64_t rows, length, tokens;
  double gamma, lam, rho_clip, c_clip;
  void *first, *second;
};

struct ScanPiece {  // tokens [begin, end) of a row, and what the walk brings along
  int64_t begin, end;
  double carry, following;  // following: the value of the next token that counts
};
struct ScanMap {  // y -> x + a y
  double x, a;
};
// Explicit, because the driver and the kernels must round alike.
[[gnu::always_inline]] inline double scan_fold(const ScanMap& m, double carry) {
  return m.a == 0 ? m.x : __builtin_fma(m.a, carry, m.x);
}

// The map of a piece; writes its results if `write`; leaves `following` for the next piece.
GRADOPS_DECLARE(ScanMap, scan_piece, const ScanTask&, ScanPiece&, bool write)
// All of rows [begin, end).
GRADOPS_DECLARE(void, scan_rows, const ScanTask&, int64_t begin, int64_t end)
// Where the walk of a row with these tokens starts.
GRADOPS_DECLARE(ScanPiece, scan_start, const ScanTask&, int64_t row, int64_t begin, int64_t end)
// The value of the first token in [begin, end) that counts, else `otherwise`.
GRADOPS_DECLARE(double, scan_first_value, const ScanTask&, int64_t begin, int64_t end, double otherwise)
GRADOPS_DECLARE(void, scan_finish, const ScanTask&, int64_t row, double carry)

namespace cpu {
void scan(const ScanTask&, void* workspace, void* = nullptr);
int64_t scan_workspace(const ScanTask&);  // bytes
}  // namespace cpu
namespace cuda {
void scan(const ScanTask&, void* workspace, void* stream);
int64_t scan_workspace(const ScanTask&);
}  // namespace cuda
}  // namespace gradops
