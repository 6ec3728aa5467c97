// group_sums.h: moments of groups of at most 128 floats, one group per lane, by sums that no order changes.
// For *.kernel.cpp only: everything is local to the file that includes it.
//
// A group's sums of d = x - low and of (zero + d)^2 give its moments. All terms of a sum are put into one binade, by
// adding what the group's range alone decides; that rounds them to a grid, 2^-49 of the range or finer, and makes them
// integers in the last bits, which are summed. What is lost when the second sum becomes that of (d - mean)^2 is at most
// 6 + log2(n) bits more.
#pragma once
#include "rl/lanes.h"

namespace gradops::GRADOPS_ISA {
namespace {

typedef Vec<uint64_t> Bits;  // sums of them may wrap
[[gnu::always_inline]] inline Bits bits(Lanes x) { return reinterpret_cast<const Bits&>(x.v); }

struct GridSums {
  Lanes low, grain, zero, shift, wide;
  Bits first = {}, second = {}, any = {};
  GridSums(Lanes low, Lanes high) : low(low) {
    // Two floats differ by 2^-25 of either or more, so equal ones alone have the grain of `little`: fine enough for
    // zero - low to be exact where low is the larger one.
    const Lanes little = low * 0x1p-26;
    grain = 2. * above(larger(high - low, larger(little, -little)));
    zero = 1.0625 * grain, shift = zero - low, wide = grain * grain;
  }
  // d = x - low < grain / 2, so zero + d is in [grain, 2 grain), and its square + wide in [2 wide, 4 wide).
  [[gnu::always_inline]] void add(Lanes x) {
    const Lanes t = x + shift;
    first += bits(t), second += bits(t * t + wide), any |= bits(t);
  }
  [[gnu::always_inline]] void add(Lanes x, Mask in) {
    const Lanes t = x + shift;
    const Bits m = reinterpret_cast<const Bits&>(in.m);
    first += bits(t) & m, second += bits(t * t + wide) & m, any |= bits(t) & m;
  }
  static Lanes total(Bits sum, Lanes least, Lanes count, Lanes unit) {
    const Bits n = __builtin_convertvector(count.v, Bits), units = sum - n * bits(least);
    return Lanes(__builtin_convertvector(reinterpret_cast<const Vec<int64_t>&>(units), Vec<double>)) * unit;
  }
  // m2 is NaN where an item is not finite.
  void finish(Lanes count, Lanes& mean, Lanes& m2) const {
    const Lanes sum = total(first, zero, count, grain * 0x1p-52);
    const Lanes squares = total(second, zero * zero + wide, count, wide * 0x1p-51) - 2. * zero * sum;  // of d
    // No finite term changes the grain's exponent.
    const Lanes poison = select({(any ^ bits(grain)) >> 52 == 0}, 0., __builtin_nan(""));
    mean = sum / count, m2 = squares - sum * mean + poison;
  }
};

}  // namespace
}  // namespace gradops::GRADOPS_ISA
