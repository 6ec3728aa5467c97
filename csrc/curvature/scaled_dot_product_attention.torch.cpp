#include "curvature/scaled_dot_product_attention.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

using Maybe = std::optional<Tensor>;

// The step of the batch dimensions, all but the last three, taken as one. False: they are none.
bool batch_step(const Tensor& x, int64_t& step) {
  step = 0;
  int64_t next = -1;
  for (int64_t i = x.dim() - 4; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (next < 0)
      step = x.stride(i);
    else if (x.stride(i) != next)
      return false;
    next = x.stride(i) * x.size(i);
  }
  return true;
}

// The arguments of one call, and the copies that are made of those that cannot be read in place.
class Call {
 public:
  AttentionTask task{};
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, double scale, bool causal)
      : q_(q), k_(k), v_(v), scope_(q) {
    STD_TORCH_CHECK(q.dim() >= 3 && k.dim() == q.dim() && v.dim() == q.dim(),
                    "scaled_dot_product_attention: q, k and v must be (*B, heads, rows, columns)");
    AttentionTask& t = task;
    t.batch = 1;
    for (int64_t i = 0; i < q.dim() - 3; ++i) t.batch *= q.size(i);
    t.heads = q.size(-3), t.key_heads = k.size(-3);
    t.queries = q.size(-2), t.keys = k.size(-2), t.d = q.size(-1), t.dv = v.size(-1);
    t.scale = scale, t.causal = causal, t.element = element(q, "scaled_dot_product_attention: q");
    STD_TORCH_CHECK(k.size(-1) == t.d && v.size(-3) == t.key_heads && v.size(-2) == t.keys &&
                        (t.key_heads ? t.heads % t.key_heads == 0 : t.heads == 0),
                    "scaled_dot_product_attention: the shapes of q, k and v do not fit");
    t.q = rows(q, q, "q"), t.k = rows(k, k, "k"), t.v = rows(v, v, "v");
    if (mask) take_mask(*mask);
  }

  Tensor like_o() const { return empty(q_, shape(q_, {task.heads, task.queries, task.dv}), q_.scalar_type()); }
  Tensor per_row() const { return empty(q_, shape(q_, {task.heads, task.queries}), statistic()); }
  void changes(const Maybe& q_dot, const Maybe& k_dot, const Maybe& v_dot) {
    task.q_dot = rows(q_dot, q_, "q_dot"), task.k_dot = rows(k_dot, k_, "k_dot"), task.v_dot = rows(v_dot, v_, "v_dot");
  }
  void cotangent(const Tensor& g, const Maybe& g_dot, const Tensor& o) {
    task.g = rows(g, o, "g"), task.g_dot = rows(g_dot, o, "g_dot");
  }
  // What an earlier pass wrote: contiguous.
  void* earlier(const Tensor& x, const std::vector<int64_t>& tail, ScalarType type, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == type && sizes(x) == shape(q_, tail), "scaled_dot_product_attention: ", name,
                    " must be what the forward pass gave");
    same_device(q_, x, "scaled_dot_product_attention: all tensors");
    return keep(contiguous_of(x)).data_ptr();
  }
  void saved(const Tensor& o, const Tensor& lse) {
    task.o = earlier(o, {task.heads, task.queries, task.dv}, q_.scalar_type(), "o");
    task.lse = earlier(lse, {task.heads, task.queries}, statistic(), "lse");
  }
  void saved_changes(const Tensor& o_dot, const Tensor& mu) {
    task.o_dot = earlier(o_dot, {task.heads, task.queries, task.dv}, q_.scalar_type(), "o_dot");
    task.mu = earlier(mu, {task.heads, task.queries}, statistic(), "mu");
  }
  // The gradients of q, k and v: those that are not wanted have no columns.
  std::tuple<Tensor, Tensor, Tensor> gradients(int64_t wanted, void*& dq, void*& dk, void*& dv) const {
    const auto make = [&](const Tensor& x, int bit, void*& data) {
      std::vector<int64_t> size = sizes(x);
      const bool write = wanted >> bit & 1;
      if (!write) size.back() = 0;
      const Tensor y = empty(x, size, x.scalar_type());
      data = write ? y.mutable_data_ptr() : nullptr;
      return y;
    };
    return {make(q_, 0, dq), make(k_, 1, dk), make(v_, 2, dv)};
  }
  using Pass = void (*)(const AttentionTask&, void*, void*);
  void run(Pass pass) const {
    if (task.batch * task.heads == 0) return;
    const Workspace memory(q_, backend::attention_workspace(task));
    pass(task, memory.data(), scope_.stream());
  }

 private:
  const Tensor &q_, &k_, &v_;
  const Scope scope_;
  std::vector<Tensor> kept_;

  static std::vector<int64_t> sizes(const Tensor& x) {
    std::vector<int64_t> size(size_t(x.dim()));
    for (size_t i = 0; i < size.size(); ++i) size[i] = x.size(int64_t(i));
    return size;
  }
  static std::vector<int64_t> shape(const Tensor& q, const std::vector<int64_t>& tail) {
    std::vector<int64_t> size = sizes(q);
    size.resize(size.size() - 3);
    size.insert(size.end(), tail.begin(), tail.end());
    return size;
  }
  ScalarType statistic() const { return task.element == Element::f64 ? ScalarType::Double : ScalarType::Float; }
  const Tensor& keep(Tensor x) {
    kept_.push_back(std::move(x));
    return kept_.back();
  }
  HeadRows rows(const Maybe& x, const Tensor& like, const char* name) {
    if (!x) return {};
    STD_TORCH_CHECK(x->scalar_type() == q_.scalar_type(), "scaled_dot_product_attention: ", name,
                    " must have the dtype of q");
    STD_TORCH_CHECK(sizes(*x).size() == sizes(q_).size(), "scaled_dot_product_attention: ", name,
                    " must have as many dimensions as q");
    for (int64_t i = 0; i < x->dim(); ++i)
      STD_TORCH_CHECK(x->size(i) == (i < x->dim() - 3 ? q_.size(i) : like.size(i)),
                      "scaled_dot_product_attention: ", name, " has the wrong shape");
    same_device(q_, *x, "scaled_dot_product_attention: all tensors");
    int64_t b;
    const bool readable = (x->stride(-1) == 1 || x->size(-1) <= 1) && batch_step(*x, b);
    const Tensor& y = readable ? keep(*x) : keep(contiguous_of(*x));
    batch_step(y, b);
    return {y.const_data_ptr(), b, y.stride(-3), y.stride(-2)};
  }
  void take_mask(const Tensor& x) {
    AttentionMask& m = task.mask;
    STD_TORCH_CHECK(sizes(x) == shape(q_, {task.heads, task.queries, task.keys}),
                    "scaled_dot_product_attention: mask must be (*B, heads, queries, keys)");
    m.boolean = x.scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(m.boolean || x.scalar_type() == q_.scalar_type(),
                    "scaled_dot_product_attention: mask must be bool or have the dtype of q");
    same_device(q_, x, "scaled_dot_product_attention: all tensors");
    Tensor y = x;
    if (!batch_step(y, m.b)) {  // a copy, but not of what is repeated
      for (int64_t i = -3; i < 0; ++i)
        if (x.stride(i) == 0 && x.size(i) > 1) y = torch::stable::narrow(y, x.dim() + i, 0, 1);
      y = contiguous_of(y);
      batch_step(y, m.b);
    }
    const auto step = [&](int64_t i) { return y.size(i) == 1 ? 0 : y.stride(i); };
    m.h = step(-3), m.q = step(-2), m.k = step(-1);
    m.data = keep(y).const_data_ptr();
  }
};

