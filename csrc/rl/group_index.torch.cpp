#include "rl/group_index.h"

#include "common/torch_op.h"

namespace gradops {
#if GRADOPS_BACKEND_ID == 1
namespace {

std::tuple<Tensor, Tensor, Tensor> group_index(const Tensor& labels_in) {
  STD_TORCH_CHECK(labels_in.dim() == 1 && labels_in.scalar_type() == ScalarType::Long,
                  "group_index: labels must be 1-D and int64");
  const Tensor labels = contiguous_of(labels_in);
  const int64_t n = labels.size(0);
  Tensor ids = empty(labels, {n}, ScalarType::Long), order = empty(labels, {n}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(ids.mutable_data_ptr());
  const int64_t groups = cpu::group_ids(static_cast<const int64_t*>(labels.const_data_ptr()), n, to);
  Tensor offsets = empty(labels, {groups + 1}, ScalarType::Long);
  cpu::group_order(to, n, groups, static_cast<int64_t*>(order.mutable_data_ptr()),
                   static_cast<int64_t*>(offsets.mutable_data_ptr()));
  return {ids, order, offsets};
}

}  // namespace

GRADOPS_OP(group_index, "group_index(Tensor labels) -> (Tensor, Tensor, Tensor)")
#endif
}  // namespace gradops
