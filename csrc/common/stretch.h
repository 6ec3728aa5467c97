// stretch.h: loops over numbers of any Element, written once per type of arithmetic. They go a stretch at a time:
// numbers of another type are widened into a buffer, which stays in the L1 cache.
// For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/widen.h"

namespace gradops {
namespace {

constexpr int64_t kStretch = 1024;
template <class A>
struct Buffer {
  alignas(64) A at[kStretch];
};

template <class A>
inline bool stored_as(Element e) {
  return e == (sizeof(A) == 8 ? Element::f64 : Element::f32);
}

// Numbers `first` to `first` + `count` of x, in the buffer if need be.
template <class A>
inline const A* read(const void* x, Element e, int64_t first, int64_t count, Buffer<A>& buffer) {
  if (stored_as<A>(e)) return static_cast<const A*>(x) + first;
  with_type(e, [&](auto zero) {
    const decltype(zero)* from = static_cast<const decltype(zero)*>(x) + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer.at[i] = A(widen(from[i]));
  });
  return buffer.at;
}

// Where numbers `first` and on of y are to be written; then `written` takes them there.
template <class A>
inline A* target(void* y, Element e, int64_t first, Buffer<A>& buffer) {
  return y && stored_as<A>(e) ? static_cast<A*>(y) + first : buffer.at;
}
template <class A>
inline void written(void* y, Element e, int64_t first, int64_t count, const Buffer<A>& buffer) {
  if (!y || stored_as<A>(e)) return;
  with_type(e, [&](auto zero) {
    decltype(zero)* to = static_cast<decltype(zero)*>(y) + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) narrow(buffer.at[i], to[i]);
  });
}

}  // namespace
}  // namespace gradops
