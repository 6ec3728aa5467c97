#include "rl/scan.h"

#include <limits>
#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

using Optional = std::optional<Tensor>;

// The arguments of one op: checks them against the first, and keeps contiguous copies while the op runs.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& rewards, const Optional& cu_seqlens) : op_(op) {
    STD_TORCH_CHECK(rewards.dim() >= 1, op, ": the first tensor must have at least 1 dimension");
    STD_TORCH_CHECK(!cu_seqlens || rewards.dim() == 1, op, ": with cu_seqlens the first tensor must have 1 dimension");
    task_.rewards = keep(rewards).const_data_ptr();
    task_.element = element(rewards, op);
    task_.tokens = rewards.numel();
    for (int64_t i = 0; i < rewards.dim(); ++i) shape_.push_back(rewards.size(i));
    rows_ = shape_;
    rows_.pop_back();
    task_.length = shape_.back();
    task_.rows = 1;
    for (int64_t n : rows_) task_.rows *= n;
    if (!cu_seqlens) return;
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 && cu_seqlens->scalar_type() == ScalarType::Long,
                    op, ": cu_seqlens must be int64 (rows + 1)");
    task_.rows = cu_seqlens->numel() - 1;
    rows_ = {task_.rows};
    task_.offsets = static_cast<const int64_t*>(keep(*cu_seqlens).const_data_ptr());
  }

  const void* numbers(const Optional& x, const char* name, bool per_row = false) {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->scalar_type() == first().scalar_type(), op_, ": ", name, " must have the first tensor's dtype");
    return checked(*x, name, per_row);
  }
  const uint8_t* flags(const Optional& x, const char* name) {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Bool, op_, ": ", name, " must be bool");
    return static_cast<const uint8_t*>(checked(*x, name, false));
  }

  ScanTask& task() { return task_; }
  const Tensor& first() const { return kept_[0]; }
  Tensor token_output() const { return empty(first(), shape_, out_type()); }
  Tensor row_output() const { return empty(first(), rows_, out_type()); }

  void run() {
    const Scope scope(first());
    const Workspace memory(first(), backend::scan_workspace(task_));
    backend::scan(task_, memory.data(), scope.stream());
  }

 private:
  const Tensor& keep(const Tensor& x) {
    if (!kept_.empty()) same_device(first(), x, op_);
    kept_.push_back(contiguous_of(x));
    return kept_.back();
  }
  const void* checked(const Tensor& x, const char* name, bool per_row) {
    const std::vector<int64_t>& shape = per_row ? rows_ : shape_;
    bool same = x.dim() == int64_t(shape.size());
    for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == shape[size_t(i)];
    STD_TORCH_CHECK(same, op_, ": ", name, per_row ? " must have one number per row" : " must have the first shape");
    return keep(x).const_data_ptr();
  }
  ScalarType out_type() const { return task_.element == Element::f64 ? ScalarType::Double : ScalarType::Float; }

  const char* op_;
  ScanTask task_{};
  std::vector<int64_t> shape_, rows_;
  std::vector<Tensor> kept_;
};

void take(Arguments& in, const Optional& values, const Optional& next_values, const Optional& last_values,
          const Optional& terminated, const Optional& truncated, const Optional& mask, double gamma, double lam) {
  ScanTask& task = in.task();
  task.values = in.numbers(values, "values");
  task.next_values = in.numbers(next_values, "next_values");
  task.last_values = in.numbers(last_values, "last_values", true);
  task.terminated = in.flags(terminated, "terminated");
  task.truncated = in.flags(truncated, "truncated");
  task.mask = in.flags(mask, "mask");
  task.gamma = gamma;
  task.lam = lam;
  task.rho_clip = task.c_clip = std::numeric_limits<double>::infinity();
}

std::tuple<Tensor, Tensor> advantage_scan(const Tensor& rewards, const Tensor& values, const Optional& next_values,
                                          const Optional& last_values, const Optional& ratios,
                                          const Optional& terminated, const Optional& truncated, const Optional& mask,
                                          const Optional& cu_seqlens, double gamma, double lam, double rho_clip,
                                          double c_clip) {
  Arguments in("advantage_scan", rewards, cu_seqlens);
  take(in, values, next_values, last_values, terminated, truncated, mask, gamma, lam);
  ScanTask& task = in.task();
  task.kind = ScanKind::advantages;
  task.ratios = in.numbers(ratios, "ratios");
  task.rho_clip = rho_clip;
  task.c_clip = c_clip;
  Tensor advantages = in.token_output(), returns = in.token_output();
  task.first = advantages.mutable_data_ptr();
  task.second = returns.mutable_data_ptr();
  in.run();
  return {advantages, returns};
}

Tensor return_scan(const Tensor& rewards, const Optional& values, const Optional& next_values,
                   const Optional& last_values, const Optional& terminated, const Optional& truncated,
                   const Optional& mask, const Optional& cu_seqlens, double gamma, double lam) {
  Arguments in("return_scan", rewards, cu_seqlens);
  take(in, values, next_values, last_values, terminated, truncated, mask, gamma, lam);
  in.task().kind = ScanKind::returns;
  Tensor returns = in.token_output();
  in.task().first = returns.mutable_data_ptr();
  in.run();
  return returns;
}

std::tuple<Tensor, Tensor> carry_scan(const Tensor& x, const Tensor& a, const Optional& cu_seqlens) {
  Arguments in("carry_scan", x, cu_seqlens);
  in.task().kind = ScanKind::carry;
  in.task().ratios = in.numbers(a, "a");
  Tensor before = in.token_output(), last = in.row_output();
  in.task().first = before.mutable_data_ptr();
  in.task().second = last.mutable_data_ptr();
  in.run();
  return {before, last};
}

}  // namespace

GRADOPS_OP(advantage_scan,
           "advantage_scan(Tensor rewards, Tensor values, Tensor? next_values, Tensor? last_values, Tensor? ratios, "
           "Tensor? terminated, Tensor? truncated, Tensor? mask, Tensor? cu_seqlens, float gamma, float lam, "
           "float rho_clip, float c_clip) -> (Tensor, Tensor)")
GRADOPS_OP(return_scan,
           "return_scan(Tensor rewards, Tensor? values, Tensor? next_values, Tensor? last_values, Tensor? terminated, "
           "Tensor? truncated, Tensor? mask, Tensor? cu_seqlens, float gamma, float lam) -> Tensor")
GRADOPS_OP(carry_scan, "carry_scan(Tensor x, Tensor a, Tensor? cu_seqlens) -> (Tensor, Tensor)")

}  // namespace gradops
