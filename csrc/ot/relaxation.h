// relaxation.h: how far Sinkhorn's steps may be stretched. Near the solution an iteration shrinks the error by some
// factor lambda < 1; steps omega = 2 / (1 + sqrt(1 - lambda)) times as long shrink it by omega - 1, which takes about
// the square root of the number of iterations (Young's theory of successive over-relaxation; for Sinkhorn: Thibault,
// Chizat, Dossal and Papadakis 2021, Lehmann et al. 2022). lambda is measured, first at omega = 1; far from the
// solution stretched steps may fail, so they are taken back when they do not pay.
#pragma once
#include <cmath>

#include "ot/cost.h"

namespace gradops {
namespace {

struct Relaxation {
  double omega = 1;
  bool failed = false;  // the last step was the end of a run in which the error did not shrink

  // With the errors of rows and columns that an iteration at omega met.
  GRADOPS_SHARED void observe(double rows, double columns) {
    failed = false;
    omega == 1 ? plain(rows) : stretched(rows + columns);
  }
  GRADOPS_SHARED void stop() {  // back to exact column sums
    omega = 1, steady_ = 0, last_ = 0;
  }

 private:
  GRADOPS_SHARED static double best(double lambda) { return lambda < 1 ? 2 / (1 + std::sqrt(1 - lambda)) : 2; }
  GRADOPS_SHARED void begin(double to) {
    omega = to < limit_ ? to : limit_;
    count_ = 0, wait_ = int(1 / (2 - omega)) + 2, run_ = 3 * wait_;
  }
  GRADOPS_SHARED void plain(double error) {
    const double ratio = last_ > 0 ? error / last_ : 0;
    const bool alike = ratio < 1 && std::fabs(ratio - ratio_) < 0.1 * (1 - ratio);
    steady_ = alike ? steady_ + 1 : 0;
    last_ = error, ratio_ = ratio;
    if (steady_ >= 3 && ratio > 0.3) begin(best(ratio));
  }
  GRADOPS_SHARED void stretched(double error) {
    if (count_ == wait_) mark_ = error;
    if (count_++ < wait_ + run_) return;
    const double factor = std::pow(error / mark_, 1. / run_);
    if (!(factor < 1)) {
      failed = true;
      limit_ = (1 + omega) / 2;
      return stop();
    }
    // At an omega below the best one the error shrinks by a factor from which lambda follows.
    const double root = factor + omega - 1, lambda = root * root / (factor * omega * omega);
    const bool slow = std::log(factor) > 0.4 * std::log(omega - 1);
    begin(slow && best(lambda) > omega ? best(lambda) : omega);
  }

  double limit_ = 1.995, last_ = 0, ratio_ = 0, mark_ = 0;
  int steady_ = 0, count_ = 0, wait_ = 0, run_ = 0;
};

}  // namespace
}  // namespace gradops
