#include "curvature/scaled_dot_product_attention.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"

namespace gradops {
namespace {

// Where a gradient is summed: in the output itself, if its numbers are those sums are made of and its rows are vectors.
struct Sum {
  void* out;
  void* AttentionSums::* at;
  int64_t rows, columns;
};
struct Sums {
  Sum all[6];
  explicit Sums(const AttentionTask& t) {
    using S = AttentionSums;
    const int64_t queries = t.batch * t.heads * t.queries, keys = t.batch * t.key_heads * t.keys;
    const Sum sums[6] = {{t.dq, &S::dq, queries, t.d},      {t.dk, &S::dk, keys, t.d},
                         {t.dv_, &S::dv, keys, t.dv},       {t.dq_dot, &S::dq_dot, queries, t.d},
                         {t.dk_dot, &S::dk_dot, keys, t.d}, {t.dv_dot, &S::dv_dot, keys, t.dv}};
    std::copy(sums, sums + 6, all);
  }
};
int64_t width(Element e) { return e == Element::f64 ? 8 : 4; }
int64_t padded(Element e, int64_t columns) { return GRADOPS_DISPATCH(attention_padded)(e, columns); }
bool in_output(Element e, int64_t columns) {
  return (e == Element::f64 || e == Element::f32) && padded(e, columns) == columns;
}
int64_t bytes(Element e, const Sum& s) { return s.rows * padded(e, s.columns) * width(e); }

// Ranges are the longer the fewer tasks they need to leave for the threads; the shape alone decides, so that sums have
// one order.
int64_t range_rows(const AttentionTask& t) {
  const int64_t half = (std::max(t.queries, t.keys) + 1) / 2;
  return std::clamp<int64_t>((half + 63) / 64 * 64, 128, 512);
}

template <class Kernel>
void over_blocks(const AttentionTask& t, Kernel kernel) {
  const int64_t size = attention_query_block(t.element), blocks = (t.queries + size - 1) / size;
  parallel_for(0, t.batch * t.heads * blocks, 1, [&](int64_t begin, int64_t end) { kernel(t, begin, end); });
}

}  // namespace

int64_t cpu::attention_workspace(const AttentionTask& t) {
  int64_t total = 0;
  for (const Sum& s : Sums(t).all)
    if (s.out && !in_output(t.element, s.columns)) total += bytes(t.element, s);
  return total;
}

void cpu::attention_forward(const AttentionTask& t, void*, void*) {
  over_blocks(t, GRADOPS_DISPATCH(attention_forward_blocks));
}

void cpu::attention_jvp(const AttentionTask& t, void*, void*) {
  over_blocks(t, GRADOPS_DISPATCH(attention_jvp_blocks));
}

void cpu::attention_backward(const AttentionTask& t, void* workspace, void*) {
  const Sums outputs(t);
  AttentionSums sums{};
  char* next = static_cast<char*>(workspace);
  for (const Sum& s : outputs.all) {
    if (!s.out) continue;
    const int64_t size = bytes(t.element, s);
    const bool direct = in_output(t.element, s.columns);
    char* const memory = direct ? static_cast<char*>(s.out) : next;
    if (!direct) next += size;
    sums.*s.at = memory;
    parallel_for(0, size, 1 << 17, [&](int64_t b, int64_t e) { std::memset(memory + b, 0, size_t(e - b)); });
  }

  const int64_t rows = range_rows(t), of_queries = (t.queries + rows - 1) / rows, of_keys = (t.keys + rows - 1) / rows;
  const int64_t rounds = t.causal ? of_queries : of_keys == 0 ? 0 : std::max(of_queries, of_keys);
  for (int64_t k = 0; k < rounds; ++k) {
    AttentionRound round{rows, 0, of_queries, k, rounds};
    if (t.causal) {  // query range i meets key range i - k
      round.first = k, round.shift = -k, round.wrap = INT64_MAX;
      round.count = std::min(of_queries, of_keys + k) - k;
      if (round.count <= 0) continue;
    }
    parallel_for(0, t.batch * t.key_heads * round.count, 1,
                 [&, kernel = GRADOPS_DISPATCH(attention_backward_ranges)](int64_t b, int64_t e) {
                   kernel(t, sums, round, b, e);
                 });
  }

  for (const Sum& s : outputs.all)
    if (s.out && !in_output(t.element, s.columns))
      parallel_for(0, s.rows, 256, [&, kernel = GRADOPS_DISPATCH(attention_narrow)](int64_t b, int64_t e) {
        kernel(t.element, sums.*s.at, s.out, s.columns, b, e);
      });
}

}  // namespace gradops
