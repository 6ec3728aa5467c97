// dequant_linear: y = x W^T + bias with W as GPTQ checkpoints hold it (quant/gptq_pack.h), unpacked in registers.
// dequant_weight: W^T itself. Torch-free.
//
//   W[j, i] = scale[g, j] * (code[i, j] - zero[g, j])   with g the group of input i
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct PackedWeight {
  const uint32_t* words;  // ceil(in * bits / 32) x out
  const uint32_t* zeros;  // groups x ceil(out * bits / 32), less `zero_offset`
  const void* scales;     // groups x out
  const int32_t* g_idx;   // in; null: input i is in group i / group_size
  int64_t in, out, groups, group_size;
  Element scale_type;
  int bits, zero_offset;
};

struct DequantLinearTask {
  PackedWeight w;
  const void* x;     // rows x in
  const void* bias;  // out, or null
  void* y;           // rows x out, of the type of x
  int64_t rows;
  Element type, bias_type;
};

struct DequantWeightTask {
  PackedWeight w;
  void* to;  // in x out
  Element type;
};

// Inputs are taken a unit at a time: as many as fill whole words.
constexpr int64_t unit_words(int bits) { return bits == 3 ? 3 : 1; }
constexpr int64_t unit_inputs(int bits) { return 32 * unit_words(bits) / bits; }

constexpr int64_t kDequantColumns = 128;  // outputs of a tile
constexpr int64_t kDequantRows = 128;     // rows of x for one pass over the weight
constexpr int64_t kDequantTerms = 128;    // inputs whose terms are summed before they are scaled and added to y

// Consecutive units. With group -1 not all inputs of a unit are in the same group.
struct InputRun {
  int64_t unit, units;
  int32_t group;
};
struct DequantPlan {
  const int32_t* group;  // of each input, up to whole units
  const InputRun* runs;
  int64_t count;
  bool mixed;      // some run has several groups
  int64_t inputs;  // up to whole units
  const float* x;  // arranged
};

// Rows [begin, end) of x as the next function reads them; begin is a multiple of 8, end too or the last.
GRADOPS_DECLARE(void, dequant_arrange, const DequantLinearTask&, int64_t begin, int64_t end, int64_t inputs, float* to)
GRADOPS_DECLARE(int64_t, dequant_scratch, const PackedWeight&, int64_t rows)  // bytes, for the next two
// Tiles [begin, end) of ceil(rows / kDequantRows) x ceil(out / kDequantColumns)
GRADOPS_DECLARE(void, dequant_linear_tiles, const DequantLinearTask&, const DequantPlan&, int64_t begin, int64_t end,
                char* scratch)
// The same for x in bf16, 2 or 4 bits and a plan that is not mixed. Their scratch memory is that of the others.
GRADOPS_DECLARE_BF16(void, dequant_arrange_bf16, const DequantLinearTask&, int64_t begin, int64_t end, int64_t inputs,
                     float* to)
GRADOPS_DECLARE_BF16(void, dequant_linear_tiles_bf16, const DequantLinearTask&, const DequantPlan&, int64_t begin,
                     int64_t end, char* scratch)
// Tiles [begin, end) of ceil(out / kDequantColumns)
GRADOPS_DECLARE(void, dequant_weight_tiles, const DequantWeightTask&, const int32_t* group, int64_t begin, int64_t end,
                char* scratch)

namespace cpu {  // throw std::invalid_argument for a group that is not there
void dequant_linear(const DequantLinearTask&, void* workspace, void* = nullptr);
int64_t dequant_linear_workspace(const DequantLinearTask&);  // bytes
void dequant_weight(const DequantWeightTask&, void* = nullptr);
}  // namespace cpu
namespace cuda {  // take the nearest group there is
void dequant_linear(const DequantLinearTask&, void* workspace, void* stream);
int64_t dequant_linear_workspace(const DequantLinearTask&);
void dequant_weight(const DequantWeightTask&, void* stream);
}  // namespace cuda
}  // namespace gradops
