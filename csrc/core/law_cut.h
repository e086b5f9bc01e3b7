// SPDX-License-Identifier: Apache-2.0
// Where top-k and top-p cut a row: the smallest entry that stays. It is found among the entries that
// a first bound leaves, in a histogram of their distance from the largest, and then among those of
// one bin, sorted; a bin of too many gets a histogram of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "lanes.h"
#include "rows.h"

namespace opd {

template <class T>
OPD_ELEMENTWISE void kept_block(const T* __restrict__ values, T largest, T floor, int padded,
                                T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const T e = exp_nonpositive(values[i] - largest);
    out[i] = select(values[i] >= floor, e, T(0));
  }
}

// A row, and the largest entry of it and of each block.
template <class T>
struct Measured {
  const LogitsRow<T>& logits;
  T largest;
  const double* block_maxima;
};

// sum of exp(z - largest) over z >= floor
template <class T>
double kept_sum(const Measured<T>& row, T floor) {
  Block<T> staged, terms;
  double sum = 0.0;
  for_each_block(row.logits.vocab_size(), [&](int64_t begin, int count) {
    if (row.block_maxima[begin / kBlock] < static_cast<double>(floor)) return;
    const T* block = row.logits.block(begin, count, staged.values);
    const int padded = round_up_to_lanes(count);
    kept_block(block, row.largest, floor, padded, terms.values);
    sum += lane_sum(terms.values, padded);
  });
  return sum;
}

// What the entries that stay have to reach, from the largest on: so many of them, or so much of
// sum exp(z - largest).
struct Goal {
  bool by_mass;
  double amount;
};

// The entry at which a goal is reached.
template <class T>
class Cut {
 public:
  Cut(const Measured<T>& row, Goal goal) : row_(row), goal_(goal) {}

  // Among the entries above `bound`, which is -inf or leaves the goal within reach. A goal that
  // rounding leaves out of reach ends at the smallest entry that has any mass; one of more entries
  // than there are keeps all.
  T find(T bound) {
    T low = bound, high = row_.largest;
    // a first histogram of bins of equal width; what is further below is in the last
    double range = std::min(kFirstRange, static_cast<double>(high) - static_cast<double>(low));
    while (true) {
      scale_ = static_cast<double>(kBins) / range;
      // entries that no double tells apart
      if (!std::isfinite(scale_)) return high;
      count_bins(low, high);
      const int bin = reached_bin();
      if (bin < 0) return kMinusInfinity<T>;
      T least, most;
      const int64_t count = collect(low, high, bin, &least, &most);
      if (count <= kCandidates) return reached_candidate(static_cast<int>(count));
      if (least == most) return least;
      // `low` is outside
      low = std::nextafter(least, kMinusInfinity<T>);
      high = most;
      range = static_cast<double>(most) - static_cast<double>(least);
    }
  }

 private:
  static constexpr int kBins = 2048;
  static constexpr int kCandidates = 4096;
  static constexpr double kFirstRange = 32.0;

  // Never falls with the distance from the largest.
  int bin_of(T value, T high) const {
    const double place =
        (static_cast<double>(high) - static_cast<double>(value)) * scale_;
    return place < static_cast<double>(kBins - 1) ? static_cast<int>(place) : kBins - 1;
  }

  // fn(value, exp(value - largest) if `with_masses`, else 1) of the entries in (low, high]
  template <class Fn>
  void for_each(T low, T high, bool with_masses, Fn&& fn) {
    for_each_block(row_.logits.vocab_size(), [&](int64_t begin, int count) {
      if (!(row_.block_maxima[begin / kBlock] > static_cast<double>(low))) return;
      const T* block = row_.logits.block(begin, count, staged_.values);
      const int padded = round_up_to_lanes(count);
      if (with_masses) kept_block(block, row_.largest, low, padded, terms_.values);
      for (int i = 0; i < padded; i += kLanes) {
        for (uint32_t bits = lanes_above(block + i, low); bits != 0; bits &= bits - 1) {
          const int place = i + __builtin_ctz(bits);
          if (block[place] > high) continue;
          fn(block[place], with_masses ? static_cast<double>(terms_.values[place]) : 1.0);
        }
      }
    });
  }

