// SPDX-License-Identifier: Apache-2.0
// Where top-k and top-p cut a row, found by one block: the order of the float at which enough entries
// or enough mass is reached from the largest on, eleven bits at a time in shared memory. Tiles whose
// largest entry cannot be kept are not read. Counts and masses are integers, so that their sums have
// no order.
#pragma once

#include "row_tiles.cuh"
#include "topk_select.cuh"

namespace opd {
namespace cuda {

constexpr int kCutThreads = 512, kCutWarps = kCutThreads / kWarp;

// What is known of one tile of a row; the sum is relative to its own largest logit.
struct TileSums {
  double sum;
  float largest;
  int32_t argmax;
  uint32_t before;  // entries that come before the row's id
};

template <bool kGeneral>
class Cut {
  static constexpr int kBinBits = 11, kBins = 1 << kBinBits, kBinsOfThread = kBins / kCutThreads;
  // of shared memory: masses and counts of the bins, and what threads tell each other
  struct Bins {
    uint64_t masses[kBins];
    uint64_t totals[2 * kCutWarps];
    uint64_t found[5];
    double scratch[kWarp];
    unsigned counts[kBins];
    unsigned reached[2 * kCutWarps];
  };

 public:
  static constexpr int kSharedBytes = sizeof(Bins);

  // Entries from one order up: how many, and their mass.
  struct Kept {
    uint32_t order;
    uint64_t count, mass;
  };

  __device__ __forceinline__ Cut(const SideRow<kGeneral>& row, const TileSums* tiles,
                                 int vocab_size, float largest)
      : row_(row),
        tiles_(tiles),
        vocab_size_(vocab_size),
        num_tiles_((vocab_size + kTileColumns - 1) / kTileColumns),
        largest_(largest),
        bins_(reinterpret_cast<Bins*>(shared_memory())) {
    int bits = 0;  // of vocab_size, so that no sum of masses exceeds 2^62
    while (vocab_size >> bits != 0) ++bits;
    one_ = static_cast<float>(uint64_t{1} << (62 - bits));
  }

  // sum e^(z - largest) over z >= floor; every thread gets it.
  __device__ __forceinline__ double sum_from(float floor) const {
    double sum = 0.0;
    for_each(floor, [&](float z) { sum += static_cast<double>(share_of(z)); });
    return reduce_block(sum, bins_->scratch, 0.0, Sum());
  }

  // The floor of the top_k largest entries, and among those of the fewest whose mass reaches top_p
  // of theirs. `sum`: of the row, relative to its largest.
  __device__ __forceinline__ float floor_of(int top_k, double top_p, double sum) {
    Kept kept{order_of(kMinusInfinity), static_cast<uint64_t>(vocab_size_),
              static_cast<uint64_t>(sum * static_cast<double>(one_))};
    if (top_k > 0) kept = reach<false>(order_of(low_of(top_k)), static_cast<uint64_t>(top_k));
    if (top_p < 1.0) {
      // all entries below this one together have less than may be left out
      const double mass = static_cast<double>(kept.mass);
      const double share =
          (1.0 - top_p) * mass / static_cast<double>(kept.count) / static_cast<double>(one_);
      const float low = static_cast<float>(static_cast<double>(largest_) + ::log(share) - 1e-3);
      const uint32_t first = low < largest_ ? order_of(low) : order_of(largest_);
      const uint64_t wanted = static_cast<uint64_t>(::ceil(top_p * mass));
      kept = reach<true>(Max()(first, kept.order), Max()(wanted, uint64_t{1}));
    }
    return value_at(kept.order);
  }

 private:
  __device__ __forceinline__ float share_of(float z) const {
    return detail::exp2_device((z - largest_) * kLog2E);
  }

  // fn(z) for this thread's entries that are not below `bottom`.
  template <class Fn>
  __device__ __forceinline__ void for_each(float bottom, Fn&& fn) const {
    for (int tile = static_cast<int>(threadIdx.x) / kWarp; tile < num_tiles_; tile += kCutWarps) {
      if (!(tiles_[tile].largest >= bottom)) continue;
      float z[kTileVectors][kVector];
      load_tile(row_, vocab_size_, tile, 0, z);
#pragma unroll
      for (int k = 0; k < kTileVectors; ++k) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (z[k][i] >= bottom) fn(z[k][i]);
        }
      }
    }
  }

