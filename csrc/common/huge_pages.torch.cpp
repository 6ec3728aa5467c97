// huge_pages.h for memory that torch allocated. What x holds stays as it is.
#include "common/huge_pages.h"

#include "common/torch_op.h"

#if GRADOPS_BACKEND_ID == 1
namespace gradops {
namespace {

void prefer(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "prefer_huge_pages: x must be contiguous");
  prefer_huge_pages(x.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gradops, m) { m.def("prefer_huge_pages(Tensor x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(gradops, CPU, m) { m.impl("prefer_huge_pages", TORCH_BOX(&prefer)); }

}  // namespace gradops
#endif
