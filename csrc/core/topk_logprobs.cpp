// SPDX-License-Identifier: Apache-2.0
// The num_topk largest entries of a row, the log-sum-exp and entropy of the whole, and the mass of
// the rest, in one pass. An entry above the threshold, the smallest of the best so far, waits in a
// buffer; any other goes into the sums of the tail at once. A full buffer is cut to its best, which
// raises the threshold, and what is cut joins the tail. The tail is thus a sum of its own terms,
// relative to its own largest: it neither cancels nor underflows.
#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"
#include "parallel.h"
#include "rows.h"
#include "topk_logprobs_check.h"

namespace opd {
namespace {

template <class T>
struct Entry {
  T value;
  int32_t id;
};

// Best first: the larger logit, of equal ones the smaller id.
struct IsBefore {
  template <class T>
  bool operator()(const Entry<T>& a, const Entry<T>& b) const {
    return (a.value > b.value) | ((a.value == b.value) & (a.id < b.id));
  }
};

// Below it e^x is 0 of exp_pair_nonpositive, and of a double next to nothing.
template <class T>
constexpr T kLowestExponent = sizeof(T) == sizeof(float) ? T(-87.33) : T(-708);

// Adds exp(x) and x exp(x) of x = value - reference to the lanes; no value is above the reference.
template <class T>
OPD_ELEMENTWISE void add_to_lanes(const T* __restrict__ values, T reference, int padded,
                                  double* __restrict__ sums, double* __restrict__ moments) {
  alignas(64) T block_sums[kLanes] = {}, block_moments[kLanes] = {};
  for (int i = 0; i < padded; i += kLanes) {
OPD_IVDEP
    for (int lane = 0; lane < kLanes; ++lane) {
      const T x = values[i + lane] - reference;
      // finite, so that nothing is left of it where e is 0
      const T clamped = x < kLowestExponent<T> ? kLowestExponent<T> : x;
      const T e = exp_pair_nonpositive(x).exp;
      block_sums[lane] += e;
      block_moments[lane] += e * clamped;
    }
  }
OPD_IVDEP
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += static_cast<double>(block_sums[lane]);
OPD_IVDEP
  for (int lane = 0; lane < kLanes; ++lane) {
    moments[lane] += static_cast<double>(block_moments[lane]);
  }
}

inline double sum_of(const double* lanes) {
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// sum_v e^(z_v - largest) and sum_v (z_v - largest) e^(z_v - largest) of what has been added; every
// term of the second is <= 0.
template <class T>
class Tail {
 public:
  // `padded` is a multiple of kLanes; `most` is the largest value, NaN aside.
  void add(const T* values, int padded, T most) {
    if (most > largest_) raise(most);
    // values that are all -inf add zero, and a NaN among them still shows
    const T reference = largest_ == kMinusInfinity<T> ? T(0) : largest_;
    add_to_lanes(values, reference, padded, sums_, moments_);
  }

  T largest() const { return largest_; }
  double sum() const { return sum_of(sums_); }
  double moment() const { return sum_of(moments_); }

 private:
  void raise(T largest) {
    if (largest_ != kMinusInfinity<T>) {
      const double distance = static_cast<double>(largest_) - static_cast<double>(largest);
      const double decay = std::exp(distance);
      for (int lane = 0; lane < kLanes; ++lane) {
        moments_[lane] = decay * (moments_[lane] + distance * sums_[lane]);
        sums_[lane] *= decay;
      }
    }
    largest_ = largest;
  }

  T largest_ = kMinusInfinity<T>;
  alignas(64) double sums_[kLanes] = {}, moments_[kLanes] = {};
};

// Moves the values above `threshold` to `out`, with their ids, and leaves -inf in their place;
// returns how many.
template <class T>
OPD_ELEMENTWISE int take_above(T* __restrict__ values, int padded, T threshold, int32_t first_id,
                               Entry<T>* __restrict__ out) {
  int taken = 0;
  for (int i = 0; i < padded; i += kLanes) {
    for (uint32_t bits = lanes_above(values + i, threshold); bits != 0; bits &= bits - 1) {
      const int place = i + __builtin_ctz(bits);
      out[taken++] = {values[place], first_id + place};
      values[place] = kMinusInfinity<T>;
    }
  }
  return taken;
}

// ranks[i] = how many of `padded` values, a multiple of kLanes, are above values[i], or equal to it
// and before it.
template <class T>
OPD_ELEMENTWISE void rank(const T* values, int padded, int32_t* ranks) {
  using Vector = typename Register<T>::Type;
  using Mask = decltype(Vector{} > Vector{});
  constexpr int kSize = kRegisterBytes / static_cast<int>(sizeof(T));
  Mask lanes;
  for (int lane = 0; lane < kSize; ++lane) lanes[lane] = lane;
  for (int begin = 0; begin < padded; begin += kSize) {
    Vector own;
    std::memcpy(&own, values + begin, sizeof(own));
    // a mask is -1 where it holds
    Mask above = {};
    for (int i = 0; i < begin; ++i) above -= values[i] - Vector{} >= own;
    for (int lane = 0; lane < kSize; ++lane) {
      const Vector other = values[begin + lane] - Vector{};
      above -= (other > own) | ((other == own) & (lanes > lane));
    }
    for (int i = begin + kSize; i < padded; ++i) above -= values[i] - Vector{} > own;
    for (int lane = 0; lane < kSize; ++lane) {
      ranks[begin + lane] = static_cast<int32_t>(above[lane]);
    }
  }
}

// The best entries of a row so far, and those that wait to be compared with them.
template <class T>
class Best {
 public:
  explicit Best(int wanted)
      : wanted_(wanted), most_(wanted + std::max(wanted, kFewestWaiting)) {}

  T threshold() const { return threshold_; }
  int count() const { return count_; }
  const Entry<T>& operator[](int i) const { return entries_[i]; }

  void take(T* values, int padded, int32_t first_id, Tail<T>& tail) {
    count_ += take_above(values, padded, threshold_, first_id, entries_ + count_);
    if (count_ > most_) cut(tail);
  }

  // The wanted ones, or as many as there are, in their order.
  void finish(Tail<T>& tail) {
    // few that are still in the order of their ids
    if (threshold_ == kMinusInfinity<T> && count_ <= kMostRanked) return finish_by_rank(tail);
    if (count_ > wanted_) cut(tail);
    std::sort(entries_, entries_ + count_, IsBefore());
  }

 private:
  static constexpr int kFewestWaiting = 64;
  // up to here it is quicker to compare each with all, many at a time, than to sort
  static constexpr int kMostRanked = 256;

  OPD_ELEMENTWISE void finish_by_rank(Tail<T>& tail) {
    Entry<T> in_order[kMostRanked];
    alignas(64) T values[kMostRanked] = {};
    int32_t ranks[kMostRanked];
    const int padded = round_up_to_lanes(count_);
    std::copy(entries_, entries_ + count_, in_order);
    for (int i = 0; i < count_; ++i) values[i] = in_order[i].value;
    std::fill(values + count_, values + padded, kMinusInfinity<T>);
    rank(values, padded, ranks);
    for (int i = 0; i < count_; ++i) entries_[ranks[i]] = in_order[i];
    if (count_ > wanted_) leave(tail);
  }

  OPD_ELEMENTWISE void cut(Tail<T>& tail) {
    Entry<T>* const kept_end = entries_ + wanted_;
    std::nth_element(entries_, kept_end - 1, entries_ + count_, IsBefore());
    threshold_ = kept_end[-1].value;
    leave(tail);
  }

  // What is behind the wanted ones joins the tail.
  void leave(Tail<T>& tail) {
    const Entry<T>* const end = entries_ + count_;
    Block<T> values;
    for (const Entry<T>* entry = entries_ + wanted_; entry < end; entry += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, end - entry));
      const int padded = round_up_to_lanes(count);
      for (int i = 0; i < count; ++i) values.values[i] = entry[i].value;
      std::fill(values.values + count, values.values + padded, kMinusInfinity<T>);
      tail.add(values.values, padded, lane_max(values.values, padded));
    }
    count_ = wanted_;
  }

