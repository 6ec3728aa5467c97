// value_error.h: what is wrong with a value that only a kernel sees. std::invalid_argument becomes ValueError in
// Python.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace gradops {

[[noreturn]] inline void refuse_value(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(name + " must " + expected + ", got " + got);
}
[[noreturn]] inline void refuse_value(const std::string& name, const std::string& expected, int64_t got) {
  refuse_value(name, expected, std::to_string(got));
}

// Numbers of rows, tokens, groups: ids[0 .. n) in [low, high).
inline void check_ids(const char* name, const int64_t* ids, int64_t n, int64_t high, int64_t low = 0) {
  bool good = true;
  for (int64_t i = 0; i < n; ++i) good &= ids[i] >= low && ids[i] < high;
  for (int64_t i = 0; !good && i < n; ++i)
    if (ids[i] < low || ids[i] >= high)
      refuse_value(name, low ? "be below " + std::to_string(high) : "be in [0, " + std::to_string(high) + ")", ids[i]);
}

// Where pieces begin, and the last one ends: offsets[0 .. pieces] rise from 0 to end, each by at least `least`.
inline void check_offsets(const char* name, const int64_t* offsets, int64_t pieces, int64_t end, int64_t least = 0) {
  const auto rises = [=](int64_t i) {  // no difference overflows
    return offsets[i - 1] <= offsets[i] && uint64_t(offsets[i]) - uint64_t(offsets[i - 1]) >= uint64_t(least);
  };
  bool good = offsets[0] == 0 && offsets[pieces] == end;
  for (int64_t i = 1; i <= pieces; ++i) good &= rises(i);
  if (good) return;
  int64_t i = 0;
  while (i < pieces && (i == 0 ? offsets[0] == 0 : rises(i)) && offsets[i] <= end) ++i;
  refuse_value(name, "rise from 0 to " + std::to_string(end) + (least > 0 ? ", and no piece may be empty" : ""),
               std::to_string(offsets[i]) + " at index " + std::to_string(i));
}

}  // namespace gradops
