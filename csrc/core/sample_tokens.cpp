// SPDX-License-Identifier: Apache-2.0
// Draws from a row's law by its inverse distribution function, in three passes of which the last
// reads only the blocks that are drawn from: the largest logit; the sum of each block; the draws, in
// ascending order, each found by its block's place in the sum of sums and then inside the block.
#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"
#include "rows.h"
#include "sample_tokens_check.h"

namespace opd {
namespace {

// sum of exp(factor * (value - largest)); no value is above the largest.
template <class T>
OPD_ELEMENTWISE double sum_of_block(const T* __restrict__ values, T largest, T factor, int padded) {
  alignas(64) T sums[kLanes] = {};
  for (int i = 0; i < padded; i += kLanes) {
OPD_IVDEP
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += exp_pair_nonpositive(factor * (values[i + lane] - largest)).exp;
    }
  }
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(sums[lane]);
  return sum;
}

template <class T>
OPD_ELEMENTWISE void proposal_block(const T* __restrict__ values, T largest, T factor, int padded,
                                    T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    out[i] = exp_pair_nonpositive(factor * (values[i] - largest)).exp;
  }
}

template <class T>
struct Row {
  T largest, factor;
  // of the law and of the proposal, relative to the largest
  double law_sum = 0.0, proposal_sum = 0.0;
};

// Fills `ends` with the proposal's sum up to the end of each block.
template <class T>
Row<T> read_row(const LogitsRow<T>& logits, double proposal_temperature, double* ends) {
  Row<T> row{kMinusInfinity<T>, static_cast<T>(1.0 / proposal_temperature)};
  Block<T> staged;
  for_each_block(logits.vocab_size(), [&](int64_t begin, int count) {
    const T* block = logits.block(begin, count, staged.values);
    row.largest = std::max(row.largest, lane_max(block, round_up_to_lanes(count)));
  });
  // -inf - -inf would be NaN
  const T reference = row.largest == kMinusInfinity<T> ? T(0) : row.largest;
  for_each_block(logits.vocab_size(), [&](int64_t begin, int count) {
    const T* block = logits.block(begin, count, staged.values);
    const int padded = round_up_to_lanes(count);
    const double of_law = sum_of_block(block, reference, T(1), padded);
    const bool is_law = row.factor == T(1);
    row.law_sum += of_law;
    row.proposal_sum += is_law ? of_law : sum_of_block(block, reference, row.factor, padded);
    ends[begin / kBlock] = row.proposal_sum;
  });
  return row;
}

// Finds the ids of ascending places in the proposal's sum.
template <class T>
class Walk {
 public:
  Walk(const LogitsRow<T>& logits, const Row<T>& row, const double* ends)
      : logits_(logits), row_(row), ends_(ends), num_blocks_(num_blocks(logits.vocab_size())) {}

  // A place may be the end of all by rounding: then the last id that is possible.
  int64_t find(double place) {
    int64_t block = std::max<int64_t>(block_, 0);
    while (block < num_blocks_ && !(place < ends_[block])) ++block;
    if (block == num_blocks_) {
      --block;
      while (block > 0 && ends_[block] == ends_[block - 1]) --block;
    }
    if (block != block_) load(block);
    // the sum inside a block runs in another order than the block's: the last possible id closes it
    while (next_ < last_ && !(place < passed_ + static_cast<double>(terms_.values[next_]))) {
      passed_ += static_cast<double>(terms_.values[next_]);
      ++next_;
    }
    return block_ * kBlock + next_;
  }

 private:
  void load(int64_t block) {
    const int64_t begin = block * kBlock;
    const int count =
        static_cast<int>(std::min<int64_t>(kBlock, logits_.vocab_size() - begin));
    const T* values = logits_.block(begin, count, staged_.values);
    proposal_block(values, row_.largest, row_.factor, round_up_to_lanes(count), terms_.values);
    block_ = block;
    passed_ = block == 0 ? 0.0 : ends_[block - 1];
    last_ = count - 1;
    while (last_ > 0 && terms_.values[last_] == T(0)) --last_;
    next_ = 0;
    while (next_ < last_ && terms_.values[next_] == T(0)) ++next_;
  }

