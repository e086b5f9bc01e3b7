// SPDX-License-Identifier: Apache-2.0
// What a thread has seen of a law: with m the largest logit, S = sum_v e^(z_v - m) and
// W = sum_v e^(z_v - m) (z_v - m), from which log-sum-exp and entropy follow.
#pragma once

#include "opd/math.h"
#include "reduce.cuh"

namespace opd {
namespace cuda {

// The largest logit, and the sums S and W relative to it.
struct Seen {
  float largest = kMinusInfinity, sum = 0.0f, weighted = 0.0f;

  // `other` is at least as large as `largest`
  __device__ __forceinline__ void move_to(float other) {
    const float distance = largest - other, decay = exp(distance);
    // -inf, of nothing seen yet, times a sum of 0
    weighted = decay == 0.0f ? 0.0f : decay * (weighted + sum * distance);
    sum *= decay;
    largest = other;
  }

  template <int N>
  __device__ __forceinline__ void add(const float (&logits)[N]) {
    float here = logits[0];  // fmaxf passes over a NaN, which shows in the sums
#pragma unroll
    for (int i = 1; i < N; ++i) here = fmaxf(here, logits[i]);
    if (here > largest) move_to(here);
    const float reference = largest == kMinusInfinity ? 0.0f : largest;
    float more = 0.0f, more_weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float distance = logits[i] - reference;
      const float decay = exp(distance);
      more += decay;
      more_weighted += decay == 0.0f ? 0.0f : decay * distance;
    }
    sum += more;
    weighted += more_weighted;
  }
};

// The same of a block's threads together, in float64.
struct SeenByAll {
  float largest;
  double sum, weighted;
};

// Every thread gets the result; `scratch` as in reduce_block.
__device__ __forceinline__ SeenByAll reduce_block(Seen seen, double* scratch) {
  const float largest =
      reduce_block(seen.largest, reinterpret_cast<float*>(scratch), kMinusInfinity, Max());
  if (largest != kMinusInfinity) seen.move_to(largest);
  const double sum = reduce_block(static_cast<double>(seen.sum), scratch, 0.0, Sum());
  const double weighted = reduce_block(static_cast<double>(seen.weighted), scratch, 0.0, Sum());
  return {largest, sum, weighted};
}

}  // namespace cuda
}  // namespace opd
