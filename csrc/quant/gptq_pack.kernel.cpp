#include "quant/gptq_pack.h"

#include "quant/bit_stream.h"

namespace gradops::GRADOPS_ISA {
namespace {

// f(codes, words, left): for every 32 codes of the tile's rows, of which `left` exist. The words of a chunk are
// `step` elements apart, the rows of a tile go inside, so that transposed words are visited line by line.
template <class F>
void each_chunk(const PackTask& t, int64_t begin, int64_t end, const F& f) {
  const int64_t tiles = (t.rows + kPackRows - 1) / kPackRows, packed = packed_cols(t.cols, t.bits);
  const int64_t step = t.transposed ? t.rows : 1;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t item = n / tiles, first = n % tiles * kPackRows;
    const int64_t last = first + kPackRows < t.rows ? first + kPackRows : t.rows;
    for (int64_t c = 0; c < t.cols; c += 32) {
      const int64_t word = c / 32 * t.bits, words = packed - word < t.bits ? packed - word : t.bits;
      for (int64_t r = first; r < last; ++r)
        f(t.codes + (item * t.rows + r) * t.cols + c,
          t.words + item * t.rows * packed + (t.transposed ? word * t.rows + r : r * packed + word), step, words,
          t.cols - c);
    }
  }
}

}  // namespace

void gptq_pack_tiles(const PackTask& t, int64_t begin, int64_t end) {
  with_bits(t.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value;
    each_chunk(t, begin, end, [](const uint8_t* codes, uint32_t* to, int64_t step, int64_t words, int64_t left) {
      uint32_t full[b];
      if (left >= 32)
        pack_chunk<b>(codes, 32, full);
      else
        pack_chunk<b>(codes, left, full);
      for (int64_t k = 0; k < words; ++k) to[k * step] = full[k];
    });
  });
}

void gptq_unpack_tiles(const PackTask& t, int64_t begin, int64_t end) {
  with_bits(t.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value;
    each_chunk(t, begin, end, [](uint8_t* codes, const uint32_t* from, int64_t step, int64_t words, int64_t left) {
      uint32_t full[b] = {};
      for (int64_t k = 0; k < words; ++k) full[k] = from[k * step];
      if (left >= 32)
        unpack_chunk<b>(full, 32, codes);
      else
        unpack_chunk<b>(full, left, codes);
    });
  });
}

}  // namespace gradops::GRADOPS_ISA
