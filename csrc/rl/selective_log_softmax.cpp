#include "rl/selective_log_softmax.h"

#include <string>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/value_error.h"

namespace gradops {
namespace {

constexpr int64_t kWork = 16384;  // entries that are worth a thread

[[noreturn]] void refuse(const char* what, int64_t value, const std::string& expected) {
  refuse_value(what, "be " + expected, value);
}

template <class Task>
void check_keep_sets(const Task& t) {
  if (!t.keep_ids) return;
  if (t.keep_offsets[0] != 0) refuse("keep_offsets[0]", t.keep_offsets[0], "0");
  for (int64_t r = 0; r < t.rows; ++r)
    if (t.keep_offsets[r + 1] < t.keep_offsets[r] || t.keep_offsets[r + 1] > t.kept)
      refuse("keep_offsets", t.keep_offsets[r + 1], "ascending and at most the number of keep_ids");
  if (t.keep_offsets[t.rows] != t.kept)
    refuse("the last of keep_offsets", t.keep_offsets[t.rows], "the number of keep_ids");
  parallel_for(0, t.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t before = -1;
      for (int64_t i = t.keep_offsets[r]; i < t.keep_offsets[r + 1]; before = t.keep_ids[i++])
        if (t.keep_ids[i] <= before || t.keep_ids[i] >= t.cols)
          refuse("keep_ids", t.keep_ids[i], "ascending in [0, " + std::to_string(t.cols) + ") within each row");
    }
  });
}

template <class Task>
int64_t grain(const Task& t) {  // parts
  const int64_t part = t.keep_ids ? t.kept / (t.rows + 1) + 1 : t.cols < kSoftmaxChunk ? t.cols + 1 : kSoftmaxChunk;
  return part < kWork ? kWork / part : 1;
}

}  // namespace

int64_t cpu::selective_log_softmax_workspace(const LogSoftmaxTask& t) {
  return t.rows * softmax_chunks(t) * int64_t(sizeof(SoftmaxPart));
}

void cpu::selective_log_softmax(const LogSoftmaxTask& t, void* workspace, void*) {
  for (int64_t i = 0; i < t.rows * t.targets; ++i)
    if ((t.index[i] < 0 && !(t.partial && t.index[i] == -1)) || t.index[i] >= t.cols)
      refuse("index", t.index[i], "in [0, " + std::to_string(t.cols) + ")");
  check_keep_sets(t);
  SoftmaxPart* parts = static_cast<SoftmaxPart*>(workspace);
  parallel_for(0, t.rows * softmax_chunks(t), grain(t),
               [&, kernel = GRADOPS_DISPATCH(log_softmax_parts)](int64_t b, int64_t e) { kernel(t, b, e, parts); });
  parallel_for(0, t.rows, 256,
               [&, kernel = GRADOPS_DISPATCH(log_softmax_finish)](int64_t b, int64_t e) { kernel(t, b, e, parts); });
}

int64_t cpu::selective_log_softmax_backward_workspace(const LogSoftmaxGradTask&) { return 0; }

void cpu::selective_log_softmax_backward(const LogSoftmaxGradTask& t, void*, void*) {
  check_keep_sets(t);
  if (t.grad != t.logits) prefer_huge_pages(t.grad, t.rows * t.cols * element_size(t.element));
  parallel_for(0, t.rows * softmax_chunks(t), grain(t),
               [&, kernel = GRADOPS_DISPATCH(log_softmax_grad)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
