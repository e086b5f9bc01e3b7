// SPDX-License-Identifier: Apache-2.0
// Discounted sums along a line of numbers, by a whole block and in float64, in an order that
// follows from the length of the line alone.
#pragma once

#include <limits>

#include "reduce.cuh"

namespace opd {
namespace cuda {

constexpr int kScanThreads = 128;

// consecutive elements that a thread adds up by itself, and the elements of a block
constexpr int kItems = 4, kTile = kScanThreads * kItems;
// discount^(2^j) for j < kPowers, up to that of a tile
constexpr int kPowers = 10, kWarpPower = 7;
static_assert(kTile == 1 << (kPowers - 1) && kWarp * kItems == 1 << kWarpPower, "powers of two");

__device__ __forceinline__ double* shared_doubles() {
  return reinterpret_cast<double*>(shared_memory());
}

// factor * x, where a factor that has underflowed does not turn an infinity into NaN
__device__ __forceinline__ double scaled(double factor, double x) {
  return factor == 0.0 && fabs(x) == std::numeric_limits<double>::infinity() ? x : factor * x;
}

// discount^(kItems * n) for n < kScanThreads
__device__ __forceinline__ double power_of_items(const double (&powers)[kPowers], int n) {
  double power = 1.0;
#pragma unroll
  for (int j = 2; j < kPowers - 1; ++j) {
    if (n >> (j - 2) & 1) power *= powers[j];
  }
  return power;
}

// emit(m, sum_k d^k load(m - k), 0 <= k <= m, discount^m) for each m < count, where d is the
// discount, or 1; load(m, discount^m). Every thread of the block calls it, and no emit comes before
// the block's earlier ones are done.
template <bool kDiscounted, class Load, class Emit>
__device__ __forceinline__ void scan_line(int64_t count, const double (&powers)[kPowers],
                                          Load&& load, Emit&& emit) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double* const totals = shared_doubles();
  const auto aged = [&](int power, double sum) {
    return kDiscounted ? scaled(powers[power], sum) : sum;
  };
  const double lane_factor = kDiscounted ? power_of_items(powers, lane) : 1.0;
  double first_factor = power_of_items(powers, threadIdx.x);
  double carry = 0.0;  // the scan at the end of the last tile
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const int64_t first = tile + threadIdx.x * kItems;
    double sums[kItems], factor = first_factor;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sums[i] = first + i < count ? load(first + i, factor) : 0.0;
      factor *= powers[0];
    }
#pragma unroll
    for (int i = 1; i < kItems; ++i) sums[i] += aged(0, sums[i - 1]);
    double total = sums[kItems - 1];
#pragma unroll
    for (int j = 0; 1 << j < kWarp; ++j) {
      const double other = __shfl_up_sync(kAllLanes, total, 1u << j);
      if (lane >= 1 << j) total += aged(2 + j, other);
    }
    double before = __shfl_up_sync(kAllLanes, total, 1u);
    if (lane == 0) before = 0.0;
    if (lane == kWarp - 1) totals[warp] = total;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kScanThreads / kWarp; ++w) {
      if (w == warp) before += scaled(lane_factor, carry);
      carry = totals[w] + aged(kWarpPower, carry);
    }
    __syncthreads();
    factor = first_factor;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      before = aged(0, before);
      if (first + i < count) emit(first + i, sums[i] + before, factor);
      factor *= powers[0];
    }
    first_factor *= powers[kPowers - 1];
  }
}

// The same over at most `window` terms, window < count, in time that does not depend on the window
// and without a subtraction: csrc/core/segment_scan.cpp says how. `tails` has room for `window`
// sums.
template <class Load, class Emit>
__device__ __forceinline__ void scan_window(int64_t count, int64_t window,
                                            const double (&powers)[kPowers], double* tails,
                                            Load&& load, Emit&& emit) {
  for (int64_t block = 0; block < count; block += window) {
    if (block > 0) {
      scan_line<false>(
          window - 1, powers,
          [&](int64_t m, double factor) { return scaled(factor, load(block - 1 - m)); },
          [&](int64_t m, double sum, double) { tails[window - 1 - m] = sum; });
    }
    const int64_t rest = count - block;
    scan_line<true>(
        rest < window ? rest : window, powers, [&](int64_t m, double) { return load(block + m); },
        [&](int64_t m, double sum, double factor) {
          const bool has_tail = block > 0 && m + 1 < window;
          emit(block + m, has_tail ? sum + scaled(factor * powers[0], tails[m + 1]) : sum);
        });
  }
}

}  // namespace cuda
}  // namespace opd
