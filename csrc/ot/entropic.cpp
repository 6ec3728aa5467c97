#include "ot/entropic.h"

#include <cmath>
#include <initializer_list>
#include <limits>

#include "common/kept_memory.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "ot/relaxation.h"

namespace gradops {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kSameSum = 1e-5;  // relative: weights rounded to float do not sum alike
constexpr int64_t kStrip = 256;    // columns of one call of entropic_columns
// Below this error float sums no longer tell how far the plan is from its marginals.
constexpr double kFloatError = 1e-6;
// It may be that already at a larger one: if kPatience plain steps do not reduce it, or near the end a run of stretched
// ones.
constexpr double kStuckError = 1e-3;
constexpr int kPatience = 8;
constexpr int64_t kChunks = 64;  // at most
// Scalings beyond 2^kReach have the kernel made again: float must hold their products with its entries.
constexpr double kReach = 40;
// Entries of a kernel that is kept. From one that is larger than the caches, threads that share the memory would not
// get entries faster than they can make them.
constexpr int64_t kKept = 1 << 24;

int64_t kernel_size(const EntropicTask& t) { return entropic_stride(t.n) * entropic_stride(t.m); }
int64_t kernel_bytes(const EntropicTask& t) { return kernel_size(t) <= kKept ? 8 * kernel_size(t) : 0; }

struct LargeMemory {  // with no page faults in the next call
  int64_t size = 0;
  void* const memory;
  explicit LargeMemory(int64_t bytes) : memory(bytes > 0 ? take_kept_memory(bytes, size) : nullptr) {}
  LargeMemory(const LargeMemory&) = delete;
  ~LargeMemory() {
    if (memory) give_kept_memory(memory, size);
  }
};

// Sums over columns are made per chunk of rows and then added in order, so they do not depend on the number of threads.
int64_t chunk_rows(const EntropicTask& t) {
  const int64_t work = 65536 / (t.m > 0 ? t.m : 1) + 1, even = (t.n + kChunks - 1) / kChunks,
                rows = work > even ? work : even;
  return (rows + kEntropicStep - 1) / kEntropicStep * kEntropicStep;
}
int64_t chunks_of(const EntropicTask& t) { return (t.n + chunk_rows(t) - 1) / chunk_rows(t); }

struct Memory {  // of one problem
  double *sums, *scaled, *partial, *partial_scaled, *top, *y, *h, *b, *rows, *x, *points;
  EntropicBase base;
  Memory(const EntropicTask& t, double* p) {
    const int64_t m = entropic_stride(t.m), n = entropic_stride(t.n), chunks = chunks_of(t);
    for (double** vector : {&sums, &scaled, &top, &y, &h, &b, &base.g}) *vector = p, p += m;
    for (double** vector : {&rows, &x, &base.f}) *vector = p, p += n;
    partial = p, p += chunks * m;
    partial_scaled = p, p += chunks * m;
    base.v = p, p += m;
    base.g_high = reinterpret_cast<float*>(p), base.g_low = base.g_high + m;
    points = p + m;
  }
  static int64_t doubles(const EntropicTask& t) {
    return (9 + 2 * chunks_of(t)) * entropic_stride(t.m) + 3 * entropic_stride(t.n) +
           (t.matrix ? 0 : entropic_stride(t.d * t.m));
  }
};

struct Kernels {
  decltype(GRADOPS_DISPATCH(entropic_pass)) pass = GRADOPS_DISPATCH(entropic_pass);
  decltype(GRADOPS_DISPATCH(entropic_columns)) columns = GRADOPS_DISPATCH(entropic_columns);
  decltype(GRADOPS_DISPATCH(entropic_step)) step = GRADOPS_DISPATCH(entropic_step);
  decltype(GRADOPS_DISPATCH(entropic_base)) base = GRADOPS_DISPATCH(entropic_base);
  decltype(GRADOPS_DISPATCH(entropic_measure)) measure = GRADOPS_DISPATCH(entropic_measure);
  decltype(GRADOPS_DISPATCH(entropic_gap)) gap = GRADOPS_DISPATCH(entropic_gap);
};

class Solver {
 public:
  // kernel: kernel_bytes(task) bytes; scratch: entropic_scratch() of them, or null for one of every thread's
  Solver(const EntropicTask& task, int64_t index, double* memory, void* kernel, void* scratch, const Kernels& kernels)
      : task_(task), memory_(task, memory), kernel_(kernel), scratch_(scratch), run_(kernels) {
    const int64_t size = element_size(task.element), n = task.n, m = task.m, d = task.d;
    const auto part = [&](const void* p, int64_t count) {
      return p ? static_cast<const char*>(p) + index * count * size : nullptr;
    };
    item_.cost = {part(task.matrix, n * m), part(task.x, n * d), part(task.y, m * d), task.element, n, m, d};
    item_.rows = task.n_len ? within(task.n_len[index], n) : n;
    item_.columns = task.m_len ? within(task.m_len[index], m) : m;
    item_.scale = 1 / (task.reg * kLn2);
    item_.a = task.a + index * n, item_.b = task.b + index * m;
    item_.f = task.alpha + index * n, item_.g = task.beta + index * m;
    alpha0_ = task.alpha0 ? task.alpha0 + index * n : nullptr;
    report_ = task.report + index * kEntropicReport;
    size_ = chunk_rows(task), chunks_ = (item_.rows + size_ - 1) / size_;
  }

