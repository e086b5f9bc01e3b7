// SPDX-License-Identifier: Apache-2.0
// The best of (value, id) pairs in a block's shared memory. A pair is one 64-bit key, and the order
// of keys is that of the pairs: the larger value first, of equal values (-0 == +0) the smaller id. No
// two keys are equal, so the best few are the same in whatever order the threads have written them.
#pragma once

#include "opd/math.h"
#include "reduce.cuh"

namespace opd {
namespace cuda {

// Increases with the value; -0 and +0 are one.
__device__ __forceinline__ uint32_t order_of(float value) {
  const uint32_t bits = static_cast<uint32_t>(detail::float_to_bits(value + 0.0f));
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float value_at(uint32_t order) {
  const uint32_t bits = order ^ (order >> 31 ? 0x80000000u : 0xffffffffu);
  return detail::bits_to_float(static_cast<int32_t>(bits));
}

// The largest value that is less than the one at `order`, which is not the smallest. -0 is not.
__device__ __forceinline__ float value_below(uint32_t order) {
  constexpr uint32_t kZero = 0x80000000u;
  return value_at(order == kZero ? order - 2 : order - 1);
}

__device__ __forceinline__ uint64_t key_of(float value, int id) {
  return static_cast<uint64_t>(order_of(value)) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ float value_of(uint64_t key) {
  return value_at(static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ int id_of(uint64_t key) {
  return static_cast<int>(~static_cast<uint32_t>(key));
}

// The sum over a block of kThreads, with one barrier: calls in a row take turns with two places.
template <int kThreads>
__device__ __forceinline__ unsigned sum_in_turn(unsigned value, unsigned turn, unsigned* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  unsigned* const sums = scratch + (turn & 1) * kWarps;
  value = __reduce_add_sync(kAllLanes, value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  unsigned sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

struct Bound {
  uint64_t key;
  unsigned count;  // of the keys that are at least as large
};

// A key that at least `wanted` of the block's keys reach; and at most `most`, unless keys are equal.
// All `count` keys are in [lowest, highest]; count_from(key): how many of this thread's reach it.
// `scratch`: two words per warp that nobody has used since the last barrier.
template <int kThreads, class CountFrom>
__device__ __forceinline__ Bound find_bound(uint64_t lowest, uint64_t highest, unsigned count,
                                            unsigned wanted, unsigned most, unsigned* scratch,
                                            CountFrom&& count_from) {
  uint64_t low = lowest, high = highest + 1;  // of a value, hence not the largest there is
  for (unsigned turn = 0; count > most && high - low > 1; ++turn) {
    const uint64_t middle = low + (high - low) / 2;
    const unsigned reach = sum_in_turn<kThreads>(count_from(middle), turn, scratch);
    if (reach >= wanted) {
      low = middle;
      count = reach;
    } else {
      high = middle;
    }
  }
  return {low, count};
}

}  // namespace cuda
}  // namespace opd
