// selective_log_softmax: log-probabilities of chosen entries of each row of logits, with the row's logsumexp, entropy
// and sums of p^2 and p^3, from one read; and the gradient of the first three. Torch-free interface.
//
// The softmax is that of z = cap(x) / temperature, cap(x) = softcap * tanh(x / softcap), or x if softcap is 0; with
// keep sets, that of the kept entries of the row alone.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct LogSoftmaxInputs {  // rows x cols logits, contiguous
  const void* logits;
  Element element;
  int64_t rows, cols, targets;
  const int64_t* index;         // rows x targets
  const int64_t* keep_ids;      // null: every entry. Ascending within a row
  const int64_t* keep_offsets;  // rows + 1
  int64_t kept;                 // the number of keep_ids
  double temperature, softcap;
};

struct LogSoftmaxTask : LogSoftmaxInputs {  // a null output is not wanted
  bool partial;                             // -1 in index: an entry that somebody else holds; its logp is 0
  double *logp, *lse, *entropy, *sum_p2, *sum_p3;
};

struct LogSoftmaxGradTask : LogSoftmaxInputs {  // a null gradient is 0
  void* grad;                                   // may be logits itself
  const double *lse, *entropy, *grad_logp, *grad_lse, *grad_entropy;
};

// A part of a row: its largest z, and with d = z - max the sums of e^d, of e^d d, of e^2d and e^3d.
struct SoftmaxPart {
  double max, sum, dot, squares, cubes;
};

constexpr int64_t kSoftmaxChunk = 32768;  // entries of a row in one part; fixed, so that threads change no bits
template <class Task>
[[gnu::always_inline]] inline int64_t softmax_chunks(const Task& t) {  // parts of a row
  return t.keep_ids ? 1 : (t.cols + kSoftmaxChunk - 1) / kSoftmaxChunk;
}

// Parts [begin, end) of all the rows' parts, in row order
GRADOPS_DECLARE(void, log_softmax_parts, const LogSoftmaxTask&, int64_t begin, int64_t end, SoftmaxPart* parts)
// The outputs of rows [begin, end), from their parts
GRADOPS_DECLARE(void, log_softmax_finish, const LogSoftmaxTask&, int64_t begin, int64_t end, const SoftmaxPart* parts)
// Parts [begin, end) of the gradient
GRADOPS_DECLARE(void, log_softmax_grad, const LogSoftmaxGradTask&, int64_t begin, int64_t end)

namespace cpu {
void selective_log_softmax(const LogSoftmaxTask&, void* workspace, void* = nullptr);  // throws for a bad index
int64_t selective_log_softmax_workspace(const LogSoftmaxTask&);                       // bytes
void selective_log_softmax_backward(const LogSoftmaxGradTask&, void* workspace, void* = nullptr);
int64_t selective_log_softmax_backward_workspace(const LogSoftmaxGradTask&);
}  // namespace cpu
namespace cuda {
void selective_log_softmax(const LogSoftmaxTask&, void* workspace, void* stream);
int64_t selective_log_softmax_workspace(const LogSoftmaxTask&);
void selective_log_softmax_backward(const LogSoftmaxGradTask&, void* workspace, void* stream);
int64_t selective_log_softmax_backward_workspace(const LogSoftmaxGradTask&);
}  // namespace cuda
}  // namespace gradops