  void run() {
    for (int64_t i = item_.rows; i < task_.n; ++i) item_.f[i] = -kInfinity;
    for (int64_t j = item_.columns; j < task_.m; ++j) item_.g[j] = -kInfinity;
    mass_ = 0;
    double other = 0;
    for (int64_t i = 0; i < item_.rows; ++i) mass_ += weight(item_.a[i]);
    for (int64_t j = 0; j < item_.columns; ++j) other += weight(item_.b[j]);
    if (!(std::isfinite(mass_) && std::fabs(mass_ - other) <= kSameSum * mass_)) return fail(EntropicStatus::invalid);
    for (int64_t j = 0; j < item_.columns; ++j) memory_.b[j] = other > 0 ? item_.b[j] * (mass_ / other) : 0;
    item_.b = memory_.b;
    if (mass_ == 0) {
      for (int64_t i = 0; i < item_.rows; ++i) item_.f[i] = -kInfinity;
      for (int64_t j = 0; j < item_.columns; ++j) item_.g[j] = -kInfinity;
      return report(0, 0, 0, 0, EntropicStatus::converged);
    }
    start();
    const int64_t iterations = status_ == EntropicStatus::converged ? iterate() : 0;
    if (status_ != EntropicStatus::converged) return fail(status_);
    certify(iterations);
  }

 private:
  static double weight(double w) { return w >= 0 ? w : kNan; }
  static int64_t within(int64_t length, int64_t size) { return length < 0 ? 0 : length < size ? length : size; }

  template <class F>
  void each(int64_t count, const F& f) const {  // f(k, scratch)
    const auto range = [&](int64_t begin, int64_t end) {
      void* scratch = scratch_ ? scratch_ : thread_scratch(entropic_scratch(task_.m));
      for (int64_t k = begin; k < end; ++k) f(k, scratch);
    };
    if (!scratch_) return parallel_for(0, count, 1, range);
    range(0, count);
  }
  // f(chunk, first row, end row, scratch)
  template <class F>
  void each_chunk(const F& f) const {
    each(chunks_, [&](int64_t k, void* scratch) {
      f(k, k * size_, k * size_ + size_ < item_.rows ? k * size_ + size_ : item_.rows, scratch);
    });
  }
  template <class T>
  T* partial_of(T* partial, int64_t chunk) const {
    return partial + chunk * entropic_stride(task_.m);
  }
  void add_chunks(const double* partial, double* sums) const {
    for (int64_t j = 0; j < item_.columns; ++j) sums[j] = 0;
    for (int64_t k = 0; k < chunks_; ++k)
      for (int64_t j = 0; j < item_.columns; ++j) sums[j] += partial_of(partial, k)[j];
  }

  template <class Real>
  void transpose_points() const {
    Real* to = reinterpret_cast<Real*>(memory_.points);
    for (int64_t j = 0; j < item_.columns; ++j)
      for (int64_t k = 0; k < task_.d; ++k)
        to[k * item_.columns + j] = Real(stored_number(item_.cost.element, item_.cost.y, j * task_.d + k));
  }
  void use(bool in_double) {
    pass_ = {&item_, &memory_.base, kernel_, in_double, true, 1};
    item_.y_transposed = memory_.points;
    if (!task_.matrix) in_double ? transpose_points<double>() : transpose_points<float>();
  }

