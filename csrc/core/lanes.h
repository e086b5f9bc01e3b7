// SPDX-License-Identifier: Apache-2.0
// Which of kLanes values are above a threshold, as bits: few are, and the rest is not looked at.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "rows.h"

namespace opd {

// Bit i: values[i] > threshold, of kLanes values. A NaN is above nothing.
inline uint32_t lanes_above(const float* values, float threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(threshold), _CMP_GT_OQ);
#elif defined(__AVX2__)
  const __m256 least = _mm256_set1_ps(threshold);
  const auto half = [&](const float* from) {
    return static_cast<uint32_t>(
        _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(from), least, _CMP_GT_OQ)));
  };
  return half(values) | half(values + 8) << 8;
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t{values[lane] > threshold} << lane;
  return bits;
#endif
}

inline uint32_t lanes_above(const double* values, double threshold) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t{values[lane] > threshold} << lane;
  return bits;
}

}  // namespace opd
