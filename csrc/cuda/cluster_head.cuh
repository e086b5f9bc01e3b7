// SPDX-License-Identifier: Apache-2.0
// The bins in which the blocks of a cluster search for the head of the teacher's law, and the warp
// of each that reads them. Part of divergence_cluster.cuh.
//
// The warps that hold the row add its masses to their own block's bins; then one warp of each
// block reads those of all, first in groups, and all of them find the same. Two sets of bins
// take turns: a block may fill one while others read the other. A block signals that its bins
// are full after it has read those of the pass before, so when all have, these are free.
//
// By the machine code for sm_90a a sweep takes 2.75 issue slots for a column whose logit is too
// small, and about 30 for one in range, 15 more where its bin is another than that before. At 4.0
// TB/s an H200 has 88 for each column of two float32 rows and a float32 gradient, 73 with a 16-bit
// one.
#pragma once

namespace opd {
namespace cuda {

using ClusterHeadSearch = HeadSearch<kClusterHeadBits>;

struct HeadBins {
  static constexpr int kBins = 1 << kClusterHeadBits;
  static_assert(kBins == kWarp * kWarp, "a lane for each group, then for each bin of one");
  uint64_t groups[kWarp];
  uint32_t low[kBins], high[kBins];

  __device__ MassBins masses() { return {low, high}; }
  // by one warp
  __device__ void clear(int lane) {
    for (int bin = lane; bin < kBins; bin += kWarp) low[bin] = high[bin] = 0;
  }
  // of its bins, to groups
  __device__ void add_up(int lane) {
    uint64_t sum = 0;
    // each lane from elsewhere: the groups lie a multiple of the banks apart
    for (int i = 0; i < kWarp; ++i) sum += masses().at(lane * kWarp + ((i + lane) & (kWarp - 1)));
    groups[lane] = sum;
    __syncwarp();
  }
};
static_assert(2 * sizeof(HeadBins) == kClusterHeadBytes, "tuning.h must leave room for two sets");

// Of 32 masses, the lanes' own in descending order: the first that `room` has no place for beside
// those above it, whose mass goes to *above; -1 and the mass of all, if there is none.
__device__ inline int first_beyond(uint64_t own, uint64_t room, uint64_t* above) {
  const uint64_t upto = sum_to_lane(own);
  const unsigned beyond = __ballot_sync(kAllLanes, upto > room);
  const int lane = beyond == 0 ? kWarp - 1 : lowest_bit(beyond);
  *above = __shfl_sync(kAllLanes, beyond == 0 ? upto : upto - own, lane);
  return beyond == 0 ? -1 : lane;
}

// The same of the bins of all blocks, which are added up, by the warp of each block. All reads of
// the others are under way at once, and each block begins with its own.
__device__ inline int find_bin(HeadBins* bins, int own_rank, int cluster, uint64_t room, int lane,
                               uint64_t* above) {
  const int from_last = kWarp - 1 - lane;
  uint64_t own = 0;
#pragma unroll
  for (int i = 0; i < kMaxClusterBlocks; ++i) {
    const int rank = (own_rank + i) & (cluster - 1);
    if (i < cluster) own += *in_block(&bins->groups[from_last], rank);
  }
  const int group = first_beyond(own, room, above);
  if (group < 0) return -1;
  const int first = (kWarp - 1 - group) * kWarp;
  own = 0;
#pragma unroll
  for (int i = 0; i < kMaxClusterBlocks; ++i) {
    if (i >= cluster) continue;
    const int rank = (own_rank + i) & (cluster - 1);
    const uint64_t high = *in_block(&bins->high[first + from_last], rank);
    own += high << 32 | *in_block(&bins->low[first + from_last], rank);
  }
  uint64_t within;
  const int place = first_beyond(own, room - *above, &within);
  *above += within;
  return first + kWarp - 1 - place;
}

}  // namespace cuda
}  // namespace opd
