#include "quant/gptq_block.h"

#include "common/exp_log.h"
#include "common/simd.h"

namespace gradops::GRADOPS_ISA {
namespace {

using V = Vec<float>;
constexpr int kLane = kLanes<float>, kVecs = 2, kTile = kVecs * kLane;
constexpr int kPanel = kVectorRegisters / 4;  // columns whose running values stay in registers, kVecs vectors each

V spread(float x) { return x - V{}; }  // the compiler sees that nothing is left to subtract
V load(const float* p) { return vec_at(p); }
V lesser(V a, V b) { return a < b ? a : b; }
V greater(V a, V b) { return a > b ? a : b; }
V round_even(V x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

template <bool kInteger>
[[gnu::always_inline]] inline void round_vector(V w, V scale, V zero, V most, V& code, V& value) {
  const V ratio = w / scale;
  if constexpr (kInteger) {
    const V near = round_even(greater(lesser(ratio, spread(512.f)), spread(-512.f)));
    code = greater(lesser(near + zero, most), V{});
    value = scale * (code - zero);
  } else {
    for (int r = 0; r < kLane; ++r) {
      const Rounded one = round_to_grid<false>(w[r], scale[r], 0.f, 0.f);
      code[r] = one.code, value[r] = one.value;
    }
  }
}

// --- between matrices and tiles of kTile rows, [column][row] -------------------------------------

void read_tile(const float* from, int64_t row, int64_t rows, int64_t cols, float* tile) {
  for (int64_t c = 0; c < cols; c += kLane)
    for (int h = 0; h < kVecs; ++h) {
      const float* p = from + h * kLane * row + c;
      float* to = tile + c * kTile + h * kLane;
      if (c + kLane <= cols && (h + 1) * kLane <= rows) {
        V block[kLane];
        for (int i = 0; i < kLane; ++i) block[i] = load_anywhere(p + i * row);
        transpose<float>(block);
        for (int i = 0; i < kLane; ++i) vec_at(to + i * kTile) = block[i];
      } else {
        for (int64_t i = 0; i < kLane && c + i < cols; ++i)
          for (int64_t r = 0; r < kLane; ++r) to[i * kTile + r] = h * kLane + r < rows ? p[r * row + i] : 0.f;
      }
    }
}

void store_row(V v, float* to) { __builtin_memcpy(to, &v, sizeof v); }
void store_row(V v, uint8_t* to) {
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kLane)));
  const Bytes b = __builtin_convertvector(__builtin_convertvector(v, Ints), Bytes);
  __builtin_memcpy(to, &b, sizeof b);
}
template <class T>
void write_tile(const float* tile, int64_t rows, int64_t cols, T* to, int64_t row) {
  for (int64_t c = 0; c < cols; c += kLane)
    for (int h = 0; h < kVecs; ++h) {
      const float* p = tile + c * kTile + h * kLane;
      T* out = to + h * kLane * row + c;
      if (c + kLane <= cols && (h + 1) * kLane <= rows) {
        V block[kLane];
        for (int i = 0; i < kLane; ++i) block[i] = load(p + i * kTile);
        transpose<float>(block);
        for (int i = 0; i < kLane; ++i) store_row(block[i], out + i * row);
      } else {
        for (int64_t i = 0; i < kLane && c + i < cols; ++i)
          for (int64_t r = 0; r < kLane && h * kLane + r < rows; ++r) out[r * row + i] = T(p[i * kTile + r]);
      }
    }
}

// --- scales --------------------------------------------------------------------------------------

// Sum over columns of |w - q|^p, row by row.
template <bool kInteger>
void grid_error(const float* w, int64_t cols, const float* scale, const float* zero, const GridTask& t, float* error) {
  for (int r = 0; r < kTile; ++r) error[r] = 0.f;
  for (int64_t c = 0; c < cols; ++c) {
#pragma omp simd
    for (int r = 0; r < kTile; ++r) {
      const float x = w[c * kTile + r];
      const float d = x - round_to_grid<kInteger>(x, scale[r], zero[r], t.most).value;
      const float size = d < 0.f ? -d : d;
      error[r] += t.mse == 2.f ? d * d : exp_of(t.mse * log_of(size));
    }
  }
}

