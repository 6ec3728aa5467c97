// ffi.h: what every *.jax.cpp needs from XLA's foreign function interface.
#pragma once
#include <stdexcept>

#include "common/element.h"
#include "xla/ffi/api/ffi.h"

// XLA's macro must define a visible symbol although this library hides its own.
#define GRADOPS_JAX_HANDLER(symbol, function, ...)                                                      \
  _Pragma("GCC visibility push(default)") XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function, __VA_ARGS__); \
  _Pragma("GCC visibility pop")

namespace gradops::jax {
namespace ffi = xla::ffi;

// A buffer as a batch of matrices. Python has checked dtype and rank.
struct Matrices {
  Element element;
  int64_t batch = 1, rows, cols;
  explicit Matrices(const ffi::AnyBuffer& x) {
    switch (x.element_type()) {
      case ffi::DataType::BF16:
        element = Element::bf16;
        break;
      case ffi::DataType::F16:
        element = Element::f16;
        break;
      case ffi::DataType::F32:
        element = Element::f32;
        break;
      case ffi::DataType::F64:
        element = Element::f64;
        break;
      default:
        throw std::invalid_argument("unsupported dtype");
    }
    const auto d = x.dimensions();
    rows = d[d.size() - 2], cols = d[d.size() - 1];
    for (size_t i = 0; i + 2 < d.size(); ++i) batch *= d[i];
  }
};
}  // namespace gradops::jax
