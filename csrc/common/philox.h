// philox.h: random numbers that are a function of a key and a counter, so that no order of work changes them.
// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace gradops {
namespace {

struct Philox {
  uint32_t word[4];
};

GRADOPS_BOTH inline Philox philox(uint64_t key, uint64_t counter) {
  Philox x{{uint32_t(counter), uint32_t(counter >> 32), 0, 0}};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * x.word[0], b = uint64_t(0xCD9E8D57u) * x.word[2];
    x = Philox{{uint32_t(b >> 32) ^ x.word[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ x.word[3] ^ k1, uint32_t(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x;
}

// The i-th number of the key's stream: 52 random bits, strictly between 0 and 1.
GRADOPS_BOTH inline double philox_uniform(uint64_t key, int64_t i) {
  const Philox x = philox(key, uint64_t(i) / 2);
  const uint32_t high = x.word[i % 2 * 2], low = x.word[i % 2 * 2 + 1];
  return (double(high >> 6) * 0x1p26 + double(low >> 6) + 0.5) * 0x1p-52;
}

}  // namespace
}  // namespace gradops