void find_scales(const float* w, int64_t cols, const GridTask& t, float unit, float* scale, float* zero) {
  alignas(64) float low[kTile], high[kTile];
  V least[kVecs] = {}, most[kVecs] = {};
  for (int64_t c = 0; c < cols; ++c)
    for (int h = 0; h < kVecs; ++h) {
      const V v = load(w + c * kTile + h * kLane);
      least[h] = lesser(v, least[h]), most[h] = greater(v, most[h]);
    }
  for (int h = 0; h < kVecs; ++h) vec_at(low + h * kLane) = least[h], vec_at(high + h * kLane) = most[h];
#pragma omp simd
  for (int r = 0; r < kTile; ++r) {
    make_symmetric(low[r], high[r], t);
    const Range range = range_of(low[r], high[r], t, unit);
    scale[r] = range.scale, zero[r] = range.zero;
  }
  if (t.mse == 0.f) return;
  alignas(64) float error[kTile], best[kTile], try_scale[kTile], try_zero[kTile];
  for (int r = 0; r < kTile; ++r) best[r] = __builtin_inff();
  for (int i = 0; i < kShrinks; ++i) {
    const float part = 1.f - float(i) / 100.f;
    for (int r = 0; r < kTile; ++r) {
      const Range range = range_of(part * low[r], part * high[r], t, unit);
      try_scale[r] = range.scale, try_zero[r] = range.zero;
    }
    if (t.grid == Grid::integer)
      grid_error<true>(w, cols, try_scale, try_zero, t, error);
    else
      grid_error<false>(w, cols, try_scale, try_zero, t, error);
    for (int r = 0; r < kTile; ++r)
      if (error[r] < best[r]) best[r] = error[r], scale[r] = try_scale[r], zero[r] = try_zero[r];
  }
}

// --- columns -------------------------------------------------------------------------------------

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one thread works in. `cols` is the width of a piece: a block with u, or a group without.
struct Scratch {
  float *w, *original, *e, *latent, *code, *upper, *pull, *scale, *zero;
  int64_t bytes;
  Scratch(const GptqBlock& t, int64_t cols, char* memory) {
    const int64_t panels = t.u.data ? kPanel * (cols + kPanel) * cols : 0;
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* p = reinterpret_cast<float*>(memory + used);
      used += round_up(4 * floats, 64);
      return p;
    };
    const int64_t tile = kTile * (cols + round_up(kPanel, kLane));
    w = take(tile);
    code = take(tile);
    original = take(t.original.data ? tile : 0);
    e = take(t.u.data ? tile : 0);
    latent = take(t.pull.data ? tile : 0);
    upper = take(panels);
    pull = take(t.pull.data ? panels : 0);
    scale = take(kTile);
    zero = take(kTile);
    bytes = used;
  }
};

// A piece is cut into segments (groups, or the whole piece if scales are given), a segment into panels.
int64_t piece_cols(const GptqBlock& t) {
  if (t.u.data) return t.cols;
  const int64_t whole = t.scale_in.data ? kMostGptqColumns : t.group_size;
  return whole < t.cols ? whole : t.cols;
}
int64_t segment_cols(const GptqBlock& t) { return t.scale_in.data || t.group_size > t.cols ? t.cols : t.group_size; }

// Columns [p, p + kPanel) of the upper triangle, rows 0 .. p + kPanel - 1, panel after panel: each is read in order.
void pack_panels(const Plane& from, int64_t item, int64_t cols, int64_t segment, float* to) {
  const float* m = from.data + item * from.batch;
  for (int64_t s = 0; s < cols; s += segment)
    for (int64_t p = s; p < cols && p < s + segment; p += kPanel)
      for (int64_t i = 0; i < p + kPanel; ++i)
        for (int64_t k = 0; k < kPanel; ++k)
          *to++ = i < cols && i <= p + k && p + k < cols ? m[i * from.row + p + k] : 0.f;
}

