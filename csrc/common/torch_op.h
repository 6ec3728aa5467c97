// torch_op.h: everything an op's *.torch.cpp needs from torch. Stable ABI only.
//
// A *.torch.cpp is compiled once per backend, with GRADOPS_BACKEND = cpu, cuda or emu:
//   cpu   -> _C.so       defines the schema, registers the CPU kernel
//   cuda  -> _C_cuda.so  registers the CUDA kernel
//   emu   -> _C_emu.so   the CUDA kernel run on the CPU (tests), as torch.ops.gradops_emu
// Inside, `backend::f(...)` is gradops::cpu::f or gradops::cuda::f; both have one signature.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/element.h"

#define GRADOPS_BACKEND_cpu 1
#define GRADOPS_BACKEND_cuda 2
#define GRADOPS_BACKEND_emu 3
#define GRADOPS_GLUE_(a, b) a##b
#define GRADOPS_GLUE(a, b) GRADOPS_GLUE_(a, b)
#define GRADOPS_BACKEND_ID GRADOPS_GLUE(GRADOPS_BACKEND_, GRADOPS_BACKEND)

#if GRADOPS_BACKEND_ID == 1
#define GRADOPS_NAMESPACE gradops
#define GRADOPS_KEY CPU
#define GRADOPS_DEFINE(schema) \
  STABLE_TORCH_LIBRARY_FRAGMENT(gradops, m) { m.def(schema); }
#elif GRADOPS_BACKEND_ID == 2
#define GRADOPS_NAMESPACE gradops
#define GRADOPS_KEY CUDA
#define GRADOPS_DEFINE(schema)
#else
#define GRADOPS_NAMESPACE gradops_emu
#define GRADOPS_KEY CPU
#define GRADOPS_DEFINE(schema) \
  STABLE_TORCH_LIBRARY_FRAGMENT(gradops_emu, m) { m.def(schema); }
#endif

// GRADOPS_OP(f, "f(Tensor x) -> Tensor"): the op gradops::f is the C++ function f.
#define GRADOPS_OP(name, schema) \
  GRADOPS_DEFINE(schema)         \
  STABLE_TORCH_LIBRARY_IMPL(GRADOPS_NAMESPACE, GRADOPS_KEY, m) { m.impl(#name, TORCH_BOX(&name)); }

namespace gradops {

namespace cpu {}
namespace cuda {}
#if GRADOPS_BACKEND_ID == 1
namespace backend = cpu;
#else
namespace backend = cuda;
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes x's device current for a scope; stream() is torch's current stream there.
#if GRADOPS_BACKEND_ID == 2
class Scope {
 public:
  explicit Scope(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}
  void* stream() const {
    void* s = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &s));
    return s;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#else
struct Scope {
  explicit Scope(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#endif

// How x's numbers are stored; `name` says in the error which argument was wrong.
inline Element element(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Double:
      return Element::f64;
    default:
      STD_TORCH_CHECK(false, name, " must be bfloat16, float16, float32 or float64");
  }
}

// Every tensor of a call must be where the first one is: the kernels get raw pointers.
inline void same_device(const Tensor& x, const Tensor& y, const char* what) {
  STD_TORCH_CHECK(x.device() == y.device(), what, " must be on one device");
}

// x, contiguous. Where it already is, as mostly, no dispatcher is asked: that takes half a microsecond.
inline Tensor contiguous_of(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A contiguous tensor on x's device. Half the cost of new_empty.
inline Tensor empty(const Tensor& x, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> stride(shape.size());
  int64_t n = 1;
  for (size_t i = shape.size(); i-- > 0;) stride[i] = n, n *= shape[i] > 1 ? shape[i] : 1;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), stride.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device, x.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor new_like(const Tensor& x) {
  std::vector<int64_t> shape(size_t(x.dim()));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = x.size(int64_t(i));
  return empty(x, shape, x.scalar_type());
}

// Memory for the length of a call, from torch's allocator: it may be captured in a CUDA graph. Null for 0 bytes: a
// tensor costs a microsecond.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes > 0) memory_ = empty(like, {bytes}, ScalarType::Byte);
  }
  void* data() const { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

}  // namespace gradops
