// A thread per column and slice of the rows, 32 columns by 8 slices to a block, so that rows of a matrix are read as
// they lie. A thread keeps a list of the entries that can matter so far; a list that is full is cut to its max_nz
// largest. The lists of a column are then joined, in the order of the rows, and finished as on the CPU.
//
// Row sums are made of whole numbers, multiples of 2^-61 of the mass: these add up to the same bits in any order.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "ot/column_projection.h"
#include "ot/semidual.h"

namespace gradops {
namespace {

constexpr int kColumns = 32, kSlices = 8, kThreads = kColumns * kSlices, kAhead = 4;
constexpr double kInfinity = __builtin_inf();
using Whole = unsigned long long;

struct Lists {  // of an item's columns: kSlices lists of `capacity` for each
  double *value, *omega, *scale;
  int32_t* row;
  Whole* mass;  // of the rows
  int64_t capacity;

  static int64_t capacity_of(const SemidualTask& t) {
    const int64_t rows = (t.n + kSlices - 1) / kSlices, wanted = t.max_nz < t.n ? 2 * t.max_nz + 32 : rows;
    return wanted < rows ? wanted : rows;
  }
  static int64_t bytes(const SemidualTask& t) {
    const int64_t entries = t.batch * t.m * kSlices * capacity_of(t);
    return 12 * entries + 8 * t.batch * (t.m + t.n + 1);
  }
  Lists(const SemidualTask& t, void* memory) : capacity(capacity_of(t)) {
    const int64_t entries = t.batch * t.m * kSlices * capacity;
    value = static_cast<double*>(memory);
    omega = value + entries;
    scale = omega + t.batch * t.m;
    mass = reinterpret_cast<Whole*>(scale + t.batch);
    row = reinterpret_cast<int32_t*>(mass + t.batch * t.n);
  }
};

// The scale of an item's row sums; NaN where weights or alpha are no good. One block per item.
__global__ void __launch_bounds__(kThreads)
    prepare(const __grid_constant__ SemidualTask t, const __grid_constant__ Lists l) {
  __shared__ double scratch[32];
  const int64_t item = blockIdx.x;
  double total = 0;
  for (int64_t j = threadIdx.x; j < t.m; j += kThreads) {
    const double b = t.b[item * t.m + j];
    total += b >= 0 && b < kInfinity ? b : __builtin_nan("");
  }
  for (int64_t i = threadIdx.x; i < t.n; i += kThreads) {
    const double a = t.a[item * t.n + i], alpha = t.alpha[item * t.n + i];
    if (!(a >= 0 && a < kInfinity && alpha - alpha == 0)) total = __builtin_nan("");
    l.mass[item * t.n + i] = 0;
  }
  total = block_all(total, 0., scratch, Add());
  int exponent = 0;
  if (total > 0) frexp(total, &exponent);
  if (threadIdx.x == 0) l.scale[item] = total == total ? ldexp(1., 61 - exponent) : __builtin_nan("");
}

// A bound from an earlier call's entries; see warm_bounds in semidual.kernel.cpp.
__device__ double warm_bound(const SemidualTask& t, int64_t item, int64_t j, double scaled) {
  const int64_t column = item * t.m + j, most = t.warm_width < t.max_nz ? t.warm_width : t.max_nz;
  const int64_t* rows = t.warm_index + column * t.warm_width;
  const auto gain = [&](int64_t r) {
    return t.warm_tau[column] + t.reg * t.warm_weight[column * t.warm_width + r] +
           (t.alpha[item * t.n + rows[r]] - t.warm_alpha[item * t.n + rows[r]]);
  };
  double largest = -kInfinity, least = kInfinity;
  int64_t count = 0;
  for (; count < most && rows[count] >= 0 && rows[count] < t.n; ++count) {
    if (count > 0 && rows[count] <= rows[count - 1]) break;  // distinct rows
    const double x = gain(count);
    largest = x > largest ? x : largest;
    least = x < least ? x : least;
  }
  double tau = -scaled;
  int64_t before = -1;
  for (int turn = 0; turn < 4; ++turn) {
    double sum = 0;
    int64_t size = 0;
    for (int64_t r = 0; r < count; ++r) {
      const double y = gain(r) - largest;
      if (y > tau) sum += y, ++size;
    }
    const double higher = (sum - scaled) / double(size);
    tau = higher > tau ? higher : tau;
    if (size == before) break;
    before = size;
  }
  double low = largest + tau - scaled * 0x1p-48;
  if (count == t.max_nz && least > low) low = least;
  low -= (fabs(t.warm_tau[column]) + fabs(low)) * 0x1p-48 + 0x1p-1000;
  return low > -kInfinity && low < kInfinity ? low : -kInfinity;
}

template <class T, bool kPoints>
__global__ void __launch_bounds__(kThreads)
    columns(const __grid_constant__ SemidualTask t, const __grid_constant__ Lists l, int64_t tiles,
            int64_t size_of_number) {
  __shared__ double lows[kColumns];
  __shared__ int32_t counts[kSlices][kColumns];
  __shared__ int bad[kColumns], pending;
  const int lane = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int64_t item = blockIdx.x / tiles, j = blockIdx.x % tiles * kColumns + lane, column = item * t.m + j;
  const bool mine = j < t.m;
  const Cost cost = cost_of(t, item, size_of_number);
  const double* alpha = t.alpha + item * t.n;
  const int64_t rows = (t.n + kSlices - 1) / kSlices, begin = slice * rows,
                end = begin + rows < t.n ? begin + rows : t.n;
  double* first_value = l.value + column * kSlices * l.capacity;  // of the column
  int32_t* first_row = l.row + column * kSlices * l.capacity;
  double* value = first_value + slice * l.capacity;
  int32_t* row = first_row + slice * l.capacity;
  const double mass = mine ? t.b[column] : 0, scaled = t.reg * mass;
  if (slice == 0) {
    lows[lane] = mine && t.warm_index ? warm_bound(t, item, j, scaled) : -kInfinity;
    bad[lane] = 0;
  }
  // A second pass only where the bound of the first was too high: costs or reg are not those of the earlier call.
  for (bool again = true; again;) {
    __syncthreads();
    double low = lows[lane];
    int32_t count = 0;
    bool good = true;
    const auto take = [&](double x, int64_t i) {
      if (x <= low) return;
      good &= x < kInfinity;
      value[count] = x;
      row[count++] = int32_t(i);
      if (x - scaled > low) low = x - scaled;  // no entry takes more than all the mass
      if (count == l.capacity && i + 1 < end) {
        if (!good) {
          count = 0;  // the column is lost
        } else if (count > t.max_nz) {
          const double least = keep_largest(value, row, count, t.max_nz);
          low = least > low ? least : low;
          count = int32_t(t.max_nz);
        }
      }
    };
    if (mine && low < kInfinity) {
      int64_t i = begin;
      if constexpr (!kPoints) {
        const T* c = static_cast<const T*>(cost.matrix) + j;
        for (; i + kAhead <= end; i += kAhead) {  // several loads are under way
          double ahead[kAhead];
#pragma unroll
          for (int u = 0; u < kAhead; ++u) ahead[u] = alpha[i + u] - to_double(c[(i + u) * t.m]);
#pragma unroll
          for (int u = 0; u < kAhead; ++u) take(ahead[u], i + u);
        }
      }
      for (; i < end; ++i) take(alpha[i] - cost_at(cost, i, j), i);
    }
    counts[slice][lane] = count;
    if (!good) atomicOr(&bad[lane], 1);
    if (threadIdx.x == 0) pending = 0;
    __syncthreads();
    if (slice == 0 && mine && lows[lane] < kInfinity) {
      int64_t all = count;
      for (int s = 1; s < kSlices; ++s)
        for (int32_t r = 0; r < counts[s][lane]; ++r, ++all) {
          first_value[all] = first_value[s * l.capacity + r];
          first_row[all] = first_row[s * l.capacity + r];
        }
      ProjectedColumn p{0, __builtin_nan(""), 0, __builtin_nan("")};
      if (!bad[lane]) p = project_column(first_value, first_row, all, t.max_nz, t.reg, mass);
      if (!bad[lane] && !(p.tau >= lows[lane] || p.smallest > lows[lane])) {
        const double bound = p.tau > p.smallest ? p.tau : p.smallest;
        lows[lane] = bound - (fabs(bound) * 0x1p-50 + 0x1p-1000);
        atomicOr(&pending, 1);
      } else {
        lows[lane] = kInfinity;
        if (p.kept > t.width) p.value = __builtin_nan("");
        const double scale = l.scale[item];
        for (int64_t r = 0; r < t.width; ++r) {
          const bool used = r < p.kept;
          t.index[column * t.width + r] = used ? first_row[r] : 0;
          t.weight[column * t.width + r] = p.value != p.value ? p.value : used ? first_value[r] : 0;
          if (used && scale == scale && p.value == p.value)
            atomicAdd(&l.mass[item * t.n + first_row[r]], Whole(first_value[r] * scale));
        }
        t.kept[column] = p.kept;
        t.tau[column] = p.tau;
        l.omega[column] = p.value;
      }
    }
    __syncthreads();
    again = pending;
  }
}

// value and grad of an item; NaN where a column is.
__global__ void __launch_bounds__(kThreads)
    finish(const __grid_constant__ SemidualTask t, const __grid_constant__ Lists l) {
  __shared__ double scratch[32];
  const int64_t item = blockIdx.x;
  double value = 0;
  for (int64_t i = threadIdx.x; i < t.n; i += kThreads) value += t.alpha[item * t.n + i] * t.a[item * t.n + i];
  for (int64_t j = threadIdx.x; j < t.m; j += kThreads) value -= l.omega[item * t.m + j];
  value = block_all(value, 0., scratch, Add());
  const double scale = l.scale[item];
  if (scale != scale) value = scale;
  for (int64_t i = threadIdx.x; i < t.n; i += kThreads)
    t.grad[item * t.n + i] = value != value ? value : t.a[item * t.n + i] - double(l.mass[item * t.n + i]) / scale;
  if (threadIdx.x == 0) t.value[item] = value;
}

}  // namespace

int64_t cuda::semidual_workspace(const SemidualTask& t) { return Lists::bytes(t); }

void cuda::semidual(const SemidualTask& t, void* workspace, void* stream) {
  const Lists lists(t, workspace);
  const int64_t tiles = (t.m + kColumns - 1) / kColumns;
  launch(prepare, blocks(t.batch), kThreads, 0, stream, t, lists);
  if (tiles > 0) {
    const auto run = [&](auto kernel) {
      launch(kernel, blocks(t.batch * tiles), kThreads, 0, stream, t, lists, tiles, element_size(t.element));
    };
    if (t.matrix)
      with_device_type(t.element, [&](auto type) { run(columns<decltype(type), false>); });
    else
      run(columns<double, true>);  // the type of points is looked up at run time
  }
  launch(finish, blocks(t.batch), kThreads, 0, stream, t, lists);
}

}  // namespace gradops