  const int wanted_, most_;
  int count_ = 0;
  T threshold_ = kMinusInfinity<T>;
  // a block more than is waited for
  Entry<T> entries_[OPD_MAX_TOPK + OPD_MAX_TOPK + kBlock];
};

template <class T>
void read_row(const LogitsRow<T>& logits, Best<T>& best, Tail<T>& tail) {
  Block<T> staged;
  for_each_block(logits.vocab_size(), [&](int64_t begin, int count) {
    const T* block = logits.block(begin, count, staged.values);
    const int padded = round_up_to_lanes(count);
    T most = lane_max(block, padded);
    if (most > best.threshold()) {
      if (block != staged.values) std::copy(block, block + padded, staged.values);
      block = staged.values;
      best.take(staged.values, padded, static_cast<int32_t>(begin), tail);
      most = lane_max(block, padded);
    }
    tail.add(block, padded, most);
  });
  best.finish(tail);
}

struct Sums {
  double lse, entropy, tail_logprob;
  bool has_law;
};

// Of the whole row, from its best entries and its tail.
template <class T>
Sums close_row(const Best<T>& best, const Tail<T>& tail) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  if (tail.sum() != tail.sum()) return {nan, nan, nan, false};
  if (best.count() == 0) return {kMinusInfinity<double>, nan, nan, false};
  const double largest = static_cast<double>(best[0].value);
  if (largest == std::numeric_limits<double>::infinity()) return {nan, nan, nan, false};
  // beside the largest itself, whose term is 1
  double sum = 0.0, moment = 0.0;
  for (int i = 1; i < best.count(); ++i) {
    const double x = static_cast<double>(best[i].value) - largest;
    const double e = std::exp(x);
    sum += e;
    moment += e * x;
  }
  const bool has_tail = tail.sum() > 0.0;
  const double distance = has_tail ? static_cast<double>(tail.largest()) - largest : 0.0;
  const double decay = has_tail ? std::exp(distance) : 0.0;
  sum += decay * tail.sum();
  moment += decay * (tail.moment() + distance * tail.sum());
  const double log_sum = std::log1p(sum);
  return {largest + log_sum, log_sum - moment / (1.0 + sum),
          has_tail ? distance + std::log(tail.sum()) - log_sum : kMinusInfinity<double>, true};
}