std::tuple<Tensor, Tensor> scaled_dot_product_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                        const Maybe& mask, double scale, bool causal) {
  Call call(q, k, v, mask, scale, causal);
  Tensor o = call.like_o(), lse = call.per_row();
  call.task.o = o.mutable_data_ptr(), call.task.lse = lse.mutable_data_ptr();
  call.run(backend::attention_forward);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scaled_dot_product_attention_dual(const Tensor& q, const Tensor& k,
                                                                             const Tensor& v, const Maybe& mask,
                                                                             double scale, bool causal,
                                                                             const Maybe& q_dot, const Maybe& k_dot,
                                                                             const Maybe& v_dot) {
  Call call(q, k, v, mask, scale, causal);
  call.changes(q_dot, k_dot, v_dot);
  Tensor o = call.like_o(), lse = call.per_row(), o_dot = call.like_o(), mu = call.per_row();
  call.task.o = o.mutable_data_ptr(), call.task.lse = lse.mutable_data_ptr();
  call.task.o_dot = o_dot.mutable_data_ptr(), call.task.mu = mu.mutable_data_ptr();
  call.run(backend::attention_forward);
  return {o, lse, o_dot, mu};
}

std::tuple<Tensor, Tensor> scaled_dot_product_attention_jvp(const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const Maybe& mask, double scale, bool causal,
                                                            const Tensor& o, const Tensor& lse, const Maybe& q_dot,
                                                            const Maybe& k_dot, const Maybe& v_dot) {
  Call call(q, k, v, mask, scale, causal);
  call.saved(o, lse);
  call.changes(q_dot, k_dot, v_dot);
  Tensor o_dot = call.like_o(), mu = call.per_row();
  call.task.o_dot = o_dot.mutable_data_ptr(), call.task.mu = mu.mutable_data_ptr();
  call.run(backend::attention_jvp);
  return {o_dot, mu};
}

std::tuple<Tensor, Tensor, Tensor> scaled_dot_product_attention_backward(const Tensor& q, const Tensor& k,
                                                                         const Tensor& v, const Maybe& mask,
                                                                         double scale, bool causal, const Tensor& o,
                                                                         const Tensor& lse, const Tensor& g,
                                                                         int64_t wanted) {
  Call call(q, k, v, mask, scale, causal);
  call.saved(o, lse);
  call.cotangent(g, {}, o);
  AttentionTask& t = call.task;
  const auto gradients = call.gradients(wanted, t.dq, t.dk, t.dv_);
  call.run(backend::attention_backward);
  return gradients;
}

void backward_with_changes(Call& call, const Tensor& o, const Tensor& lse, const Tensor& g, const Maybe& q_dot,
                           const Maybe& k_dot, const Maybe& v_dot, const Tensor& o_dot, const Tensor& mu,
                           const Maybe& g_dot) {
  call.saved(o, lse);
  call.saved_changes(o_dot, mu);
  call.changes(q_dot, k_dot, v_dot);
  call.cotangent(g, g_dot, o);
}

std::tuple<Tensor, Tensor, Tensor> scaled_dot_product_attention_backward_jvp(
    const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, double scale, bool causal, const Tensor& o,
    const Tensor& lse, const Tensor& g, const Maybe& q_dot, const Maybe& k_dot, const Maybe& v_dot, const Tensor& o_dot,
    const Tensor& mu, const Maybe& g_dot, int64_t wanted) {
  Call call(q, k, v, mask, scale, causal);
  backward_with_changes(call, o, lse, g, q_dot, k_dot, v_dot, o_dot, mu, g_dot);
  AttentionTask& t = call.task;
  const auto changes = call.gradients(wanted, t.dq_dot, t.dk_dot, t.dv_dot);
  call.run(backend::attention_backward);
  return changes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scaled_dot_product_attention_backward_dual(
    const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, double scale, bool causal, const Tensor& o,
    const Tensor& lse, const Tensor& g, const Maybe& q_dot, const Maybe& k_dot, const Maybe& v_dot, const Tensor& o_dot,
    const Tensor& mu, const Maybe& g_dot, int64_t wanted) {
  Call call(q, k, v, mask, scale, causal);
  backward_with_changes(call, o, lse, g, q_dot, k_dot, v_dot, o_dot, mu, g_dot);
  AttentionTask& t = call.task;
  const auto gradients = call.gradients(wanted, t.dq, t.dk, t.dv_);
  const auto changes = call.gradients(wanted, t.dq_dot, t.dk_dot, t.dv_dot);
  call.run(backend::attention_backward);
  return std::tuple_cat(gradients, changes);
}

}  // namespace

#define GRADOPS_ATTENTION "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal"
#define GRADOPS_CHANGES "Tensor? q_dot, Tensor? k_dot, Tensor? v_dot"
#define GRADOPS_SECOND                                                   \
  GRADOPS_ATTENTION ", Tensor o, Tensor lse, Tensor g, " GRADOPS_CHANGES \
                    ", Tensor o_dot, Tensor mu, Tensor? g_dot, int wanted)"
GRADOPS_OP(scaled_dot_product_attention, "scaled_dot_product_attention" GRADOPS_ATTENTION ") -> (Tensor o, Tensor lse)")
GRADOPS_OP(scaled_dot_product_attention_dual, "scaled_dot_product_attention_dual" GRADOPS_ATTENTION ", " GRADOPS_CHANGES
                                              ") -> (Tensor o, Tensor lse, Tensor o_dot, Tensor mu)")
GRADOPS_OP(scaled_dot_product_attention_jvp,
           "scaled_dot_product_attention_jvp" GRADOPS_ATTENTION ", Tensor o, Tensor lse, " GRADOPS_CHANGES
           ") -> (Tensor o_dot, Tensor mu)")
GRADOPS_OP(scaled_dot_product_attention_backward,
           "scaled_dot_product_attention_backward" GRADOPS_ATTENTION
           ", Tensor o, Tensor lse, Tensor g, int wanted) -> (Tensor dq, Tensor dk, Tensor dv)")
GRADOPS_OP(scaled_dot_product_attention_backward_jvp, "scaled_dot_product_attention_backward_jvp" GRADOPS_SECOND
                                                      " -> (Tensor dq_dot, Tensor dk_dot, Tensor dv_dot)")
GRADOPS_OP(scaled_dot_product_attention_backward_dual,
           "scaled_dot_product_attention_backward_dual" GRADOPS_SECOND
           " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_dot, Tensor dk_dot, Tensor dv_dot)")

}  // namespace gradops
