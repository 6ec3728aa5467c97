#include "curvature/swiglu.h"

#include "common/kept_result.h"

namespace gradops {
namespace {

using Maybe = std::optional<Tensor>;

// The distance of x's rows, if they are contiguous and equally far apart; else -1
int64_t row_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (last < 0 || (x.size(last) > 1 && x.stride(last) != 1)) return -1;
  int64_t stride = -1, next = 0;  // next: that of a dimension further out
  for (int64_t i = last - 1; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (stride < 0) stride = x.stride(i), next = stride;
    if (x.stride(i) != next) return -1;
    next *= x.size(i);
  }
  return stride < 0 ? x.size(last) : stride;
}

class Call {
 public:
  Call(const Tensor& gate, const Maybe& up, bool backward) : gate_(gate), task{} {
    task.element = element(gate, "swiglu: gate");
    task.backward = backward;
    add(task.gate, gate, "gate");
    add(task.up, up, "up");
  }
  void add(SwigluRows& rows, const Maybe& x, const char* name) {
    if (!x) return;
    STD_TORCH_CHECK(x->scalar_type() == gate_.scalar_type(), "swiglu: ", name, " must have the dtype of gate");
    bool same = x->dim() == gate_.dim();
    for (int64_t i = 0; same && i < gate_.dim(); ++i) same = x->size(i) == gate_.size(i);
    STD_TORCH_CHECK(same, "swiglu: ", name, " must have the shape of gate");
    same_device(gate_, *x, "swiglu: all tensors");
    given_.push_back({&rows, *x});
  }
  void add_changes(const Maybe& gate_dot, const Maybe& up_dot) {
    add(task.gate_dot, gate_dot, "gate_dot");
    add(task.up_dot, up_dot, "up_dot");
  }
  Tensor output(void*& to, bool wanted = true) {
    Tensor y = wanted ? new_result_like(gate_) : empty(gate_, {0}, gate_.scalar_type());
    to = wanted ? y.mutable_data_ptr() : nullptr;
    return y;
  }
  void run() {
    const int64_t n = gate_.numel();
    if (n == 0) return;
    bool flat = true;
    for (const auto& [rows, x] : given_) flat = flat && x.is_contiguous();
    task.cols = flat ? n : gate_.dim() ? gate_.size(-1) : 1;
    task.rows = n / task.cols;
    for (auto& [rows, x] : given_) {
      int64_t stride = flat ? n : row_stride(x);
      if (stride < 0) x = contiguous_of(x), stride = task.cols;
      *rows = {x.const_data_ptr(), stride};
    }
    const Scope scope(gate_);
    backend::swiglu(task, scope.stream());
  }

 private:
  const Tensor& gate_;
  std::vector<std::pair<SwigluRows*, Tensor>> given_;

 public:
  SwigluTask task;
};

Tensor swiglu(const Tensor& gate, const Maybe& up) {
  Call call(gate, up, false);
  Tensor y = call.output(call.task.value[0]);
  call.run();
  return y;
}

Tensor swiglu_jvp(const Tensor& gate, const Maybe& up, const Maybe& gate_dot, const Maybe& up_dot) {
  Call call(gate, up, false);
  call.add_changes(gate_dot, up_dot);
  Tensor y_dot = call.output(call.task.change[0]);
  call.run();
  return y_dot;
}

std::tuple<Tensor, Tensor> swiglu_dual(const Tensor& gate, const Maybe& up, const Maybe& gate_dot,
                                       const Maybe& up_dot) {
  Call call(gate, up, false);
  call.add_changes(gate_dot, up_dot);
  Tensor y = call.output(call.task.value[0]), y_dot = call.output(call.task.change[0]);
  call.run();
  return {y, y_dot};
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& gate, const Maybe& up, const Tensor& g, int64_t wanted) {
  Call call(gate, up, true);
  call.add(call.task.g, g, "g");
  Tensor d_gate = call.output(call.task.value[0], wanted & 1), d_up = call.output(call.task.value[1], wanted & 2);
  call.run();
  return {d_gate, d_up};
}

std::tuple<Tensor, Tensor> swiglu_backward_jvp(const Tensor& gate, const Maybe& up, const Tensor& g,
                                               const Maybe& gate_dot, const Maybe& up_dot, const Maybe& g_dot,
                                               int64_t wanted) {
  Call call(gate, up, true);
  call.add(call.task.g, g, "g");
  call.add_changes(gate_dot, up_dot);
  call.add(call.task.g_dot, g_dot, "g_dot");
  Tensor d_gate = call.output(call.task.change[0], wanted & 1), d_up = call.output(call.task.change[1], wanted & 2);
  call.run();
  return {d_gate, d_up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward_dual(const Tensor& gate, const Maybe& up, const Tensor& g,
                                                                const Maybe& gate_dot, const Maybe& up_dot,
                                                                const Maybe& g_dot, int64_t wanted) {
  Call call(gate, up, true);
  call.add(call.task.g, g, "g");
  call.add_changes(gate_dot, up_dot);
  call.add(call.task.g_dot, g_dot, "g_dot");
  Tensor d_gate = call.output(call.task.value[0], wanted & 1), d_up = call.output(call.task.value[1], wanted & 2),
         d_gate_dot = call.output(call.task.change[0], wanted & 1),
         d_up_dot = call.output(call.task.change[1], wanted & 2);
  call.run();
  return {d_gate, d_up, d_gate_dot, d_up_dot};
}

}  // namespace

GRADOPS_OP(swiglu, "swiglu(Tensor gate, Tensor? up) -> Tensor")
GRADOPS_OP(swiglu_jvp, "swiglu_jvp(Tensor gate, Tensor? up, Tensor? gate_dot, Tensor? up_dot) -> Tensor")
GRADOPS_OP(swiglu_dual, "swiglu_dual(Tensor gate, Tensor? up, Tensor? gate_dot, Tensor? up_dot) -> (Tensor, Tensor)")
// What is not wanted (bit 0: in gate, bit 1: in up) has no numbers.
GRADOPS_OP(swiglu_backward, "swiglu_backward(Tensor gate, Tensor? up, Tensor g, int wanted) -> (Tensor, Tensor)")
GRADOPS_OP(swiglu_backward_jvp,
           "swiglu_backward_jvp(Tensor gate, Tensor? up, Tensor g, Tensor? gate_dot, Tensor? up_dot, Tensor? g_dot, "
           "int wanted) -> (Tensor, Tensor)")
GRADOPS_OP(swiglu_backward_dual,
           "swiglu_backward_dual(Tensor gate, Tensor? up, Tensor g, Tensor? gate_dot, Tensor? up_dot, Tensor? g_dot, "
           "int wanted) -> (Tensor, Tensor, Tensor, Tensor)")

}  // namespace gradops
