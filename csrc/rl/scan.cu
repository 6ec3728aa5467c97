// A tile is kItems tokens for each lane of a warp: lanes fold theirs, the warp scans the folds, and the tiles of a row
// follow one another in order, whether one warp walks them or several share them: the arithmetic is the same. Rows
// longer than a chunk are measured first, chunk by chunk, and then written. Rows of up to 32 tokens: one thread each.
#include "common/device_number.cuh"
#include "rl/scan.h"

namespace gradops {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kItems = 4, kTile = 32 * kItems, kShort = 32, kShortThreads = 64;

template <class T>
struct Args {
  using Out = Arithmetic<T>;
  ScanKind kind;
  const T *rewards, *values, *next_values, *last_values, *ratios;
  const uint8_t *terminated, *truncated, *mask;
  const int64_t* offsets;
  int64_t rows, length, tokens, chunks;  // chunks of a row, without offsets
  double gamma, lam, rho_clip, c_clip;
  Out *first, *second;
};

struct Found {
  double value;
  int64_t has;
};
struct Chunk {
  int64_t row, index, count, row_begin, row_end, begin, end;  // index: in the order of the walk
};

__device__ inline int64_t clamp_to(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The chunk of a slot. Row i of a pack has its slots from offsets[i] / kScanChunk + i on, which leaves enough for any
// lengths; count is 0 for a slot that no chunk needs.
template <class T>
__device__ Chunk chunk_of(const Args<T>& t, int64_t slot) {
  Chunk c;
  if (t.offsets) {
    int64_t low = 0, high = t.rows;  // the last row whose slots begin at or before this one
    while (high - low > 1) {
      const int64_t mid = (low + high) / 2;
      (t.offsets[mid] / kScanChunk + mid <= slot ? low : high) = mid;
    }
    c.row = low;
    c.row_begin = clamp_to(t.offsets[low], 0, t.tokens);
    c.row_end = clamp_to(t.offsets[low + 1], c.row_begin, t.tokens);
    c.index = slot - (t.offsets[low] / kScanChunk + low);
  } else {
    c.row = slot / t.chunks;
    c.index = slot % t.chunks;
    c.row_begin = c.row * t.length;
    c.row_end = c.row_begin + t.length;
  }
  const int64_t size = c.row_end - c.row_begin;
  c.count = size > 0 ? (size + kScanChunk - 1) / kScanChunk : 1;
  if (c.index < 0 || c.index >= c.count) {
    c.count = 0;
    return c;
  }
  if (t.kind == ScanKind::carry) {
    c.begin = c.row_begin + c.index * kScanChunk;
    c.end = c.begin + kScanChunk < c.row_end ? c.begin + kScanChunk : c.row_end;
  } else {
    c.end = c.row_end - c.index * kScanChunk;
    c.begin = c.end - kScanChunk > c.row_begin ? c.end - kScanChunk : c.row_begin;
  }
  return c;
}

__device__ inline double fold(const ScanMap& m, double carry) { return m.a == 0 ? m.x : fma(m.a, carry, m.x); }
__device__ inline ScanMap after(const ScanMap& m, const ScanMap& earlier) {  // m, applied after `earlier`
  return {fold(m, earlier.x), m.a == 0 ? 0. : m.a * earlier.a};
}

struct Token {
  ScanMap map{0, 1};
  double d = 0, rho = 1, v = 0, g = 0;
  bool counts = false;
};

// A token that counts; following: the value of the next one that does.
template <class T>
__device__ Token token_at(const Args<T>& t, int64_t i, double reward, double v, double following) {
  Token k;
  k.counts = true;
  if (t.kind == ScanKind::carry) {
    k.map = {reward, to_double(t.ratios[i])};
    return k;
  }
  const bool ends = t.terminated && t.terminated[i], cut = ends || (t.truncated && t.truncated[i]);
  const double n = ends ? 0. : t.next_values ? to_double(t.next_values[i]) : following;
  k.g = cut ? 0. : t.gamma;
  k.v = v;
  k.map.a = k.g * t.lam;
  if (t.kind == ScanKind::returns) {
    const double weight = t.gamma - k.map.a;
    k.map.x = weight != 0 ? fma(weight, n, reward) : reward;
    return k;
  }
  k.map.x = k.d = fma(t.gamma, n, reward) - v;
  if (t.ratios) {
    const double ratio = to_double(t.ratios[i]);
    k.rho = ratio > t.rho_clip ? t.rho_clip : ratio;
    k.map.x = k.rho * k.d;
    if (k.map.a != 0) k.map.a *= ratio > t.c_clip ? t.c_clip : ratio;
  }
  return k;
}
template <class T>
__device__ double first_of(const Args<T>& t, const Token& k, double before, double y) {
  if (t.kind == ScanKind::carry) return before;
  if (!k.counts) return 0;
  return t.ratios ? k.rho * (k.g != 0 ? fma(k.g, before, k.d) : k.d) : y;
}

// The last value of the lanes below, or else `otherwise`; *all: the last of the whole warp, or else `otherwise`.
__device__ double last_below(bool has, double v, double otherwise, double* all) {
  const int lane = threadIdx.x % 32;
  const unsigned lanes = __ballot_sync(kFull, has), below = lanes & ((1u << lane) - 1);
  const double mine = __shfl_sync(kFull, v, below ? 31 - __clz(int(below)) : 0);
  const double last = __shfl_sync(kFull, v, lanes ? 31 - __clz(int(lanes)) : 0);
  *all = lanes ? last : otherwise;
  return below ? mine : otherwise;
}

// found[slot]: the chunk's first value that counts or, for returns with next_values, the last next_value. One warp
// per slot.
template <class T>
__global__ void __launch_bounds__(128) find(const __grid_constant__ Args<T> t, Found* found, int64_t slots) {
  const int64_t slot = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (slot >= slots) return;
  const Chunk c = chunk_of(t, slot);
  if (c.count == 0) return;
  const int lane = threadIdx.x % 32;
  const T* from = t.next_values ? t.next_values : t.values;
  for (int64_t done = 0; done < c.end - c.begin; done += 32) {
    const int64_t i = t.next_values ? c.end - 1 - done - lane : c.begin + done + lane;
    const bool counts = i >= c.begin && i < c.end && t.mask[i];
    const unsigned lanes = __ballot_sync(kFull, counts);
    if (lanes == 0) continue;
    if (lane == __ffs(int(lanes)) - 1) found[slot] = {to_double(from[i]), 1};
    return;
  }
  if (lane == 0) found[slot] = {0, 0};
}

// Where the walk of a chunk starts: `carry` before the row, and the value that follows the chunk.
template <class T>
__device__ void start_of(const Args<T>& t, const Chunk& c, const Found* found, double* carry, double* following) {
  *carry = *following = 0;
  if (t.kind == ScanKind::carry) return;
  *following = t.last_values ? to_double(t.last_values[c.row]) : 0.;
  if (t.values && c.index > 0) {
    if (!t.mask) *following = to_double(t.values[c.end]);
    for (int64_t i = 1; t.mask && i <= c.index; ++i)
      if (found[-i].has) {
        *following = found[-i].value;
        break;
      }
  }
  if (t.kind == ScanKind::advantages) return;
  *carry = t.last_values ? to_double(t.last_values[c.row]) : 0.;
  if (!t.next_values) return;
  if (!t.mask && c.row_end > c.row_begin) *carry = to_double(t.next_values[c.row_end - 1]);
  for (int64_t i = 0; t.mask && i < c.count; ++i)
    if (found[i - c.index].has) {
      *carry = found[i - c.index].value;
      break;
    }
}

// A team of kWarps warps walks one chunk. kMeasure: only its map, and only of rows with several chunks.
template <class T, int kWarps, bool kMeasure>
__global__ void __launch_bounds__(128, 4) walk(const __grid_constant__ Args<T> t, ScanMap* __restrict__ maps,
                                               const Found* __restrict__ found, int64_t slots) {
  __shared__ ScanMap tile_map[2][kWarps];
  __shared__ Found tile_value[2][kWarps];
  const int lane = threadIdx.x % 32, warp = kWarps == 1 ? 0 : threadIdx.x / 32;
  const int64_t slot = kWarps == 1 ? int64_t(blockIdx.x) * 4 + threadIdx.x / 32 : int64_t(blockIdx.x);
  if (slot >= slots) return;
  const Chunk c = chunk_of(t, slot);
  if (c.count == 0 || (kMeasure && c.count == 1)) return;
  double carry, following;
  start_of(t, c, found ? found + slot : nullptr, &carry, &following);
  if (kMeasure)
    carry = 0;
  else
    for (int64_t i = c.index; i > 0; --i) carry = fold(maps[slot - i], carry);
  double all_a = 1;
  const bool forward = t.kind == ScanKind::carry, look_back = t.values && t.mask && !t.next_values;
  const int64_t size = c.end - c.begin;
  for (int64_t base = 0, turn = 0; base < size; base += kWarps * kTile, turn ^= 1) {
    const int64_t u = base + warp * kTile + lane * kItems;  // of the lane's first token, counted along the walk
    const auto at = [&](int64_t k) { return forward ? c.begin + k : c.end - 1 - k; };
    double v[kItems] = {}, reward[kItems] = {};
    bool counts[kItems];
    bool has = false;
    double latest = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      counts[k] = u + k < size && (!t.mask || t.mask[at(u + k)]);
      if (!counts[k]) continue;
      reward[k] = to_double(t.rewards[at(u + k)]);
      if (t.values) v[k] = to_double(t.values[at(u + k)]);
      has = true;
      latest = v[k];
    }
    double next = following;
    if (look_back) {  // the nearest value that counts, from this tile, the tiles before, or the chunks before
      double last;
      next = last_below(has, latest, 0, &last);
      const bool some_below = (__ballot_sync(kFull, has) & ((1u << lane) - 1)) != 0;
      const bool some = __ballot_sync(kFull, has) != 0;
      if (kWarps > 1) {
        if (lane == 0) tile_value[turn][warp] = {last, some};
        __syncthreads();
      }
      double before = following;
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp && !some_below) next = before;
        const Found other = kWarps > 1 ? tile_value[turn][w] : Found{last, some};
        if (other.has) before = other.value;
      }
      following = before;
    } else if (t.values && u > 0 && u < size) {
      next = to_double(t.values[at(u - 1)]);
    }
    Token token[kItems];
    ScanMap mine{0, 1};
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (counts[k]) {
        token[k] = token_at(t, at(u + k), reward[k], v[k], next);
        next = v[k];
      }
      mine = after(token[k].map, mine);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const ScanMap other{__shfl_up_sync(kFull, mine.x, step), __shfl_up_sync(kFull, mine.a, step)};
      if (lane >= step) mine = after(mine, other);
    }
    const ScanMap all{__shfl_sync(kFull, mine.x, 31), __shfl_sync(kFull, mine.a, 31)};
    const ScanMap below{__shfl_up_sync(kFull, mine.x, 1), __shfl_up_sync(kFull, mine.a, 1)};
    if (kWarps > 1) {
      if (lane == 0) tile_map[turn][warp] = all;
      __syncthreads();
    }
    double y = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) y = lane > 0 ? fold(below, carry) : carry;
      const ScanMap m = kWarps > 1 ? tile_map[turn][w] : all;
      carry = fold(m, carry);
      all_a = m.a == 0 ? 0. : m.a * all_a;
    }
    if (kMeasure) continue;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const double before = y;
      y = fold(token[k].map, y);
      if (u + k >= size) continue;
      using Out = typename Args<T>::Out;
      t.first[at(u + k)] = Out(first_of(t, token[k], before, y));
      if (t.kind == ScanKind::advantages) t.second[at(u + k)] = token[k].counts ? Out(y + v[k]) : Out(0);
    }
  }
  if (lane != 0 || warp != 0) return;
  if (kMeasure) maps[slot] = {carry, all_a};
  if (!kMeasure && forward && c.index == c.count - 1) t.second[c.row] = typename Args<T>::Out(carry);
}

