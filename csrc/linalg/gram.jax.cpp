// XLA FFI handler; Python registers the exported symbol through ctypes. Sums are always in double; a float result,
// where JAX has no float64, is rounded from them.
#include "linalg/gram.h"

#include <memory>

#include "jax/ffi.h"

using namespace gradops::jax;

static ffi::Error gram(ffi::AnyBuffer j, ffi::Result<ffi::AnyBuffer> g) {
  const Matrices m(j);
  const bool rounded = g->element_type() == ffi::DataType::F32;
  const int64_t size = m.batch * m.rows * m.rows;
  const std::unique_ptr<double[]> sums(rounded ? new double[size_t(size)] : nullptr);
  void* to = rounded ? sums.get() : g->untyped_data();
  const gradops::GramBlock block{j.untyped_data(), m.element, m.cols};
  const gradops::GramTask task{&block, 1, to, m.batch, m.rows, true};
  const std::unique_ptr<char[]> memory(new char[size_t(gradops::cpu::gram_workspace(task))]);
  gradops::cpu::gram(task, memory.get());
  if (rounded)
    for (int64_t i = 0; i < size; ++i) static_cast<float*>(g->untyped_data())[i] = float(sums[size_t(i)]);
  return ffi::Error::Success();
}

GRADOPS_JAX_HANDLER(gradops_gram, gram, ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>())