  // Columns whose sums are not trusted, from scratch. What they had in the base no longer holds.
  void mend_columns() {
    const bool was_double = pass_.in_double;
    const auto doubtful = [&](int64_t j) { return item_.b[j] != 0 && !(memory_.sums[j] >= 0); };
    use(true);
    each((item_.columns + kStrip - 1) / kStrip, [&](int64_t k, void* scratch) {
      const int64_t begin = k * kStrip, end = begin + kStrip < item_.columns ? begin + kStrip : item_.columns;
      bool any = false;
      for (int64_t j = begin; j < end; ++j) any |= doubtful(j);
      double powers[kStrip];
      if (any) run_.columns(item_, begin, end, scratch, memory_.top + begin, powers);
      for (int64_t j = begin; j < end; ++j)
        if (doubtful(j)) item_.g[j] = std::log2(item_.b[j]) - memory_.top[j] - std::log2(powers[j - begin]);
    });
    for (int64_t j = 0; j < item_.columns; ++j)
      if (doubtful(j) && !std::isfinite(item_.g[j]))
        status_ = memory_.top[j] == -kInfinity ? EntropicStatus::infeasible : EntropicStatus::invalid;
    use(was_double);
  }

  void start() {
    use(false);
    for (int64_t i = 0; i < item_.rows; ++i)
      item_.f[i] = item_.a[i] == 0 ? -kInfinity : alpha0_ ? alpha0_[i] * item_.scale : kNan;
    for (int64_t j = 0; j < item_.columns; ++j) item_.g[j] = item_.b[j] == 0 ? -kInfinity : 0, memory_.sums[j] = -1;
    if (alpha0_) mend_columns();
  }

  int64_t iterate() {
    Relaxation relaxation;
    double best = kInfinity, span = 0;
    int stale = 0;
    bool settled = false;  // the potentials are from a plain step in double
    for (int64_t k = 1; k <= task_.max_iter; ++k) {
      pass_.omega = relaxation.omega;
      if (pass_.fresh) run_.base(item_, pass_.in_double, span, memory_.base);
      double weight, error = pass(span, weight);
      if (status_ != EntropicStatus::converged) return k;
      const EntropicStep step = run_.step(pass_, weight, memory_.sums);
      const bool off_grid = !pass_.in_double && span > memory_.base.grid * 0x1p23;
      pass_.fresh = !kernel_ || off_grid || !(step.drift <= kReach);
      if (step.doubtful > 0) mend_columns();
      // Plain steps never raise the error, so the potentials that they have led to are as good as those measured.
      if (status_ != EntropicStatus::converged || (settled && pass_.omega == 1 && error <= task_.tol)) return k;
      settled = pass_.in_double && pass_.omega == 1;
      relaxation.observe(error, step.error / mass_);
      if (pass_.omega > 1) error += step.error / mass_;
      if ((pass_.in_double && error <= task_.tol) || k + 1 >= task_.max_iter) relaxation.stop();  // the last is plain
      stale = error < best ? 0 : stale + 1;
      best = error < best ? error : best;
      const bool stuck = pass_.omega > 1 ? relaxation.failed && error < kStuckError : stale >= kPatience;
      if (!pass_.in_double && (error <= std::fmax(task_.tol, kFloatError) || stuck)) use(true);
    }
    return task_.max_iter;
  }

  // Over all rows; returns the error of the row sums before their step.
  double pass(double& span, double& weight) {
    EntropicOutcome outcome[kChunks];
    each_chunk([&](int64_t c, int64_t begin, int64_t end, void* scratch) {
      outcome[c] = run_.pass(pass_, begin, end, scratch, partial_of(memory_.partial, c));
    });
    double error = 0;
    span = weight = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      error += outcome[c].error / mass_;
      weight += outcome[c].weight;
      span = outcome[c].span > span ? outcome[c].span : span;
      if (outcome[c].infeasible) status_ = EntropicStatus::infeasible;
    }
    if (!std::isfinite(error)) status_ = EntropicStatus::invalid;
    add_chunks(memory_.partial, memory_.sums);
    return error;
  }

  void center() const {  // what is added to all f and taken from all g changes nothing
    double sum = 0, count = 0;
    for (int64_t i = 0; i < item_.rows; ++i)
      if (item_.a[i] != 0) sum += item_.f[i], ++count;
    for (int64_t i = 0; i < item_.rows; ++i) item_.f[i] -= sum / count;
    for (int64_t j = 0; j < item_.columns; ++j) item_.g[j] += sum / count;
  }