// Rows of up to kShort tokens, one per thread; they pass through shared memory, so that memory is read in order.
template <class T>
__global__ void __launch_bounds__(kShortThreads) walk_short(const __grid_constant__ Args<T> t) {
  using Out = typename Args<T>::Out;
  __shared__ Out first[kShortThreads * (kShort + 1)], second[kShortThreads * (kShort + 1)];
  const int length = int(t.length), pitch = length + 1;
  const int64_t row = int64_t(blockIdx.x) * kShortThreads + threadIdx.x, begin = row / kShortThreads * kShortThreads;
  const int64_t origin = int64_t(blockIdx.x) * kShortThreads * length;
  const int64_t left = t.rows - begin, tokens = (left < kShortThreads ? left : kShortThreads) * length;
  for (int i = threadIdx.x; i < tokens; i += kShortThreads) {
    const int place = i / length * pitch + i % length;
    first[place] = Out(to_double(t.rewards[origin + i]));
    if (t.values) second[place] = Out(to_double(t.values[origin + i]));
  }
  __syncthreads();
  if (row < t.rows) {
    double y = 0, following = t.last_values ? to_double(t.last_values[row]) : 0.;
    if (t.kind == ScanKind::returns) y = following;
    bool fresh = t.kind == ScanKind::returns && t.next_values;  // still to take its start from next_values
    for (int done = 0; done < length; ++done) {
      const int k = t.kind == ScanKind::carry ? done : length - 1 - done, place = threadIdx.x * pitch + k;
      const int64_t i = row * length + k;
      const bool counts = !t.mask || t.mask[i];
      Token token;
      const double before = y, v = t.values ? double(second[place]) : 0.;
      if (counts) {
        if (fresh) y = to_double(t.next_values[i]);
        fresh = false;
        token = token_at(t, i, double(first[place]), v, following);
        y = fold(token.map, y);
        following = v;
      }
      first[place] = Out(first_of(t, token, before, y));
      if (t.kind == ScanKind::advantages) second[place] = counts ? Out(y + v) : Out(0);
    }
    if (t.kind == ScanKind::carry) t.second[row] = Out(y);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens; i += kShortThreads) {
    const int place = i / length * pitch + i % length;
    t.first[origin + i] = first[place];
    if (t.kind == ScanKind::advantages) t.second[origin + i] = second[place];
  }
}