// What columns [from, to) have left for the panel's, summed before it meets w: less is lost than one by one.
template <bool kPull>
[[gnu::always_inline]] inline void gather(V (&a)[kPanel][kVecs], const Scratch& m, const float* u, const float* pull,
                                          int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    V e[kVecs], x[kVecs];
    for (int h = 0; h < kVecs; ++h) e[h] = load(m.e + i * kTile + h * kLane);
    if constexpr (kPull)
      for (int h = 0; h < kVecs; ++h) x[h] = load(m.latent + i * kTile + h * kLane);
#pragma GCC unroll 8
    for (int k = 0; k < kPanel; ++k) {
      const V factor = spread(u[i * kPanel + k]);
      for (int h = 0; h < kVecs; ++h) a[k][h] -= e[h] * factor;
      if constexpr (kPull) {
        const V extra = spread(pull[i * kPanel + k]);
        for (int h = 0; h < kVecs; ++h) a[k][h] += x[h] * extra;
      }
    }
  }
}

template <bool kUpper, bool kFoem, bool kPull, bool kInteger>
void run_piece(const GptqBlock& t, const Scratch& m, int64_t item, int64_t row, int64_t rows, int64_t first,
               int64_t cols, V (&loss)[kVecs]) {
  const int64_t segment = t.u.data ? segment_cols(t) : cols;
  const float unit = t.unit ? t.unit[item] : 1.f;
  const V most = spread(t.grid.most), beta = spread(t.beta);
  const float *u = m.upper, *pull = m.pull;
  for (int64_t s = 0; s < cols; s += segment) {
    const int64_t end = s + segment < cols ? s + segment : cols;
    if (!t.scale_in.data) {
      if (kUpper && s > 0) {  // the whole group as it is now, before its scales are chosen
        const float *us = u, *ps = pull;
        for (int64_t p = s; p < end; p += kPanel) {
          V a[kPanel][kVecs] = {};
          gather<kPull>(a, m, us, ps, 0, s);
          for (int k = 0; k < kPanel && p + k < end; ++k)
            for (int h = 0; h < kVecs; ++h) vec_at(m.w + (p + k) * kTile + h * kLane) += a[k][h];
          us += (p + kPanel) * kPanel, ps += (p + kPanel) * kPanel;
        }
      }
      find_scales(m.w + s * kTile, end - s, t.grid, unit, m.scale, m.zero);
      const int64_t at = (first + s) / t.group_size;
      for (int64_t r = 0; r < rows; ++r)
        t.scale.at(item, row + r)[at] = m.scale[r], t.zero.at(item, row + r)[at] = m.zero[r];
    }
    const int64_t done = !t.scale_in.data ? s : 0;  // columns whose share has been taken
    int64_t group = -1;
    V scale[kVecs] = {}, zero[kVecs] = {};
    const auto fetch = [&] {
      for (int h = 0; h < kVecs; ++h) scale[h] = load(m.scale + h * kLane), zero[h] = load(m.zero + h * kLane);
    };
    if (!t.scale_in.data) fetch();
    for (int64_t p = s; p < end; p += kPanel) {
      V a[kPanel][kVecs] = {};
      if constexpr (kUpper) gather<kPull>(a, m, u, pull, done, p);
      for (int k = 0; k < kPanel; ++k)
        for (int h = 0; h < kVecs; ++h) a[k][h] += load(m.w + (p + k) * kTile + h * kLane);
#pragma GCC unroll 8
      for (int k = 0; k < kPanel; ++k) {
        const int64_t c = p + k;
        if (c >= end) break;
        if (t.scale_in.data && t.group[item * t.cols + first + c] != group) {
          group = t.group[item * t.cols + first + c];
          const float* from = t.scale_in.data + item * t.scale_in.batch + row * t.scale_in.row + group;
          const float* from_zero = t.zero_in.data + item * t.zero_in.batch + row * t.zero_in.row + group;
          for (int64_t r = 0; r < kTile; ++r) {
            m.scale[r] = r < rows ? from[r * t.scale_in.row] : 1.f;
            m.zero[r] = r < rows ? from_zero[r * t.zero_in.row] : 0.f;
          }
          fetch();
        }
        const float* own = kUpper ? u + c * kPanel : nullptr;  // this column's row of u, in this panel
        const float diagonal = kUpper ? own[k] : 1.f;
        const V divisor = spread(diagonal), weight = spread(0.5f / (diagonal * diagonal));
        for (int h = 0; h < kVecs; ++h) {
          const int64_t at = c * kTile + h * kLane;
          V w = a[k][h], code, q, away{};
          if constexpr (kFoem) {
            away = load(m.original + at);
            if (c > 0 || t.pull_first) w -= beta * (w - away);
            away = beta * (w - away);
          }
          round_vector<kInteger>(w, scale[h], zero[h], most, code, q);
          const V rest = w - q, moved = kFoem ? rest - away : rest;
          loss[h] += rest * rest * weight;
          vec_at(m.code + at) = code;
          vec_at(m.w + at) = q;
          if constexpr (kUpper) {
            const V e = moved / divisor;
            vec_at(m.e + at) = e;
            const V latent = w;
            if constexpr (kPull) vec_at(m.latent + at) = w;
#pragma GCC unroll 8
            for (int l = k + 1; l < kPanel; ++l) {
              a[l][h] -= e * spread(own[l]);
              if constexpr (kPull) a[l][h] += latent * spread(pull[c * kPanel + l]);
            }
          }
        }
      }
      u += (p + kPanel) * kPanel, pull += (p + kPanel) * kPanel;
    }
  }
}

