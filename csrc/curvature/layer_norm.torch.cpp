#include "curvature/layer_norm.h"

#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

using Optional = std::optional<Tensor>;

// The arguments of one op: checks them against x, and keeps contiguous copies while the op runs.
class Arguments {
 public:
  Arguments(const char* op, LayerNormPass pass, const Tensor& x, const Optional& weight, const Optional& bias,
            bool center)
      : op_(op) {
    STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension");
    task_.pass = pass;
    task_.element = element(x, op);
    task_.weight_element = task_.element;
    task_.center = center;
    task_.x = keep(x);
    rows_ = shape_of(x);
    task_.n = rows_.back();
    if (weight || bias) {
      const Tensor& first = weight ? *weight : *bias;
      parameters_ = shape_of(first);
      task_.weight_element = element(first, op);
      type_ = first.scalar_type();
      const size_t batch = parameters_.size() - 1;
      bool good = first.dim() >= 1 && parameters_.size() <= rows_.size() && parameters_.back() == task_.n;
      for (size_t i = 0; good && i < batch; ++i) good = parameters_[i] == rows_[i];
      STD_TORCH_CHECK(good, op, ": weight and bias must be (*batch, n), x (*batch, ..., n)");
      STD_TORCH_CHECK(type_ == x.scalar_type() || (type_ == ScalarType::Float && element_size(task_.element) == 2), op,
                      ": weight and bias must have the dtype of x, or be float32 beside bfloat16 or float16");
    }
    task_.batch = 1;
    for (size_t i = 0; i + 1 < parameters_.size(); ++i) task_.batch *= parameters_[i];
    const int64_t all = numbers(rows_);
    task_.rows = all == 0 ? 0 : all / task_.n / task_.batch;
    task_.weight = parameters(weight, "weight");
    task_.bias = parameters(bias, "bias");
    stats_ = rows_;
    stats_.back() = 2;
  }

  const void* like_x(const Optional& t, const char* name) {
    if (!t) return nullptr;
    check(*t, rows_, kept_[0].scalar_type(), name);
    return keep(*t);
  }
  const void* parameters(const Optional& t, const char* name) {
    if (!t) return nullptr;
    check(*t, parameters_, type_, name);
    return keep(*t);
  }
  double* stats(const Tensor& t, const char* name) {
    check(t, stats_, ScalarType::Double, name);
    return static_cast<double*>(const_cast<void*>(keep(t)));
  }

  LayerNormTask& task() { return task_; }
  Tensor output() const { return empty(kept_[0], rows_, kept_[0].scalar_type()); }
  Tensor new_stats() const { return empty(kept_[0], stats_, ScalarType::Double); }
  // What is not wanted has no numbers.
  std::tuple<Tensor, Tensor, Tensor> gradients(int64_t wanted) {
    std::vector<int64_t> none = rows_;
    none.back() = 0;
    const auto make = [&](int bit, const std::vector<int64_t>& shape, ScalarType type) {
      STD_TORCH_CHECK(!(wanted >> bit & 1) || !shape.empty(), op_, ": of what is not given no gradient can be wanted");
      return empty(kept_[0], wanted >> bit & 1 ? shape : none, type);
    };
    std::tuple<Tensor, Tensor, Tensor> out{make(0, rows_, kept_[0].scalar_type()), make(1, parameters_, type_),
                                           make(2, parameters_, type_)};
    const auto data = [&](int bit, const Tensor& t) { return wanted >> bit & 1 ? t.mutable_data_ptr() : nullptr; };
    task_.out = data(0, std::get<0>(out));
    task_.dweight = data(1, std::get<1>(out));
    task_.dbias = data(2, std::get<2>(out));
    return out;
  }

  void run() {
    if (task_.n == 0 || task_.batch == 0) return;
    const Scope scope(kept_[0]);
    const Workspace memory(kept_[0], backend::layer_norm_workspace(task_));
    backend::layer_norm(task_, memory.data(), scope.stream());
  }

