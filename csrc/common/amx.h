// amx.h: the tile unit (AMX) for products of bf16, for kernels of the levels amx and amx_twin.
//
// Eight tiles of 16 rows x 64 bytes. tile_dp_bf16<C, A, B>: C (16 x 16 float) += A B, where row m
// of A holds 16 pairs of bf16, and dword n of row k of B the pair that belongs to column n.
// Between tile_configure() and tile_release(), both of which act on the calling thread.
// amx_twin does the same in plain C++, and refuses tiles that are not configured: kernels are
// tested with it where there is no tile unit, and sanitizers see every byte they read and write.
#pragma once
#include <stdint.h>

#if defined(GRADOPS_LEVEL_amx_twin)
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#endif

namespace gradops {
namespace {

#define GRADOPS_TILE static inline __attribute__((always_inline))

#if defined(GRADOPS_LEVEL_amx)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not gcc's intrinsics: those of gcc 12 do not tell the optimizer which memory they touch.
GRADOPS_TILE void tile_configure() {
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
GRADOPS_TILE void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
GRADOPS_TILE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
GRADOPS_TILE void tile_load(const char* rows) {  // contiguous: 1024 bytes
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(64L), "i"(T), "m"(*(const char (*)[1024])rows));
}
template <int C, int A, int B>
GRADOPS_TILE void tile_dp_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int T>
GRADOPS_TILE void tile_store(float* out, long row_floats) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(out), "r"(4 * row_floats), "i"(T) : "memory");
}

#elif defined(GRADOPS_LEVEL_amx_twin)

struct TileUnit {
  bool configured = false;
  uint32_t tile[8][16][16] = {};
};
thread_local TileUnit tile_unit;

// Not inline: gcc would look the thread's unit up again for every element.
__attribute__((noinline)) uint32_t (&tile_memory(int t))[16][16] {
  if (!tile_unit.configured) {
    fprintf(stderr, "amx_twin: tile %d used before tile_configure()\n", t);
    abort();
  }
  return tile_unit.tile[t];
}
inline void tile_configure() { tile_unit = TileUnit{true, {}}; }
inline void tile_release() { tile_unit.configured = false; }
template <int T>
inline void tile_zero() {
  memset(tile_memory(T), 0, 1024);
}
template <int T>
inline void tile_load(const char* rows) {
  memcpy(tile_memory(T), rows, 1024);
}
// Sums the first numbers of all pairs and the second ones, then adds both sums to C. Rounds to
// nearest and takes denormals as zero, whatever the thread's own mode.
using TileRow __attribute__((vector_size(64))) = uint32_t;  // without them gcc takes 50 times as long
using TileFloats __attribute__((vector_size(64))) = float;
template <int C, int A, int B>
__attribute__((noinline)) void tile_dp_bf16() {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x9FC0);
  auto &c = tile_memory(C), &a = tile_memory(A), &b = tile_memory(B);
  constexpr uint32_t kSecond = 0xFFFF0000;
  for (int m = 0; m < 16; ++m) {
    TileFloats first = {}, second = {}, sum;
    for (int k = 0; k < 16; ++k) {
      TileRow row;
      memcpy(&row, b[k], 64);
      const TileRow pair = TileRow{} + a[m][k];
      first += TileFloats(pair << 16) * TileFloats(row << 16);
      second += TileFloats(pair & kSecond) * TileFloats(row & kSecond);
    }
    memcpy(&sum, c[m], 64);
    sum += first + second;
    memcpy(c[m], &sum, 64);
  }
  _mm_setcsr(mode);
}
template <int T>
inline void tile_store(float* out, long row_floats) {
  const auto& tile = tile_memory(T);
  for (int m = 0; m < 16; ++m) memcpy(out + m * row_floats, tile[m], 64);
}

#else

GRADOPS_TILE void tile_configure() {}  // no tile unit: nothing to configure
GRADOPS_TILE void tile_release() {}

#endif
#undef GRADOPS_TILE

}  // namespace
}  // namespace gradops