using RunPiece = void (*)(const GptqBlock&, const Scratch&, int64_t, int64_t, int64_t, int64_t, int64_t, V (&)[kVecs]);
template <bool kInteger>
RunPiece pick(const GptqBlock& t) {
  if (!t.u.data) return run_piece<false, false, false, kInteger>;
  if (t.original.data)
    return t.pull.data ? run_piece<true, true, true, kInteger> : run_piece<true, true, false, kInteger>;
  return t.pull.data ? run_piece<true, false, true, kInteger> : run_piece<true, false, false, kInteger>;
}

}  // namespace

int64_t gptq_tile_rows() { return kTile; }
int64_t gptq_tile_scratch(const GptqBlock& t) { return Scratch(t, piece_cols(t), nullptr).bytes; }

void gptq_tiles(const GptqBlock& t, int64_t begin, int64_t end, char* scratch) {
  const int64_t tiles = (t.rows + kTile - 1) / kTile, width = piece_cols(t);
  const Scratch m(t, width, scratch);
  const RunPiece run = t.grid.grid == Grid::integer ? pick<true>(t) : pick<false>(t);
  for (int64_t i = 0; i < kTile * (width + round_up(kPanel, kLane)); ++i) m.w[i] = 0.f;  // padding is read, not used
  int64_t packed = -1;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t item = n / tiles, row = n % tiles * kTile, rows = t.rows - row < kTile ? t.rows - row : kTile;
    if (t.u.data && item != packed) {
      pack_panels(t.u, item, t.cols, segment_cols(t), m.upper);
      if (t.pull.data) pack_panels(t.pull, item, t.cols, segment_cols(t), m.pull);
      packed = item;
    }
    const auto write = [&](const float* tile, const auto& to, int64_t c, int64_t cols) {
      write_tile(tile, rows, cols, to.at(item, row) + c, to.row);
    };
    V loss[kVecs] = {};
    for (int64_t c = 0; c < t.cols; c += width) {
      const int64_t cols = t.cols - c < width ? t.cols - c : width;
      read_tile(t.w.data + item * t.w.batch + row * t.w.row + c, t.w.row, rows, cols, m.w);
      if (t.original.data)
        read_tile(t.original.data + item * t.original.batch + row * t.original.row + c, t.original.row, rows, cols,
                  m.original);
      run(t, m, item, row, rows, c, cols, loss);
      write(m.w, t.q, c, cols);
      write(m.code, t.codes, c, cols);
      if (t.e.data) write(m.e, t.e, c, cols);
      if (t.latent.data && t.latent_rounded) {
        const float* u = t.u.data + item * t.u.batch;
        for (int64_t i = 0; i < cols; ++i)
          for (int64_t r = 0; r < kTile; ++r) m.latent[i * kTile + r] -= m.e[i * kTile + r] * u[i * t.u.row + i];
      }
      if (t.latent.data) write(m.latent, t.latent, c, cols);
    }
    for (int64_t r = 0; r < rows; ++r) t.loss[item * t.rows + row + r] = loss[r / kLane][r % kLane];
  }
}

}  // namespace gradops::GRADOPS_ISA