 private:
  static std::vector<int64_t> shape_of(const Tensor& t) {
    std::vector<int64_t> shape(size_t(t.dim()));
    for (size_t i = 0; i < shape.size(); ++i) shape[i] = t.size(int64_t(i));
    return shape;
  }
  static int64_t numbers(const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (int64_t size : shape) n *= size;
    return n;
  }
  const void* keep(const Tensor& t) {
    if (!kept_.empty()) same_device(kept_[0], t, op_);
    kept_.push_back(contiguous_of(t));
    return kept_.back().const_data_ptr();
  }
  void check(const Tensor& t, const std::vector<int64_t>& shape, ScalarType type, const char* name) {
    STD_TORCH_CHECK(shape_of(t) == shape && t.scalar_type() == type, op_, ": ", name, " has a wrong shape or dtype");
  }

  const char* op_;
  LayerNormTask task_{};
  ScalarType type_ = ScalarType::Float;
  std::vector<int64_t> rows_, parameters_, stats_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Optional& weight, const Optional& bias, double eps,
                                      bool center) {
  Arguments in("layer_norm", LayerNormPass::forward, x, weight, bias, center);
  in.task().eps = eps;
  Tensor y = in.output(), stats = in.new_stats();
  in.task().out = y.mutable_data_ptr();
  in.task().stats = static_cast<double*>(stats.mutable_data_ptr());
  in.run();
  return {y, stats};
}

std::tuple<Tensor, Tensor> layer_norm_jvp(const Tensor& x, const Optional& weight, const Optional& bias,
                                          const Tensor& stats, const Optional& x_dot, const Optional& weight_dot,
                                          const Optional& bias_dot, bool center) {
  Arguments in("layer_norm_jvp", LayerNormPass::jvp, x, weight, bias, center);
  LayerNormTask& task = in.task();
  task.stats = in.stats(stats, "stats");
  task.x_dot = in.like_x(x_dot, "x_dot");
  task.weight_dot = in.parameters(weight_dot, "weight_dot");
  task.bias_dot = in.parameters(bias_dot, "bias_dot");
  Tensor y_dot = in.output(), stats_dot = in.new_stats();
  task.out = y_dot.mutable_data_ptr();
  task.stats_dot = static_cast<double*>(stats_dot.mutable_data_ptr());
  in.run();
  return {y_dot, stats_dot};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& x, const Optional& weight, const Optional& bias,
                                                       const Tensor& stats, const Tensor& g, bool center,
                                                       int64_t wanted) {
  Arguments in("layer_norm_backward", LayerNormPass::backward, x, weight, bias, center);
  in.task().stats = in.stats(stats, "stats");
  in.task().g = in.like_x(g, "g");
  auto out = in.gradients(wanted);
  in.run();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_jvp(const Tensor& x, const Optional& weight,
                                                           const Optional& bias, const Tensor& stats, const Tensor& g,
                                                           const Optional& x_dot, const Optional& weight_dot,
                                                           const Tensor& stats_dot, const Optional& g_dot, bool center,
                                                           int64_t wanted) {
  Arguments in("layer_norm_backward_jvp", LayerNormPass::backward_jvp, x, weight, bias, center);
  LayerNormTask& task = in.task();
  task.stats = in.stats(stats, "stats");
  task.stats_dot = in.stats(stats_dot, "stats_dot");
  task.g = in.like_x(g, "g");
  task.g_dot = in.like_x(g_dot, "g_dot");
  task.x_dot = in.like_x(x_dot, "x_dot");
  task.weight_dot = in.parameters(weight_dot, "weight_dot");
  auto out = in.gradients(wanted);
  in.run();
  return out;
}

}  // namespace

GRADOPS_OP(layer_norm, "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool center) -> (Tensor, Tensor)")
GRADOPS_OP(layer_norm_jvp,
           "layer_norm_jvp(Tensor x, Tensor? weight, Tensor? bias, Tensor stats, Tensor? x_dot, Tensor? weight_dot, "
           "Tensor? bias_dot, bool center) -> (Tensor, Tensor)")
GRADOPS_OP(layer_norm_backward,
           "layer_norm_backward(Tensor x, Tensor? weight, Tensor? bias, Tensor stats, Tensor g, bool center, "
           "int wanted) -> (Tensor, Tensor, Tensor)")
GRADOPS_OP(layer_norm_backward_jvp,
           "layer_norm_backward_jvp(Tensor x, Tensor? weight, Tensor? bias, Tensor stats, Tensor g, Tensor? x_dot, "
           "Tensor? weight_dot, Tensor stats_dot, Tensor? g_dot, bool center, int wanted) -> (Tensor, Tensor, Tensor)")

}  // namespace gradops
