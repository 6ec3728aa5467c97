// NumPy face of the same core (nanobind): raw functions over arrays that gradops/numpy.py has checked
// and allocated. Needs no torch.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>

#include "common/isa.h"
#include "common/thread_pool.h"
#include "linalg/gram.h"
#include "linalg/jt_apply.h"
#include "linalg/newton_schulz.h"
#include "linalg/nuclear_scale.h"
#include "linalg/row_norm.h"

namespace nb = nanobind;

namespace {

using In = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::c_contig, nb::device::cpu>;

gradops::Element element(const In& x) {
  if (x.dtype() == nb::dtype<float>()) return gradops::Element::f32;
  if (x.dtype() == nb::dtype<double>()) return gradops::Element::f64;
  if (x.dtype().code == uint8_t(nb::dlpack::dtype_code::Float) && x.dtype().bits == 16) return gradops::Element::f16;
  throw std::invalid_argument("unsupported dtype");
}
int64_t rows(const In& x) { return int64_t(x.shape(x.ndim() - 2)); }
int64_t cols(const In& x) { return int64_t(x.shape(x.ndim() - 1)); }
int64_t batch(const In& x) { return x.size() == 0 ? 0 : int64_t(x.size()) / (rows(x) * cols(x)); }

void newton_schulz(In x, Out y, const std::vector<double>& coefficients) {
  const auto steps = gradops::newton_schulz_steps(coefficients.data(), int64_t(coefficients.size()));
  const nb::gil_scoped_release unlock;
  gradops::cpu::newton_schulz(x.data(), y.data(), element(x), batch(x), rows(x), cols(x), steps, true,
                              gradops::NewtonSchulzProducts::full);
}

void row_norm(In x, Out y, double eps, bool center) {
  const gradops::RowNormTask task{x.data(), y.data(), element(x), batch(x), rows(x), cols(x), eps, center};
  const nb::gil_scoped_release unlock;
  const std::unique_ptr<double[]> memory(new double[size_t(gradops::cpu::row_norm_workspace(task)) / 8]);
  gradops::cpu::row_norm(task, memory.get());
}

void nuclear_scale(In m, In u, Out out) {
  const gradops::NuclearScaleTask task{m.data(),   u.data(), static_cast<double*>(out.data()),
                                       element(m), batch(m), rows(m) * cols(m)};
  const nb::gil_scoped_release unlock;
  const std::unique_ptr<double[]> memory(new double[size_t(gradops::cpu::nuclear_scale_workspace(task)) / 8]);
  gradops::cpu::nuclear_scale(task, memory.get());
}

void gram(In j, Out g, bool wide) {
  const gradops::GramBlock block{j.data(), element(j), cols(j)};
  const gradops::GramTask task{&block, 1, g.data(), batch(j), rows(j), wide};
  const nb::gil_scoped_release unlock;
  const std::unique_ptr<char[]> memory(new char[size_t(gradops::cpu::gram_workspace(task))]);
  gradops::cpu::gram(task, memory.get());
}

void jt_apply(In j, In w, Out y) {
  const gradops::JtApplyTask task{
      j.data(), static_cast<const double*>(w.data()), y.data(), element(j), batch(j), rows(j), cols(j)};
  const nb::gil_scoped_release unlock;
  gradops::cpu::jt_apply(task);
}

}  // namespace

NB_MODULE(_numpy, m) {
  gradops::set_parallel_backend({gradops::thread_pool, gradops::thread_count});
  m.def("isa", [] { return gradops::isa_name(gradops::best_isa()); });
  m.def("set_num_threads", [](int n) { gradops::host_threads() = n; });
  m.def("newton_schulz", newton_schulz);
  m.def("row_norm", row_norm);
  m.def("nuclear_scale", nuclear_scale);
  m.def("gram", gram);
  m.def("jt_apply", jt_apply);
}
