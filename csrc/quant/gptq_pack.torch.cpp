#include "quant/gptq_pack.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

void check_bits(const char* op, int64_t bits) {
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, op, ": bits must be 2, 3, 4 or 8, got ", bits);
}

struct Sizes {
  std::vector<int64_t> lead;
  int64_t items = 1;
  explicit Sizes(const Tensor& x) {
    for (int64_t d = 0; d + 2 < x.dim(); ++d) lead.push_back(x.size(d)), items *= x.size(d);
  }
  std::vector<int64_t> shape(int64_t rows, int64_t cols) const {
    std::vector<int64_t> s = lead;
    s.push_back(rows), s.push_back(cols);
    return s;
  }
};

Tensor gptq_pack(const Tensor& codes_in, int64_t bits, bool transposed) {
  check_bits("gptq_pack", bits);
  STD_TORCH_CHECK(codes_in.dim() >= 2, "gptq_pack: codes must have at least 2 dimensions, got ", codes_in.dim());
  STD_TORCH_CHECK(codes_in.scalar_type() == ScalarType::Byte, "gptq_pack: codes must be uint8");
  const Scope scope(codes_in);
  const Tensor codes = contiguous_of(codes_in);
  const Sizes sizes(codes);
  const int64_t rows = codes.size(-2), cols = codes.size(-1), packed = packed_cols(cols, bits);
  Tensor words = empty(codes, transposed ? sizes.shape(packed, rows) : sizes.shape(rows, packed), ScalarType::Int);
  backend::gptq_pack({const_cast<uint8_t*>(static_cast<const uint8_t*>(codes.const_data_ptr())),
                      static_cast<uint32_t*>(words.mutable_data_ptr()), sizes.items, rows, cols, int(bits), transposed},
                     scope.stream());
  return words;
}

Tensor gptq_unpack(const Tensor& words_in, int64_t bits, int64_t cols, bool transposed) {
  check_bits("gptq_unpack", bits);
  STD_TORCH_CHECK(words_in.dim() >= 2, "gptq_unpack: words must have at least 2 dimensions, got ", words_in.dim());
  STD_TORCH_CHECK(words_in.scalar_type() == ScalarType::Int, "gptq_unpack: words must be int32");
  const int64_t rows = words_in.size(transposed ? -1 : -2), packed = words_in.size(transposed ? -2 : -1);
  STD_TORCH_CHECK(cols >= 0 && packed == packed_cols(cols, bits), "gptq_unpack: ", cols, " codes of ", bits,
                  " bits need ", packed_cols(cols, bits), " words, got ", packed);
  const Scope scope(words_in);
  const Tensor words = contiguous_of(words_in);
  const Sizes sizes(words);
  Tensor codes = empty(words, sizes.shape(rows, cols), ScalarType::Byte);
  backend::gptq_unpack({static_cast<uint8_t*>(codes.mutable_data_ptr()),
                        const_cast<uint32_t*>(static_cast<const uint32_t*>(words.const_data_ptr())), sizes.items, rows,
                        cols, int(bits), transposed},
                       scope.stream());
  return codes;
}

}  // namespace

GRADOPS_OP(gptq_pack, "gptq_pack(Tensor codes, int bits, bool transposed) -> Tensor")
GRADOPS_OP(gptq_unpack, "gptq_unpack(Tensor words, int bits, int cols, bool transposed) -> Tensor")

}  // namespace gradops
