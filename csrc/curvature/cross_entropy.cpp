#include "curvature/cross_entropy.h"

#include <string>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/value_error.h"

namespace gradops {
namespace {

template <class Task, class Kernel>
void each_row(const Task& t, Kernel kernel) {
  constexpr int64_t kWork = 16384;  // entries that are worth a thread
  parallel_for(0, t.rows, kWork / (t.cols + 1) + 1, [&](int64_t b, int64_t e) { kernel(t, b, e); });
}

void check_targets(const CrossEntropyRows& t) {
  for (int64_t r = 0; r < t.rows; ++r)
    if (t.target[r] != t.ignore_index && (t.target[r] < 0 || t.target[r] >= t.cols))
      refuse_value("target",
                   "be in [0, " + std::to_string(t.cols) + ") or ignore_index, " + std::to_string(t.ignore_index),
                   t.target[r]);
}

template <class Task>
void prepare_output(const Task& t, const void* other) {
  if (t.out != t.z && t.out != other) prefer_huge_pages(t.out, t.rows * t.cols * element_size(t.element));
}

}  // namespace

void cpu::cross_entropy(const CrossEntropySums& t, void*) {
  check_targets(t);
  each_row(t, GRADOPS_DISPATCH(cross_entropy_sums));
}

void cpu::cross_entropy_backward(const CrossEntropyGrad& t, void*) {
  check_targets(t);
  prepare_output(t, t.z_dot);
  each_row(t, GRADOPS_DISPATCH(cross_entropy_grad));
}

void cpu::softmax_ce_hvp(const SoftmaxCeHvp& t, void*) {
  prepare_output(t, t.u);
  each_row(t, GRADOPS_DISPATCH(softmax_ce_hvp));
}

}  // namespace gradops