template <class T>
void run_row(const opd_topk_logprobs_args_t& args, int64_t row) {
  const LogitsRow<T> logits(args.logits, row, args.vocab_size);
  Best<T> best(static_cast<int>(args.num_topk));
  Tail<T> tail;
  read_row(logits, best, tail);
  const Sums sums = close_row(best, tail);
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  const Shift<T> shift(sums.lse);
  args.lse[row] = sums.lse;
  static_cast<T*>(args.entropy)[row] = static_cast<T>(sums.entropy);
  static_cast<T*>(args.tail_logprob)[row] = static_cast<T>(sums.tail_logprob);
  int32_t* ids = args.ids + row * args.num_topk;
  T* logprobs = static_cast<T*>(args.logprobs) + row * args.num_topk;
  for (int i = 0; i < args.num_topk; ++i) {
    const bool is_there = sums.has_law && i < best.count();
    ids[i] = is_there ? best[i].id : -1;
    logprobs[i] = is_there         ? (best[i].value - shift.high) - shift.low
                  : sums.has_law ? kMinusInfinity<T>
                                 : nan;
  }
  const int64_t* token_ids = args.token_ids + row * args.num_ids;
  T* token_logprobs = static_cast<T*>(args.token_logprobs) + row * args.num_ids;
  Block<T> staged;
  for (int64_t j = 0; j < args.num_ids; ++j) {
    if (!sums.has_law) {
      token_logprobs[j] = nan;
    } else if (token_ids[j] < 0) {
      token_logprobs[j] = kMinusInfinity<T>;
    } else {
      const T logit = *logits.block(token_ids[j], 1, staged.values);
      token_logprobs[j] = (logit - shift.high) - shift.low;
    }
  }
}

void check_ids(const opd_topk_logprobs_args_t& args) {
  for (int64_t i = 0; i < args.num_tokens * args.num_ids; ++i) {
    OPD_CHECK(args.token_ids[i] < args.vocab_size, topk_logprobs::kOp,
              ": token_ids must be below ", args.vocab_size, ", got ", args.token_ids[i],
              " at position (", i / args.num_ids, ", ", i % args.num_ids, ").");
  }
}

}  // namespace
}  // namespace opd

opd_status_t opd_topk_logprobs_fwd_cpu(const opd_topk_logprobs_args_t* args) {
  return opd::guarded([&] {
    opd::topk_logprobs::check_args(args);
    opd::check_ids(*args);
    opd::visit_real(args->logits, [&](auto real) {
      opd::parallel_rows(args->parallel_for, args->num_tokens,
                         [&](int64_t row) { opd::run_row<decltype(real)>(*args, row); });
    });
  });
}
