// simd.h: vectors as wide as the x86-64 level a kernel is compiled for.
// For *.kernel.cpp only: everything is local to the file that includes it (see common/isa.h).
#pragma once
#include <cstdint>
#include <utility>

namespace gradops {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
[[gnu::always_inline]] inline Vec<T>& vec_at(T* aligned) {
  return *reinterpret_cast<Vec<T>*>(aligned);
}
template <class T>
[[gnu::always_inline]] inline const Vec<T>& vec_at(const T* aligned) {
  return *reinterpret_cast<const Vec<T>*>(aligned);
}

template <class T>
[[gnu::always_inline]] inline Vec<T> load_anywhere(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
[[gnu::always_inline]] inline void store_anywhere(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Swaps the off-diagonal halves of every 2H x 2H block, for H = lanes / 2, ..., 1.
template <class T, int H, int... N>
[[gnu::always_inline]] inline void transpose_halves(Vec<T>* row, std::integer_sequence<int, N...> lanes) {
  constexpr int W = kLanes<T>;
  for (int i = 0; i < W; ++i)
    if (!(i & H)) {
      const Vec<T> top = row[i], low = row[i + H];
      row[i] = __builtin_shufflevector(top, low, (N & H ? W + N - H : N)...);
      row[i + H] = __builtin_shufflevector(top, low, (N & H ? W + N : N + H)...);
    }
  if constexpr (H > 1) transpose_halves<T, H / 2>(row, lanes);
}
// A square block, one vector per row.
template <class T>
[[gnu::always_inline]] inline void transpose(Vec<T> (&row)[kLanes<T>]) {
  transpose_halves<T, kLanes<T> / 2>(row, std::make_integer_sequence<int, kLanes<T>>());
}

// Calls f with numbers too small for the normal range taken as zeros: they change no result that
// matters, but some processors take a hundred cycles for each. f must not throw. (An object that restores
// the mode would bring exception tables, and with them a symbol shared between the levels.)
template <class F>
[[gnu::always_inline]] inline void flushing_denormals(const F& f) {
#if defined(__SSE2__)
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | kFlushToZero | kDenormalsAreZero);
  f();
  __builtin_ia32_ldmxcsr(before);
#else
  f();
#endif
}

}  // namespace
}  // namespace gradops
