// XLA FFI handler; Python registers the exported symbol through ctypes.
#include "linalg/row_norm.h"

#include <memory>

#include "jax/ffi.h"

using namespace gradops::jax;

static ffi::Error row_norm(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, double eps, bool center) {
  const Matrices m(x);
  const gradops::RowNormTask task{x.untyped_data(), y->untyped_data(), m.element, m.batch, m.rows, m.cols, eps, center};
  const std::unique_ptr<double[]> memory(new double[size_t(gradops::cpu::row_norm_workspace(task)) / 8]);
  gradops::cpu::row_norm(task, memory.get());
  return ffi::Error::Success();
}

GRADOPS_JAX_HANDLER(
    gradops_row_norm, row_norm,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<double>("eps").Attr<bool>("center"))