  const LogitsRow<T>& logits_;
  const Row<T>& row_;
  const double* ends_;
  const int64_t num_blocks_;
  int64_t block_ = -1;
  int next_ = 0, last_ = 0;
  double passed_ = 0.0;
  Block<T> staged_, terms_;
};

template <class T>
void run_row(const opd_sample_tokens_args_t& args, int64_t t) {
  const LogitsRow<T> logits(args.logits, t, args.vocab_size);
  const int64_t num_draws = args.num_draws;
  double* ends = static_cast<double*>(args.workspace) + t * num_blocks(args.vocab_size);
  int32_t* ids = args.ids + t * num_draws;
  T* weights = static_cast<T*>(args.weights) + t * num_draws;
  T* logprobs = static_cast<T*>(args.logprobs) + t * num_draws;
  const Row<T> row = read_row(logits, args.proposal_temperature, ends);
  const bool is_broken = row.law_sum != row.law_sum || row.proposal_sum != row.proposal_sum ||
                         row.largest == std::numeric_limits<T>::infinity();
  const bool has_law = !is_broken && row.largest != kMinusInfinity<T>;
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  std::fill(ids, ids + num_draws, -1);
  std::fill(weights, weights + num_draws, has_law ? T(0) : nan);
  std::fill(logprobs, logprobs + num_draws, has_law ? kMinusInfinity<T> : nan);
  const double log_law_sum = std::log(row.law_sum);
  const double lse = static_cast<double>(row.largest) + log_law_sum;
  args.lse[t] = is_broken ? std::numeric_limits<double>::quiet_NaN() : lse;
  if (!has_law) return;

  double uniforms[OPD_MAX_TOPK];
  int counts[OPD_MAX_TOPK];
  std::copy(args.uniforms + t * num_draws, args.uniforms + (t + 1) * num_draws, uniforms);
  std::sort(uniforms, uniforms + num_draws);
  Walk<T> walk(logits, row, ends);
  int64_t found = 0;
  for (int64_t n = 0; n < num_draws; ++n) {
    const int32_t id = static_cast<int32_t>(walk.find(uniforms[n] * row.proposal_sum));
    if (found > 0 && ids[found - 1] == id) {
      ++counts[found - 1];
    } else {
      ids[found] = id;
      counts[found++] = 1;
    }
  }
  const Shift<T> shift(lse);
  const double log_proposal_sum = std::log(row.proposal_sum);
  Block<T> staged;
  for (int64_t i = 0; i < found; ++i) {
    const T logit = *logits.block(ids[i], 1, staged.values);
    const double x = static_cast<double>(logit) - static_cast<double>(row.largest);
    const double of_law = x - log_law_sum;
    const double of_proposal = x * static_cast<double>(row.factor) - log_proposal_sum;
    const double share = static_cast<double>(counts[i]) / static_cast<double>(num_draws);
    weights[i] = static_cast<T>(share * std::exp(of_law - of_proposal));
    logprobs[i] = (logit - shift.high) - shift.low;
  }
}

void check_uniforms(const opd_sample_tokens_args_t& args) {
  for (int64_t i = 0; i < args.num_tokens * args.num_draws; ++i) {
    OPD_CHECK(args.uniforms[i] >= 0.0 && args.uniforms[i] < 1.0, sample_tokens::kOp,
              ": uniforms must be in [0, 1), got ", args.uniforms[i], " at position (",
              i / args.num_draws, ", ", i % args.num_draws, ").");
  }
}

}  // namespace
}  // namespace opd

opd_status_t opd_sample_tokens_fwd_cpu(const opd_sample_tokens_args_t* args) {
  return opd::guarded([&] {
    opd::sample_tokens::check_args(args);
    opd::check_uniforms(*args);
    opd::visit_real(args->logits, [&](auto real) {
      opd::parallel_rows(args->parallel_for, args->num_tokens,
                         [&](int64_t row) { opd::run_row<decltype(real)>(*args, row); });
    });
  });
}
