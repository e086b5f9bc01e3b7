// SPDX-License-Identifier: Apache-2.0
// The head of the teacher's law: its most probable tokens, up to a mass.
#pragma once

#include "divergence_summands.cuh"
#include "laws.cuh"

namespace opd {
namespace cuda {

// The least log p whose {log p >= it} has mass of at most head_mass; the largest log p if that
// alone has more; -inf if every token fits. A radix select by mass, four bits of log p at a time:
// exact, and tied tokens stay together. Each thread has bins of its own, so that nothing depends on
// the order of threads. for_entries(fn) calls fn(entries, count) for the columns of this thread.
template <class ForEntries>
__device__ float head_threshold(double head_mass, const SharedRow& shared,
                                ForEntries&& for_entries) {
  constexpr int kBits = 4;
  static_assert(kBins == 1 << kBits, "a bin for each digit");
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  uint32_t prefix = 0;
  double above = 0.0;
  for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
    unsigned seen = 0;
    for (int bin = 0; bin < kBins; ++bin) shared.lanes[bin * threads + thread] = 0.0f;
    for_entries([&](const Entry<float>(&e)[kVector], int count) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const uint32_t bits = static_cast<uint32_t>(ordered_bits(e[i].lp));
        // in two shifts: a shift by all 32 bits is not defined
        const bool in_reach = (bits >> shift >> kBits) == prefix;
        if (i >= count || !in_reach) continue;
        const int bin = static_cast<int>(bits >> shift) & (kBins - 1);
        shared.lanes[bin * threads + thread] += e[i].p;
        seen |= 1u << bin;
      }
    });
    double mass[kBins];
#pragma unroll
    for (int bin = 0; bin < kBins; ++bin) {
      mass[bin] = reduce_block(static_cast<double>(shared.lanes[bin * threads + thread]),
                               shared.scratch, 0.0, Sum());
    }
    seen = reduce_block(seen, reinterpret_cast<unsigned*>(shared.scratch), 0u, BitOr());
    int digit = -1;
    bool exceeds = false;
#pragma unroll
    for (int bin = kBins - 1; bin >= 0; --bin) {
      if (exceeds || !(seen >> bin & 1)) continue;
      digit = bin;
      exceeds = above + mass[bin] > head_mass;
      above += exceeds ? 0.0 : mass[bin];
    }
    // every token fits, or the row is NaN
    if (!exceeds) return -kInfinity;
    prefix = prefix << kBits | static_cast<uint32_t>(digit);
  }
  const float boundary = value_of(prefix, 0.0f);
  // the boundary's own tokens do not fit, unless there is nothing above them
  return above > 0.0 ? ::nextafterf(boundary, kInfinity) : boundary;
}

}  // namespace cuda
}  // namespace opd
