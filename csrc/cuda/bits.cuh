// SPDX-License-Identifier: Apache-2.0
// The bits of a word.
#pragma once

#include <cstdint>

#include "launch.h"

namespace opd {
namespace cuda {

__device__ __forceinline__ int count_bits(uint32_t word) {
#if defined(OPD_EMULATED)
  return __builtin_popcount(word);
#else
  return __popc(word);
#endif
}

// Of a word that is not 0.
__device__ __forceinline__ int lowest_bit(uint32_t word) {
#if defined(OPD_EMULATED)
  return __builtin_ctz(word);
#else
  return __ffs(word) - 1;
#endif
}

}  // namespace cuda
}  // namespace opd