  void certify(int64_t iterations) {
    const Memory& w = memory_;
    EntropicKept kept{static_cast<double*>(kernel_), nullptr};
    if (kernel_ && pass_.in_double && !pass_.fresh) {  // what the potentials say is there already, but for factors
      kept.v = static_cast<const double*>(w.base.v);
      for (int64_t i = 0; i < item_.rows; ++i)
        w.x[i] = item_.a[i] == 0 ? 0 : item_.a[i] * std::exp2(item_.f[i] - w.base.f[i]);
    }
    use(true);
    center();
    each_chunk([&](int64_t c, int64_t begin, int64_t end, void* scratch) {
      run_.measure(item_, kept, begin, end, scratch, w.rows, w.x, partial_of(w.partial, c),
                   partial_of(w.partial_scaled, c));
    });
    add_chunks(w.partial, w.sums);
    add_chunks(w.partial_scaled, w.scaled);
    double error = 0, total = 0, missing = mass_, dual = 0;
    for (int64_t i = 0; i < item_.rows; ++i) {
      error += std::fabs(w.rows[i] - item_.a[i]);
      total += w.rows[i];
      if (item_.a[i] != 0) dual += item_.f[i] * item_.a[i];
    }
    for (int64_t j = 0; j < item_.columns; ++j) {
      error += std::fabs(w.sums[j] - item_.b[j]);
      if (item_.b[j] != 0) dual += item_.g[j] * item_.b[j];
      w.y[j] = w.scaled[j] > item_.b[j] ? item_.b[j] / w.scaled[j] : 1;
      missing -= w.scaled[j] * w.y[j];
      w.h[j] = std::fmax(item_.b[j] - w.scaled[j] * w.y[j], 0.);
    }
    double parts[kChunks], gap = 0;
    each_chunk([&](int64_t c, int64_t begin, int64_t end, void* scratch) {
      parts[c] = run_.gap(item_, kept, {w.x, w.y, w.h, missing}, begin, end, scratch);
    });
    for (int64_t c = 0; c < chunks_; ++c) gap += parts[c];
    error /= mass_;
    for (int64_t i = 0; i < item_.rows; ++i) item_.f[i] /= item_.scale;
    for (int64_t j = 0; j < item_.columns; ++j) item_.g[j] /= item_.scale;
    report(dual / item_.scale - task_.reg * total, gap / mass_, error, double(iterations),
           error <= task_.tol     ? EntropicStatus::converged
           : std::isfinite(error) ? EntropicStatus::iteration_limit
                                  : EntropicStatus::invalid);
  }

  void report(double dual, double gap, double error, double iterations, EntropicStatus status) const {
    const double values[] = {dual, gap, error, iterations, double(int(status))};
    for (int64_t k = 0; k < kEntropicReport; ++k) report_[k] = values[k];
  }
  void fail(EntropicStatus status) const {
    for (int64_t i = 0; i < item_.rows; ++i) item_.f[i] = kNan;
    for (int64_t j = 0; j < item_.columns; ++j) item_.g[j] = kNan;
    report(kNan, kNan, kNan, 0, status);
  }

  const EntropicTask& task_;
  Memory memory_;
  void *const kernel_, *const scratch_;
  const Kernels& run_;
  EntropicItem item_;
  EntropicPass pass_;
  const double* alpha0_;
  double *report_, mass_ = 0;
  int64_t size_, chunks_;
  EntropicStatus status_ = EntropicStatus::converged;  // or what stopped the iterations
};

// Small problems run one per thread, large ones one after the other on all threads.
bool side_by_side(const EntropicTask& t) { return t.batch > 1 && kernel_size(t) <= 1 << 18; }
bool large_kernel(const EntropicTask& t) { return kernel_bytes(t) >= 8 << 20; }

}  // namespace

int64_t cpu::entropic_workspace(const EntropicTask& t) {
  if (side_by_side(t)) return 8 * Memory::doubles(t) * t.batch;
  return 8 * Memory::doubles(t) + (large_kernel(t) ? 0 : kernel_bytes(t));
}

void cpu::entropic(const EntropicTask& t, void* workspace, void*) {
  const Kernels kernels;
  double* memory = static_cast<double*>(workspace);
  if (!side_by_side(t)) {
    const LargeMemory large(large_kernel(t) ? kernel_bytes(t) : 0);
    void* kernel = large_kernel(t) || kernel_bytes(t) == 0 ? large.memory : memory + Memory::doubles(t);
    for (int64_t k = 0; k < t.batch; ++k) Solver(t, k, memory, kernel, nullptr, kernels).run();
    return;
  }
  parallel_for(0, t.batch, 1, [&](int64_t begin, int64_t end) {
    char* scratch = thread_scratch(entropic_scratch(t.m) + kernel_bytes(t));
    void* kernel = scratch + entropic_scratch(t.m);
    for (int64_t k = begin; k < end; ++k) Solver(t, k, memory + k * Memory::doubles(t), kernel, scratch, kernels).run();
  });
}

}  // namespace gradops
