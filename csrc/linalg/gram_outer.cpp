#include "linalg/gram_outer.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "linalg/gram_pairs.h"

namespace gradops {
namespace {

constexpr int64_t kRoom = 1 << 21;  // gradients of all samples that are held at a time, in doubles
constexpr int64_t kSlice = 2048;    // columns of them in a slice at least
constexpr int64_t kPart = 256;      // rows and columns of a part of a gradient at most

// Groups of rows are whole samples, or pieces of one.
struct Groups {
  int64_t tokens, each, pieces, count;  // samples of a group; groups of a sample
  Groups(const OuterLayer& t, int64_t samples)
      : tokens(t.tokens),
        each(tokens <= kGramGroup ? kGramGroup / (tokens > 0 ? tokens : 1) : 1),
        pieces(tokens <= kGramGroup ? 1 : up(tokens, kGramGroup)),
        count(up(samples, each) * pieces) {
    if (each > samples) each = samples;
  }
  int64_t units() const { return count * (count + 1) / 2; }
  int64_t size() const { return each * each; }  // of what a unit gives
  int64_t first(int64_t group) const {          // row
    return group / pieces * each * tokens + group % pieces * kGramGroup;
  }
  int64_t rows(int64_t group, int64_t samples) const {
    const int64_t sample = group / pieces * each, whole = (samples - sample < each ? samples - sample : each) * tokens,
                  left = whole - group % pieces * kGramGroup;
    return left < kGramGroup ? left : kGramGroup;
  }
};

}  // namespace

int64_t cpu::gram_outer_workspace(const GramOuterTask& t) {
  int64_t doubles = 0;
  for (int64_t l = 0; l < t.count; ++l) {
    const Groups groups(t.layers[l], t.samples);
    doubles += groups.units() * groups.size();
  }
  return 8 * doubles;
}

void cpu::gram_outer(const GramOuterTask& t, void* workspace, void*) {
  const auto sum = GRADOPS_DISPATCH(gram_sum);
  const auto contract = GRADOPS_DISPATCH(gram_outer_contract);
  int64_t units = 0, most = 0;  // rows of a group
  for (int64_t l = 0; l < t.count; ++l) {
    const Groups groups(t.layers[l], t.samples);
    units += groups.units();
    if (most < groups.rows(0, t.samples)) most = groups.rows(0, t.samples);
  }
  const GramSpace space = GRADOPS_DISPATCH(gram_space)(most, most, true);
  double* const parts = static_cast<double*>(workspace);
  parallel_for(0, units, 1, [&](int64_t first, int64_t last) {
    char* const x = thread_scratch(2 * space.sum + space.packed);
    char *const g = x + space.sum, *const packed = g + space.sum;
    double* to = parts;
    int64_t at = 0;  // first unit of the layer
    for (const OuterLayer* layer = t.layers; layer < t.layers + t.count; ++layer) {
      const Groups groups(*layer, t.samples);
      const int64_t end = at + groups.units();
      for (int64_t n = first > at ? first : at; n < last && n < end; ++n) {
        const auto [i, j] = pair_of(n - at);
        const int64_t rows = groups.rows(i, t.samples), others = groups.rows(j, t.samples);
        const auto piece = [&](const void* data, Element element, int64_t cols) {
          return GramPiece{data, element, true, cols, groups.first(i), rows, groups.first(j), others, 0, cols, false};
        };
        sum(piece(layer->x, layer->x_element, layer->d), x, packed);
        sum(piece(layer->g, layer->g_element, layer->p), g, packed);
        const bool whole = groups.pieces == 1;
        contract({rows, others, whole ? groups.tokens : rows, whole ? groups.tokens : others, i == j, layer->bias}, x,
                 g, to + (n - at) * groups.size());
      }
      to += groups.units() * groups.size();
      at = end;
    }
  });
  parallel_for(0, t.samples, 65536 / (t.samples + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t a = first; a < last; ++a) {
      double* const out = t.out + a * t.samples;
      for (int64_t b = 0; b <= a; ++b) out[b] = 0;
      const double* from = parts;
      for (const OuterLayer* layer = t.layers; layer < t.layers + t.count; ++layer) {
        const Groups s(*layer, t.samples);
        for (int64_t i = a / s.each * s.pieces, end = i + s.pieces; i < end; ++i)
          for (int64_t j = 0; j <= i; ++j) {
            const int64_t sample = j / s.pieces * s.each, left = t.samples - sample,
                          others = left < s.each ? left : s.each, upto = a - sample < others ? a - sample + 1 : others;
            const double twice = i != j && sample == a ? 2 : 1;  // pieces of one sample
            const double* part = from + (i * (i + 1) / 2 + j) * s.size() + a % s.each * others;
            for (int64_t b = 0; b < upto; ++b) out[sample + b] += twice * part[b];
          }
        from += s.units() * s.size();
      }
      for (int64_t b = 0; b < a; ++b) t.out[b * t.samples + a] = out[b];
    }
  });
}

