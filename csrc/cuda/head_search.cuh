// SPDX-License-Identifier: Apache-2.0
// Where the head of a law ends: the least log p whose {log p >= it} has mass of at most head_mass;
// the largest log p if that alone has more; -inf if every token fits. A search by mass over the
// orders of log p, a range of them cut into bins at a time: exact, and tied tokens stay together.
// Masses are whole numbers, so that their sums have no order and those of a bin are the same when
// it is cut once more.
#pragma once

#include "topk_select.cuh"

namespace opd {
namespace cuda {

// A mass in units of 2^-62: exact for every float32 from 2^-38 on. A law's sum stays below 2^63.
__device__ __forceinline__ uint64_t whole_mass(float mass) {
  return static_cast<uint64_t>(mass * 4611686018427387904.0f);
}
__device__ __forceinline__ uint64_t whole_mass(double mass) {
  return static_cast<uint64_t>(mass * 4611686018427387904.0);
}

// What is searched next.
struct HeadRange {
  uint32_t first, last;  // orders of log p
  int shift;             // from an order beyond the first to its bin; negative: the search is over
  float threshold;       // ... and this is what it found
};

// Logits below it have a log p = factor * logit - lse below the range, whichever way it is rounded:
// most of a row is left out by a comparison.
__device__ __forceinline__ float least_logit(const HeadRange& range, float factor, float lse) {
  const float log_p = value_at(range.first);
  const float margin = 1e-5f * (1.0f + ::fabsf(log_p) + ::fabsf(lse));
  return (log_p - margin + lse) / factor;
}

template <int kBinBits>
class HeadSearch {
 public:
  // `largest`: the largest log p, of a token of mass `alone`; or more than it, and 0.
  __device__ HeadSearch(double head_mass, float largest, float alone, int64_t vocab_size)
      : room_(whole_mass(head_mass)) {
    const bool is_defined = largest > kMinusInfinity;
    if (!is_defined || whole_mass(alone) > room_) {
      end(is_defined ? largest : kMinusInfinity);
      return;
    }
    // all tokens below this one together have less than may be left out, but for rounding
    const double share = (1.0 - head_mass) / static_cast<double>(vocab_size);
    const float low = static_cast<float>(::log(share) - 1e-3);
    range(order_of(low < largest ? low : largest), order_of(largest));
  }

  __device__ const HeadRange& range() const { return range_; }
  __device__ bool is_over() const { return range_.shift < 0; }
  // The mass that the head may still take from the range.
  __device__ uint64_t room() const { return room_; }

  // `bin`: the first of the range, from the last on, that the head has no room for, and `mass` of
  // those above it; or -1 and the mass of all, if there is none.
  __device__ void narrow(int bin, uint64_t mass) {
    room_ -= mass;
    is_empty_ = is_empty_ && mass == 0;
    const uint32_t first = range_.first;
    if (bin < 0) {
      // what is below the range, of hardly any mass
      if (first <= bottom()) return end(kMinusInfinity);
      return range(bottom(), first - 1);
    }
    const uint32_t from = first + (static_cast<uint32_t>(bin) << range_.shift);
    if (range_.shift > 0) {
      return range(from, Min()(range_.last, from + (1u << range_.shift) - 1));
    }
    // tokens that do not fit, unless there is nothing above them
    const float boundary = value_at(from);
    end(is_empty_ ? boundary : ::nextafterf(boundary, -kMinusInfinity));
  }

 private:
  __device__ static uint32_t bottom() { return order_of(kMinusInfinity); }
  __device__ void range(uint32_t first, uint32_t last) {
    range_ = {first, last, 0, 0.0f};
    while (((last - first) >> range_.shift) >> kBinBits != 0) ++range_.shift;
  }
  __device__ void end(float threshold) { range_ = {0, 0, -1, threshold}; }

  HeadRange range_;
  uint64_t room_;
  bool is_empty_ = true;  // the head, so far
};

// Masses of bins in shared memory, in two words each: atomics of a word are one instruction, those
// of two are a loop.
struct MassBins {
  uint32_t* low;
  uint32_t* high;

  __device__ __forceinline__ void add(uint32_t bin, uint64_t mass) const {
    const uint32_t part = static_cast<uint32_t>(mass);
    const uint32_t sum = atomicAdd(low + bin, part) + part;
    const uint32_t more = static_cast<uint32_t>(mass >> 32) + (sum < part ? 1u : 0u);
    if (more != 0) atomicAdd(high + bin, more);
  }
  __device__ __forceinline__ uint64_t at(int bin) const {
    return static_cast<uint64_t>(high[bin]) << 32 | low[bin];
  }
};

// A lane's way to the bins. Masses of one bin that follow each other go there together: a row of
// equal logits would have all lanes wait for one word.
class LaneMasses {
 public:
  __device__ LaneMasses(const MassBins& bins, const HeadRange& range) : bins_(bins), range_(range) {}

  __device__ const HeadRange& range() const { return range_; }

  // probability() is that of a token in range
  template <class Probability>
  __device__ __forceinline__ void add(float log_p, Probability&& probability) {
    // the order of a NaN is above or below that of all numbers
    const uint32_t beyond = order_of(log_p) - range_.first;
    if (beyond > range_.last - range_.first) return;
    const uint32_t bin = beyond >> range_.shift;
    if (bin != bin_) {
      flush();
      bin_ = bin;
    }
    mass_ += whole_mass(probability());
  }
  __device__ __forceinline__ void flush() {
    if (mass_ != 0) bins_.add(bin_, mass_);
    mass_ = 0;
  }

 private:
  MassBins bins_;
  HeadRange range_;
  uint32_t bin_ = 0;
  uint64_t mass_ = 0;
};

}  // namespace cuda
}  // namespace opd
