// XLA FFI handler; Python registers the exported symbol through ctypes.
#include "linalg/newton_schulz.h"

#include "jax/ffi.h"

using namespace gradops::jax;

static ffi::Error newton_schulz(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, ffi::Span<const double> coefficients,
                                int64_t products) {
  const auto steps = gradops::newton_schulz_steps(coefficients.begin(), int64_t(coefficients.size()));
  const Matrices m(x);
  gradops::cpu::newton_schulz(x.untyped_data(), y->untyped_data(), m.element, m.batch, m.rows, m.cols, steps, true,
                              gradops::NewtonSchulzProducts(products));
  return ffi::Error::Success();
}

GRADOPS_JAX_HANDLER(gradops_newton_schulz, newton_schulz,
                    ffi::Ffi::Bind()
                        .Arg<ffi::AnyBuffer>()
                        .Ret<ffi::AnyBuffer>()
                        .Attr<ffi::Span<const double>>("coefficients")
                        .Attr<int64_t>("products"))