  void count_bins(T low, T high) {
    std::fill(amounts_, amounts_ + kBins, 0.0);
    for_each(low, high, goal_.by_mass,
             [&](T value, double amount) { amounts_[bin_of(value, high)] += amount; });
  }

  // The goal becomes what of it is to be reached inside the bin.
  int reached_bin() {
    int last = -1;
    double left = goal_.amount;
    for (int bin = 0; bin < kBins; ++bin) {
      if (!(amounts_[bin] > 0.0)) continue;
      last = bin;
      goal_.amount = left;
      if (amounts_[bin] >= left) return bin;
      left -= amounts_[bin];
    }
    return goal_.by_mass ? last : -1;
  }

  int64_t collect(T low, T high, int bin, T* least, T* most) {
    int64_t count = 0;
    *least = std::numeric_limits<T>::infinity();
    *most = kMinusInfinity<T>;
    if (bin < kBins - 1) {
      // what is a whole bin below is not looked at; rounding to T may end above that
      const T end = static_cast<T>(static_cast<double>(high) - (bin + 2) / scale_);
      low = std::max(low, std::nextafter(end, kMinusInfinity<T>));
    }
    for_each(low, high, false, [&](T value, double) {
      if (bin_of(value, high) != bin) return;
      if (count < kCandidates) candidates_[count] = value;
      ++count;
      *least = std::min(*least, value);
      *most = std::max(*most, value);
    });
    return count;
  }

  T reached_candidate(int count) {
    std::sort(candidates_, candidates_ + count, std::greater<T>());
    double reached = 0.0;
    T last = candidates_[0];
    for (int i = 0; i < count; ++i) {
      const double amount =
          goal_.by_mass ? static_cast<double>(exp_nonpositive(candidates_[i] - row_.largest)) : 1.0;
      if (!(amount > 0.0)) break;
      last = candidates_[i];
      reached += amount;
      if (reached >= goal_.amount) break;
    }
    return last;
  }

  const Measured<T>& row_;
  Goal goal_;
  double scale_ = 0.0;
  Block<T> staged_, terms_;
  double amounts_[kBins];
  T candidates_[kCandidates];
};

// The top_k-th largest z. `scratch` holds a double per block.
template <class T>
T top_k_floor(const Measured<T>& row, int64_t top_k, double* scratch) {
  T bound = kMinusInfinity<T>;
  const int64_t blocks = num_blocks(row.logits.vocab_size());
  if (top_k <= blocks) {
    // as many blocks as are wanted hold an entry that is not below
    double* const end = scratch + top_k - 1;
    std::copy(row.block_maxima, row.block_maxima + blocks, scratch);
    std::nth_element(scratch, end, scratch + blocks, std::greater<double>());
    bound = std::nextafter(static_cast<T>(*end), kMinusInfinity<T>);
  }
  return Cut<T>(row, {false, static_cast<double>(top_k)}).find(bound);
}

// The z at which the largest of those not below `floor` reach top_p of `kept`, which is the sum of
// all of these.
template <class T>
T top_p_floor(const Measured<T>& row, T floor, double top_p, double kept) {
  // entries below it would all together be half of what may be left out
  const double share =
      0.5 * (1.0 - top_p) * kept / static_cast<double>(row.logits.vocab_size());
  const T least = static_cast<T>(static_cast<double>(row.largest) + std::log(share));
  // neither it, which rounding to T may have raised, nor the floor is outside
  const T bound = std::nextafter(std::max(least, floor), kMinusInfinity<T>);
  return Cut<T>(row, {true, top_p * kept}).find(bound);
}

}  // namespace opd