int64_t chunks_of(int64_t length) { return length > 0 ? (length + kScanChunk - 1) / kScanChunk : 1; }
int64_t slots_of(const ScanTask& t) {
  return t.offsets ? t.tokens / kScanChunk + t.rows : t.rows * chunks_of(t.length);
}

template <class T>
void run(const ScanTask& s, void* memory, void* stream) {
  using Out = typename Args<T>::Out;
  const auto in = [](const void* p) { return static_cast<const T*>(p); };
  const Args<T> t{s.kind,
                  in(s.rewards),
                  in(s.values),
                  in(s.next_values),
                  in(s.last_values),
                  in(s.ratios),
                  s.terminated,
                  s.truncated,
                  s.mask,
                  s.offsets,
                  s.rows,
                  s.length,
                  s.tokens,
                  chunks_of(s.length),
                  s.gamma,
                  s.lam,
                  s.rho_clip,
                  s.c_clip,
                  static_cast<Out*>(s.first),
                  static_cast<Out*>(s.second)};
  if (!s.offsets && s.length <= kShort) {
    launch(walk_short<T>, blocks((s.rows + kShortThreads - 1) / kShortThreads), kShortThreads, 0, stream, t);
    return;
  }
  const int64_t slots = slots_of(s);
  ScanMap* maps = static_cast<ScanMap*>(memory);
  Found* found = reinterpret_cast<Found*>(maps + slots);
  const bool several = s.offsets ? s.tokens > kScanChunk : s.length > kScanChunk;  // chunks in a row, perhaps
  const bool search = s.mask && (s.kind == ScanKind::returns && s.next_values ? true : several && s.values);
  const unsigned by_warp = blocks((slots + 3) / 4), by_block = blocks(slots);
  if (search) launch(find<T>, by_warp, 128, 0, stream, t, found, slots);
  // Several warps per chunk where the rows are long enough for them; the bits are the same.
  const bool wide = s.tokens / slots > 4 * kTile;
  if (several) {
    if (wide)
      launch(walk<T, 4, true>, by_block, 128, 0, stream, t, maps, search ? found : nullptr, slots);
    else
      launch(walk<T, 1, true>, by_warp, 128, 0, stream, t, maps, search ? found : nullptr, slots);
  }
  if (wide)
    launch(walk<T, 4, false>, by_block, 128, 0, stream, t, maps, search ? found : nullptr, slots);
  else
    launch(walk<T, 1, false>, by_warp, 128, 0, stream, t, maps, search ? found : nullptr, slots);
}

}  // namespace

int64_t cuda::scan_workspace(const ScanTask& t) { return slots_of(t) * int64_t(sizeof(ScanMap) + sizeof(Found)); }

void cuda::scan(const ScanTask& t, void* workspace, void* stream) {
  if (t.rows == 0) return;
  with_device_type(t.element, [&](auto type) { run<decltype(type)>(t, workspace, stream); });
}

}  // namespace gradops
