// XLA FFI handler; Python registers the exported symbol through ctypes.
#include "linalg/newton_schulz.h"

#include "jax/ffi.h"

using namespace gradops::jax;

static ffi::Error newton_schulz(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, ffi::Span<const double> coefficients,
                                int64_t products) {
  gradops::NewtonSchulzSteps steps;
  if (coefficients.size() > 3 * size_t(steps.kMost)) return ffi::Error::InvalidArgument("too many steps");
  for (size_t i = 0; i + 2 < coefficients.size(); i += 3, ++steps.steps) {
    steps.a[steps.steps] = coefficients[i];
    steps.b[steps.steps] = coefficients[i + 1];
    steps.c[steps.steps] = coefficients[i + 2];
  }
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
