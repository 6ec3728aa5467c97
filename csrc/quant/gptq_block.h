// gptq_block: quantises the columns of a block one after the other and, after each, moves what rounding lost onto
// the columns to the right within the block (GPTQ, GPTAQ, FOEM). Rows and experts are independent. Torch-free.
//
//   column j:  w -= beta (w - original)     FOEM, not for j = 0 unless pull_first
//              q  = scale * (code - zero), code = clamp(round(w / scale) + zero)
//              e  = ((w - q) - beta (w - original)) / u[j][j]
//              columns k > j:  w_k -= e u[j][k] - w pull[j][k]
//
// Without u nothing is moved, and a block may have any width: plain rounding, or a search for scales.
#pragma once
#include <cstdint>

#include "common/host_device.h"
#include "common/isa.h"
#include "quant/rounding.h"

namespace gradops {

struct Plane {  // a batch of matrices whose columns lie side by side; null: not given
  const float* data = nullptr;
  int64_t batch = 0, row = 0;  // distances in elements
};

template <class T>
struct ResultPlane {  // the same for a result
  T* data = nullptr;
  int64_t batch = 0, row = 0;
  GRADOPS_SHARED T* at(int64_t item, int64_t r) const { return data + item * batch + r * row; }
};

struct GptqBlock {
  Plane w, u, original, pull;
  Plane scale_in, zero_in;            // rows x groups; null: from each group's columns, when its first is reached
  const int64_t* group = nullptr;     // with scale_in: the group of every column, batch x cols
  const float* unit = nullptr;        // nvfp4: per item, what scales are E4M3 multiples of
  int64_t batch, rows, cols, groups;  // groups: of scale_in, or to be found
  int64_t group_size;
  GridTask grid;
  float beta;
  bool pull_first;
  bool latent_rounded;              // `latent` gets w - e u[j][j] (the authors' code) and not w
  ResultPlane<uint8_t> codes;       // batch x rows x cols, like q, e and latent
  ResultPlane<float> q, e, latent;  // e: may be null; latent: null without pull
  ResultPlane<float> scale, zero;   // batch x rows x groups; null with scale_in
  float* loss;                      // batch x rows: sum over columns of ((w - q) / u[j][j])^2 / 2
};

constexpr int64_t kMostGptqColumns = 128;  // of a block with u

GRADOPS_DECLARE(int64_t, gptq_tile_rows)                       // rows handled together
GRADOPS_DECLARE(int64_t, gptq_tile_scratch, const GptqBlock&)  // bytes
// Tiles [begin, end) of batch * ceil(rows / tile_rows)
GRADOPS_DECLARE(void, gptq_tiles, const GptqBlock&, int64_t begin, int64_t end, char* scratch)

namespace cpu {
void gptq_block(const GptqBlock&, void* = nullptr);
}
namespace cuda {
void gptq_block(const GptqBlock&, void* stream);
}
}  // namespace gradops
