// A launch takes a table of tensors; a block has a chunk of one of them. The chunks' sums are added by one block, in a
// fixed order.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "optim/harpg.h"

namespace gradops {
namespace {

constexpr int kThreads = 256, kTensors = 32;  // of a table, which is an argument of the kernel

template <class T>
struct Table {
  int count;
  int64_t first[kTensors + 1];  // chunk of each tensor
  T at[kTensors];
};

__device__ void put(Element e, void* y, int64_t i, double x) {
  switch (e) {
    case Element::bf16:
      static_cast<__nv_bfloat16*>(y)[i] = from_double<__nv_bfloat16>(x);
      break;
    case Element::f16:
      static_cast<__half*>(y)[i] = from_double<__half>(x);
      break;
    case Element::f32:
      static_cast<float*>(y)[i] = float(x);
      break;
    default:
      static_cast<double*>(y)[i] = x;
  }
}

// f(tensor, number) for this block's chunk
template <class T, class F>
__device__ void each_number(const Table<T>& table, const F& f) {
  int i = 0;
  while (blockIdx.x >= table.first[i + 1]) ++i;
  const T& t = table.at[i];
  const int64_t begin = (blockIdx.x - table.first[i]) * kHarpgChunk,
                end = begin + kHarpgChunk < t.size ? begin + kHarpgChunk : t.size;
#pragma unroll 4
  for (int64_t j = begin + threadIdx.x; j < end; j += kThreads) f(t, j);
}

template <class A>
__device__ A next(const HarpgUpdate& t, int64_t j) {
  const A grad = A(t.sign) * A(number_at(t.grad_element, t.grad, j));
  if (t.eta == 1) return grad;
  A d = A(number_at(t.d_element, t.d, j));
  if (t.change) d += A(t.sign) * A(number_at(t.change_element, t.change, j));
  return A(1 - t.eta) * d + A(t.eta) * grad;
}

__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ Table<HarpgUpdate> table, double* __restrict__ sums) {
  __shared__ double scratch[32];
  double sum = 0;
  each_number(table, [&](const HarpgUpdate& t, int64_t j) {
    const bool wide = t.d_element == Element::f64 || t.grad_element == Element::f64;
    const double d = wide ? next<double>(t, j) : double(next<float>(t, j));
    put(t.d_element, t.d, j, d);
    sum += d * d;
  });
  sum = block_all(sum, 0., scratch, Add());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) root(const double* __restrict__ sums, int64_t count, double* norm) {
  __shared__ double scratch[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_all(sum, 0., scratch, Add());
  if (threadIdx.x == 0) *norm = sqrt(sum);
}

__device__ double rounded(Element e, double c) {
  return e == Element::bf16  ? to_double(from_double<__nv_bfloat16>(c))
         : e == Element::f16 ? to_double(from_double<__half>(c))
         : e == Element::f32 ? double(float(c))
                             : c;
}

__global__ void __launch_bounds__(kThreads)
    apply(const __grid_constant__ Table<HarpgApply> table, const __grid_constant__ HarpgStep step) {
  double lr = step.lr;
  if (step.lr_tensor) lr *= number_at(step.lr_element, step.lr_tensor, 0);
  if (step.norm) lr = *step.norm > 0 ? lr / *step.norm : 0;
  each_number(table, [&](const HarpgApply& t, int64_t j) {
    const double c = rounded(t.d_element, lr), d = number_at(t.d_element, t.d, j),
                 p = number_at(t.param_element, t.param, j);
    const bool wide = t.param_element == Element::f64 || t.d_element == Element::f64;
    put(t.param_element, t.param, j, wide ? p - c * d : double(float(p) - float(c) * float(d)));
    if (j == 0) put(t.d_element, t.scale, 0, lr);
  });
}

// Calls f(table) for the tensors that have numbers, as many as a table holds at a time.
template <class T, class F>
void each_table(const T* list, int64_t count, const F& f) {
  Table<T> table;
  table.count = 0;
  table.first[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (list[i].size > 0) {
      table.at[table.count] = list[i];
      table.first[table.count + 1] = table.first[table.count] + harpg_chunks(list[i].size);
      ++table.count;
    }
    if (table.count == kTensors || (i == count - 1 && table.count > 0)) {
      f(table);
      table.count = 0;
    }
  }
}

}  // namespace

void cuda::harpg_update(const HarpgUpdate* list, int64_t count, double* sums, double* norm, void* stream) {
  int64_t chunks = 0;
  each_table(list, count, [&](const Table<HarpgUpdate>& table) {
    const int64_t more = table.first[table.count];
    launch(update, blocks(more), kThreads, 0, stream, table, sums + chunks);
    chunks += more;
  });
  launch(root, 1, kThreads, 0, stream, sums, chunks, norm);
}

void cuda::harpg_apply(const HarpgApply* list, int64_t count, const HarpgStep& step, void* stream) {
  each_table(list, count, [&](const Table<HarpgApply>& table) {
    launch(apply, blocks(table.first[table.count]), kThreads, 0, stream, table, step);
  });
}

}  // namespace gradops
