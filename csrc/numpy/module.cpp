// NumPy face of the same core (nanobind). Needs no torch.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>

#include "common/isa.h"
#include "common/thread_pool.h"
#include "linalg/row_normalize.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using In2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <int D>
using Out = nb::ndarray<nb::numpy, float, nb::ndim<D>>;

template <int D>
Out<D> make(std::initializer_list<size_t> shape) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  auto* p = new float[n];
  nb::capsule owner(p, [](void* q) noexcept { delete[] static_cast<float*>(q); });
  return Out<D>(p, shape, owner);
}

}  // namespace

NB_MODULE(_numpy, m) {
  gradops::set_parallel_backend({gradops::thread_pool, gradops::thread_count});
  m.def("isa", [] { return gradops::isa_name(gradops::best_isa()); });
  m.def("row_normalize", [](In2 x, float eps) {
    auto y = make<2>({x.shape(0), x.shape(1)});
    auto inv = make<1>({x.shape(0)});
    {
      nb::gil_scoped_release unlock;
      gradops::cpu::row_normalize(x.data(), x.shape(1), y.data(), inv.data(), x.shape(0), x.shape(1), eps);
    }
    return std::make_pair(y, inv);
  }, "x"_a, "eps"_a = 1e-8f);
}