  // A logit that at least `wanted` entries reach: that many tiles have one.
  __device__ __forceinline__ float low_of(int wanted) {
    if (wanted > num_tiles_) return kMinusInfinity;
    uint64_t lowest = ~uint64_t{0}, highest = 0;
    for (int tile = threadIdx.x; tile < num_tiles_; tile += kCutThreads) {
      const uint64_t order = order_of(tiles_[tile].largest);
      lowest = Min()(lowest, order);
      highest = Max()(highest, order);
    }
    uint64_t* const exchange = reinterpret_cast<uint64_t*>(bins_->scratch);
    lowest = reduce_block(lowest, exchange, ~uint64_t{0}, Min());
    highest = reduce_block(highest, exchange, uint64_t{0}, Max());
    const unsigned least = static_cast<unsigned>(wanted);
    const Bound bound = find_bound<kCutThreads>(
        lowest, highest, static_cast<unsigned>(num_tiles_), least, least + least / 8,
        bins_->reached, [&](uint64_t order) {
          unsigned reach = 0;
          for (int tile = threadIdx.x; tile < num_tiles_; tile += kCutThreads) {
            reach += order_of(tiles_[tile].largest) >= order;
          }
          return reach;
        });
    return value_at(static_cast<uint32_t>(bound.key));
  }

  // The largest order at which the entries from there up are `wanted` or have as much mass. Those
  // from `first` on do, but for rounding; then it is the lowest of them that has any.
  template <bool kByMass>
  __device__ __forceinline__ Kept reach(uint32_t first, uint64_t wanted) {
    uint32_t last = order_of(largest_);
    uint64_t count = 0, mass = 0;  // of what lies above `last`
    while (true) {
      int shift = 0;
      while (((last - first) >> shift) >> kBinBits != 0) ++shift;
      __syncthreads();
      for (int bin = threadIdx.x; bin < kBins; bin += kCutThreads) {
        bins_->masses[bin] = 0;
        bins_->counts[bin] = 0;
      }
      __syncthreads();
      for_each(value_at(first), [&](float z) {
        const uint32_t order = order_of(z);
        if (order > last) return;
        const uint32_t bin = (order - first) >> shift;
        atomicAdd(&bins_->counts[bin], 1u);
        add(&bins_->masses[bin], static_cast<uint64_t>(share_of(z) * one_));
      });
      __syncthreads();
      pick<kByMass>(wanted - (kByMass ? mass : count));
      const uint64_t* const found = bins_->found;
      first += static_cast<uint32_t>(found[0]) << shift;
      count += found[1], mass += found[2];
      if (shift == 0) return {first, count + found[3], mass + found[4]};
      last = Min()(last, first + (1u << shift) - 1);
    }
  }

  __device__ __forceinline__ static void add(uint64_t* to, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  }

  // found[]: the bin at which `need`, or all there is, is reached from the last bin on; count and
  // mass of the bins above it; its own. A thread has kBinsOfThread of them. Ends with a barrier.
  template <bool kByMass>
  __device__ __forceinline__ void pick(uint64_t need) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    uint64_t count = 0, mass = 0;
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i) {
      const int bin = kBins - 1 - (thread * kBinsOfThread + i);
      count += bins_->counts[bin];
      mass += bins_->masses[bin];
    }
    uint64_t count_to = sum_to_lane(count), mass_to = sum_to_lane(mass);
    if (lane == kWarp - 1) {
      bins_->totals[2 * warp] = count_to;
      bins_->totals[2 * warp + 1] = mass_to;
    }
    __syncthreads();
    uint64_t all = 0;
    for (int w = 0; w < kCutWarps; ++w) {
      if (w < warp) count_to += bins_->totals[2 * w], mass_to += bins_->totals[2 * w + 1];
      all += bins_->totals[2 * w + kByMass];
    }
    need = Min()(need, all);
    uint64_t above = count_to - count, mass_above = mass_to - mass;
    const uint64_t before = kByMass ? mass_above : above, upto = kByMass ? mass_to : count_to;
    if (before < need && need <= upto) {
      for (int i = 0; i < kBinsOfThread; ++i) {
        const int bin = kBins - 1 - (thread * kBinsOfThread + i);
        const uint64_t here = bins_->counts[bin], mass_here = bins_->masses[bin];
        if ((kByMass ? mass_above + mass_here : above + here) >= need) {
          uint64_t* const found = bins_->found;
          found[0] = static_cast<uint64_t>(bin);
          found[1] = above, found[2] = mass_above, found[3] = here, found[4] = mass_here;
          break;
        }
        above += here, mass_above += mass_here;
      }
    }
    __syncthreads();
  }

  const SideRow<kGeneral>& row_;
  const TileSums* tiles_;
  const int vocab_size_, num_tiles_;
  const float largest_;
  float one_;  // the mass of the largest entry
  Bins* const bins_;
};

}  // namespace cuda
}  // namespace opd
