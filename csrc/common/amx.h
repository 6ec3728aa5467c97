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
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(64L), "i"(T), "m"(*(const char(*)[1024])rows));
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
  auto& tile = tile_memory(T);
  for (int i = 0; i < 256; ++i) tile[i / 16][i % 16] = reinterpret_cast<const uint32_t*>(rows)[i];
}
// The two bf16 of each dword of a tile, as floats.
inline void tile_pairs(const uint32_t (&tile)[16][16], float (&first)[16][16], float (&second)[16][16]) {
  uint32_t bits[2][16][16];
  for (int i = 0; i < 256; ++i) {
    bits[0][i / 16][i % 16] = tile[i / 16][i % 16] << 16;
    bits[1][i / 16][i % 16] = tile[i / 16][i % 16] & 0xFFFF0000;
  }
  memcpy(first, bits[0], 1024);
  memcpy(second, bits[1], 1024);
}
// Sums the first numbers of all pairs and the second ones, then adds both sums to C. Rounds to
// nearest and takes denormals as zero, whatever the thread's own mode.
template <int C, int A, int B>
__attribute__((noinline)) void tile_dp_bf16() {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x9FC0);
  auto &c = tile_memory(C), &a = tile_memory(A), &b = tile_memory(B);
  float a0[16][16], a1[16][16], b0[16][16], b1[16][16], sum[16];
  tile_pairs(a, a0, a1);
  tile_pairs(b, b0, b1);
  for (int m = 0; m < 16; ++m) {
    float first[16] = {}, second[16] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        first[n] += a0[m][k] * b0[k][n];
        second[n] += a1[m][k] * b1[k][n];
      }
    memcpy(sum, c[m], 64);
    for (int n = 0; n < 16; ++n) sum[n] += first[n] + second[n];
    memcpy(c[m], sum, 64);
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
