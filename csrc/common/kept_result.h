// kept_result.h: kept_memory.h as torch tensors. For *.torch.cpp.
#pragma once
#include "common/kept_memory.h"
#include "common/torch_op.h"

#if GRADOPS_BACKEND_ID == 1
// Of torch 2.11; null in an older one
extern "C" [[gnu::weak, gnu::visibility("default")]] AOTITorchError torch_from_blob(
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t type,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*free)(void* data, void* context), void* context);
#endif

namespace gradops {

// new_like for results that are often large and soon freed, such as gradients: on the CPU a large one takes memory kept
// from another, and cannot be made larger in place.
inline Tensor new_result_like(const Tensor& x) {
#if GRADOPS_BACKEND_ID == 1
  constexpr int64_t kLarge = 8 << 20;
  const int64_t bytes = x.numel() * int64_t(x.element_size());
  int64_t size = 0;
  void* const memory = torch_from_blob && bytes >= kLarge ? take_kept_memory(bytes, size) : nullptr;
  if (memory) {
    const size_t dim = size_t(x.dim());
    std::vector<int64_t> shape(dim), stride(dim);
    for (size_t i = dim, n = 1; i-- > 0; n *= size_t(shape[i])) shape[i] = x.size(int64_t(i)), stride[i] = int64_t(n);
    const auto free = [](void* data, void* n) { give_kept_memory(data, int64_t(reinterpret_cast<intptr_t>(n))); };
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        torch_from_blob(memory, int64_t(dim), shape.data(), stride.data(), 0,
                        torch::stable::detail::to<int32_t>(torch::stable::detail::from(x.scalar_type())),
                        aoti_torch_device_type_cpu(), x.get_device_index(), &handle, aoti_torch_layout_strided(),
                        nullptr, 0, free, reinterpret_cast<void*>(intptr_t(size))));
    return Tensor(handle);
  }
#endif
  return new_like(x);
}

}  // namespace gradops
