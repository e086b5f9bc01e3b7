// SPDX-License-Identifier: Apache-2.0
// The head of the teacher's law: its most probable tokens, up to a mass, found by one block.
#pragma once

#include "divergence_summands.cuh"
#include "head_search.cuh"

namespace opd {
namespace cuda {

using RowHeadSearch = HeadSearch<kHeadBinBits>;

// The bin that the search narrows to, -1 if there is none, and the mass that goes with it. Every
// thread calls it after a barrier and gets the result. `scratch`: 32 numbers of shared memory.
__device__ inline int find_bin(const MassBins& bins, uint64_t room, uint64_t* scratch,
                               uint64_t* mass) {
  constexpr int kFoundBin = kWarp - 1, kFoundMass = kWarp - 2;
  constexpr uint64_t kNone = ~uint64_t{0};
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  // of this thread, a power of two; those of thread 0 are the last
  const int count = kHeadBins / static_cast<int>(blockDim.x);
  const int first = kHeadBins - count * (thread + 1);
  uint64_t sum = 0;
  // each lane from elsewhere: their bins lie a multiple of the banks apart
  for (int i = 0; i < count; ++i) sum += bins.at(first + ((i + lane) & (count - 1)));
  uint64_t upto = sum_to_lane(sum);
  if (lane == kWarp - 1) scratch[warp] = upto;
  if (thread == 0) scratch[kFoundBin] = kNone;
  __syncthreads();
  uint64_t all = 0;
  for (int w = 0; w < warps; ++w) {
    upto += w < warp ? scratch[w] : 0;
    all += scratch[w];
  }
  uint64_t above = upto - sum;
  if (above <= room && room < upto) {
    int bin = first + count - 1;
    for (; above + bins.at(bin) <= room; --bin) above += bins.at(bin);
    scratch[kFoundBin] = static_cast<uint64_t>(bin);
    scratch[kFoundMass] = above;
  }
  __syncthreads();
  const bool none = scratch[kFoundBin] == kNone;
  *mass = none ? all : scratch[kFoundMass];
  return none ? -1 : static_cast<int>(scratch[kFoundBin]);
}

// for_each(lane masses) adds the columns of this thread to them, once for each time that it is
// called. The shared lanes are nobody's: a barrier has come before, and one comes after.
template <class ForEach>
__device__ float head_threshold(RowHeadSearch search, const SharedRow& shared, ForEach&& for_each) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(shared.lanes);
  const MassBins bins{words, words + kHeadBins};
  while (!search.is_over()) {
    for (int i = threadIdx.x; i < 2 * kHeadBins; i += blockDim.x) words[i] = 0;
    __syncthreads();
    LaneMasses lane(bins, search.range());
    for_each(lane);
    lane.flush();
    __syncthreads();
    uint64_t mass;
    const int bin =
        find_bin(bins, search.room(), reinterpret_cast<uint64_t*>(shared.scratch), &mass);
    search.narrow(bin, mass);
  }
  return search.range().threshold;
}

}  // namespace cuda
}  // namespace opd