namespace {

// The weight is cut into parts, and the columns of the Jacobian that one of them gives into slices, by the shapes
// alone.
struct Parts {
  int64_t rows, cols, across, count, pairs, slices, slice, stride, size, packed;
  explicit Parts(const GramOuterTask& t) {
    const OuterLayer& layer = *t.layers;
    int64_t side = kPart;
    while (side > 16 && side * side * t.samples > kRoom) side /= 2;
    rows = layer.p < side ? layer.p : side;
    cols = layer.d < side ? layer.d : side;
    across = cols ? up(layer.d, cols) : 1;
    count = up(layer.p, rows) * across;
    size = GRADOPS_DISPATCH(gram_outer_part_size)(rows, cols, layer.bias);
    const int64_t groups = up(t.samples, kGramGroup), group = t.samples < kGramGroup ? t.samples : kGramGroup;
    pairs = groups * (groups + 1) / 2;
    slice = up(size, pairs < kGramPieces ? kGramPieces / pairs : 1);
    if (slice < kSlice) slice = kSlice;
    slices = up(size, slice);
    const GramSpace space = GRADOPS_DISPATCH(gram_space)(group, group, true);
    stride = up(space.sum, 64) * 64;
    packed = 8 * GRADOPS_DISPATCH(gram_outer_packed_size)(rows, cols);
    if (packed < space.packed) packed = space.packed;
  }
};

}  // namespace

int64_t cpu::gram_outer_blocks_workspace(const GramOuterTask& t) {
  const Parts p(t);
  return p.pairs * p.slices * p.stride + 64;
}

void cpu::gram_outer_blocks(const GramOuterTask& t, void* workspace) {
  const Parts p(t);
  const OuterLayer& layer = *t.layers;
  char* const sums = static_cast<char*>(workspace) + (-reinterpret_cast<uintptr_t>(workspace) & 63);
  const auto sum = GRADOPS_DISPATCH(gram_sum);
  const auto form = GRADOPS_DISPATCH(gram_outer_part);
  const auto part_size = GRADOPS_DISPATCH(gram_outer_part_size);
  const auto write = GRADOPS_DISPATCH(gram_write);
  const auto piece = [&](int64_t pair) {
    const auto [i, j] = pair_of(pair);
    const auto rows = [&](int64_t g) {
      return t.samples - g * kGramGroup < kGramGroup ? t.samples - g * kGramGroup : kGramGroup;
    };
    return GramPiece{nullptr, Element::f64, true, 0, i * kGramGroup, rows(i), j * kGramGroup, rows(j), 0, 0, false};
  };
  // The gradients lie behind what this thread, too, takes below for its packed matrices.
  double* const gradients = reinterpret_cast<double*>(thread_scratch(p.packed + 8 * p.size * t.samples) + p.packed);
  for (int64_t n = 0; n < p.count; ++n) {
    const int64_t row = n / p.across * p.rows, col = n % p.across * p.cols;
    const OuterPart part{row, layer.p - row < p.rows ? layer.p - row : p.rows, col,
                         layer.d - col < p.cols ? layer.d - col : p.cols, layer.bias && col == 0};
    const int64_t size = part_size(part.rows, part.cols, part.bias);
    parallel_for(0, t.samples, 1, [&](int64_t first, int64_t last) {
      double* const packed = reinterpret_cast<double*>(thread_scratch(p.packed));
      for (int64_t a = first; a < last; ++a) form(layer, a, part, packed, gradients + a * size);
    });
    parallel_for(0, p.pairs * p.slices, 1, [&](int64_t first, int64_t last) {
      char* const packed = thread_scratch(p.packed);
      for (int64_t m = first; m < last; ++m) {
        GramPiece with = piece(m / p.slices);
        with.j = gradients;
        with.cols = size;
        with.begin = m % p.slices * p.slice < size ? m % p.slices * p.slice : size;
        with.end = with.begin + p.slice < size ? with.begin + p.slice : size;
        with.add = n > 0;
        sum(with, sums + m * p.stride, packed);
      }
    });
  }
  parallel_for(0, p.pairs, 1, [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair)
      write(piece(pair), sums + pair * p.slices * p.stride, p.slices, p.stride, t.out, t.samples);
  });
}

}  // namespace gradops
