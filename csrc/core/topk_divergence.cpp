// SPDX-License-Identifier: Apache-2.0
// A law on a few ids and on all the rest together: log-probabilities at the ids, log of the mass off
// them, and the gradient of what is made of these. The entries at the ids and those off them are two
// laws, each with its own largest logit and its own sums, so that neither cancels nor drowns in the
// other: with L_on and L_off their log-sum-exps, lse = log(e^L_on + e^L_off), the tail is
// L_off - lse, and the entropy w_on (H_on - log w_on) + w_off (H_off - log w_off).
#include <array>
#include <cstring>

#include "parallel.h"
#include "rows.h"
#include "topk_divergence_check.h"

namespace opd {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// exp(d) and -d exp(d) of d = block - shift.
template <class T>
OPD_ELEMENTWISE void moments_block(const T* __restrict__ block, T shift, int padded,
                                   T* __restrict__ exps, T* __restrict__ weighted) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const T d = block[i] - shift;
    const T e = exp(d);
    exps[i] = e;
    weighted[i] = select(e == T(0), T(0), -(e * d));
  }
}

template <class T>
OPD_ELEMENTWISE void share_block(const T* __restrict__ logits, Shift<T> shift, T factor,
                                 int padded, T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const T q = exp((logits[i] - shift.high) - shift.low);
    out[i] = select(q == T(0), T(0), factor * q);
  }
}

// Log-sum-exp and entropy of the entries that were added, in one pass: both parts of
// H = log S + sum e^d (-d) / S are positive, so that nothing cancels.
template <class T>
class PartialLaw {
 public:
  // `padded` is a multiple of kLanes; entries of -inf add nothing.
  void add(const T* block, int padded) {
    const T largest = std::max(largest_, lane_max(block, padded));
    if (largest > largest_) {
      if (sum_ > 0.0) {
        const double step = static_cast<double>(largest) - static_cast<double>(largest_);
        const double decay = std::exp(-step);
        weighted_ = decay == 0.0 ? 0.0 : decay * (weighted_ + step * sum_);
        sum_ *= decay;
      }
      largest_ = largest;
    }
    // a block of nothing but -inf adds zero, and a NaN in it still shows
    const T shift = largest_ == -std::numeric_limits<T>::infinity() ? T(0) : largest_;
    moments_block(block, shift, padded, exps_.values, products_.values);
    sum_ += lane_sum(exps_.values, padded);
    weighted_ += lane_sum(products_.values, padded);
  }

  double lse() const { return static_cast<double>(largest_) + std::log(sum_); }
  double entropy() const { return std::log(sum_) + weighted_ / sum_; }

 private:
  T largest_ = -std::numeric_limits<T>::infinity();
  double sum_ = 0.0, weighted_ = 0.0;
  Block<T> exps_, products_;
};

// log(e^a / (e^a + e^b)), right where it is near 0 and where it is far from it.
double log_share(double a, double b) {
  if (a == kNothing) return kNothing;
  return a >= b ? -std::log1p(std::exp(b - a)) : (a - b) - std::log1p(std::exp(a - b));
}

// w (H - log w), 0 of a part without mass.
double entropy_of_part(double log_share, double entropy) {
  const double share = std::exp(log_share);
  return share == 0.0 ? 0.0 : share * (entropy - log_share);
}

// The ids of a row in ascending order, each with the column that it is first named in.
class SortedIds {
 public:
  SortedIds(const int64_t* ids, int64_t num_ids, int64_t vocab_size) {
    for (int64_t column = 0; column < num_ids; ++column) {
      if (ids[column] >= 0) keys_[size_++] = ids[column] << kColumnBits | column;
    }
    if (size_ > kFewIds) {
      sort_by_digits(vocab_size);
    } else {
      std::sort(keys_.begin(), keys_.begin() + size_);
    }
    int64_t distinct = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const bool is_new = distinct == 0 || keys_[i] >> kColumnBits != id(distinct - 1);
      if (is_new) keys_[distinct++] = keys_[i];
    }
    size_ = distinct;
  }
  int64_t size() const { return size_; }
  int64_t id(int64_t place) const { return keys_[place] >> kColumnBits; }
  int64_t column(int64_t place) const { return keys_[place] & ((int64_t{1} << kColumnBits) - 1); }

 private:
  static constexpr int kColumnBits = 13, kDigitBits = 9;
  static constexpr int64_t kFewIds = 256;
  static_assert(OPD_MAX_IDS <= 1 << kColumnBits);
  using Keys = std::array<int64_t, OPD_MAX_IDS>;

  // Least digit of the id first; stable, so that of equal ids the first column stays first.
  void sort_by_digits(int64_t vocab_size) {
    Keys other;
    Keys *from = &keys_, *to = &other;
    for (int shift = kColumnBits; (vocab_size - 1) >> (shift - kColumnBits) > 0;
         shift += kDigitBits) {
      const auto digit = [&](int64_t key) { return key >> shift & ((1 << kDigitBits) - 1); };
      std::array<int32_t, (1 << kDigitBits) + 1> begin{};
      for (int64_t i = 0; i < size_; ++i) ++begin[digit((*from)[i]) + 1];
      for (int i = 0; i < 1 << kDigitBits; ++i) begin[i + 1] += begin[i];
      for (int64_t i = 0; i < size_; ++i) (*to)[begin[digit((*from)[i])]++] = (*from)[i];
      std::swap(from, to);
    }
    if (from != &keys_) std::copy(from->begin(), from->begin() + size_, keys_.begin());
  }

  Keys keys_;
  int64_t size_ = 0;
};

void check_ids(const opd_topk_divergence_spec_t& spec) {
  for (int64_t row = 0; row < spec.num_tokens; ++row) {
    for (int64_t column = 0; column < spec.num_ids; ++column) {
      const int64_t id = spec.token_ids[row * spec.num_ids + column];
      OPD_CHECK(id < spec.vocab_size, topk_divergence::kOp, ": token_ids must be below ",
                spec.vocab_size, ", got ", id, " at position (", row, ", ", column, ").");
    }
  }
}

template <class T>
void forward(const opd_topk_divergence_fwd_args_t& args) {
  const opd_topk_divergence_spec_t& spec = args.spec;
  parallel_rows(spec.parallel_for, spec.num_tokens, [&](int64_t row) {
    const LogitsRow<T> logits(spec.logits, row, spec.vocab_size);
    const SortedIds ids(spec.token_ids + row * spec.num_ids, spec.num_ids, spec.vocab_size);
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    // holds the logits at the ids until the log-sum-exp is known
    T* logprobs = static_cast<T*>(args.logprobs) + row * spec.num_ids;
    std::fill(logprobs, logprobs + spec.num_ids, nothing);
    PartialLaw<T> on, off;
    Block<T> staged, without_ids;
    int64_t next = 0;
    for_each_block(spec.vocab_size, [&](int64_t begin, int count) {
      const T* block = logits.block(begin, count, staged.values);
      const int padded = round_up_to_lanes(count);
      if (next < ids.size() && ids.id(next) < begin + count) {
        std::copy(block, block + padded, without_ids.values);
        for (; next < ids.size() && ids.id(next) < begin + count; ++next) {
          const int64_t place = ids.id(next) - begin;
          logprobs[ids.column(next)] = block[place];
          without_ids.values[place] = nothing;
        }
        block = without_ids.values;
      }
      off.add(block, padded);
    });
    for_each_block(spec.num_ids, [&](int64_t begin, int count) {
      std::copy(logprobs + begin, logprobs + begin + count, staged.values);
      std::fill(staged.values + count, staged.values + round_up_to_lanes(count), nothing);
      on.add(staged.values, round_up_to_lanes(count));
    });
    const double on_lse = on.lse(), off_lse = off.lse();
    const double on_share = log_share(on_lse, off_lse), tail = log_share(off_lse, on_lse);
    // a row without any finite logit has no law: its lse is -inf, its values are NaN
    const bool has_law = on_lse != kNothing || off_lse != kNothing;
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const double lse = std::isnan(on_lse + off_lse) ? nan
                       : !has_law                   ? kNothing
                       : on_lse >= off_lse          ? on_lse - on_share
                                                    : off_lse - tail;
    const bool is_law = has_law && !std::isnan(lse);
    const Shift<T> shift(lse);
    for (int64_t i = 0; i < spec.num_ids; ++i) {
      logprobs[i] = (logprobs[i] - shift.high) - shift.low;
    }
    args.lse[row] = lse;
    args.tail_logprob[row] = is_law ? tail : nan;
    static_cast<T*>(args.entropy)[row] =
        static_cast<T>(is_law ? entropy_of_part(on_share, on.entropy()) +
                                    entropy_of_part(tail, off.entropy())
                              : nan);
  });
}

template <class T>
void backward(const opd_topk_divergence_bwd_args_t& args) {
  const opd_topk_divergence_spec_t& spec = args.spec;
  parallel_rows(spec.parallel_for, spec.num_tokens, [&](int64_t row) {
    const T* grad_ids = static_cast<const T*>(args.grad_ids) + row * spec.num_ids;
    const T grad_rest = static_cast<const T*>(args.grad_rest)[row];
    const SortedIds ids(spec.token_ids + row * spec.num_ids, spec.num_ids, spec.vocab_size);
    bool is_zero = grad_rest == T(0);
    for (int64_t i = 0; is_zero && i < ids.size(); ++i) is_zero = grad_ids[ids.column(i)] == T(0);
    if (is_zero) {
      zero_columns(args.grad_logits, row, 0, args.grad_width);
      return;
    }
    const LogitsRow<T> logits(spec.logits, row, spec.vocab_size);
    const Shift<T> shift(args.lse[row]);
    const T scale = logits.slope();
    Block<T> staged, gradient, slope;
    int64_t next = 0;
    // a block is read whole before it is written, so the logits may be overwritten by the gradient
    for_each_block(spec.vocab_size, [&](int64_t begin, int count) {
      const bool has_ids = next < ids.size() && ids.id(next) < begin + count;
      if (grad_rest != T(0)) {
        const T* block = logits.block(begin, count, staged.values);
        share_block(block, shift, scale * grad_rest, round_up_to_lanes(count), gradient.values);
      } else if (has_ids) {
        std::fill(gradient.values, gradient.values + count, T(0));
      } else {
        zero_columns(args.grad_logits, row, begin, begin + count);
        return;
      }
      for (; next < ids.size() && ids.id(next) < begin + count; ++next) {
        gradient.values[ids.id(next) - begin] = scale * grad_ids[ids.column(next)];
      }
      logits.times_softcap_slope(begin, count, gradient.values, slope.values);
      store_block(args.grad_logits, row, begin, count, gradient.values);
    });
    zero_columns(args.grad_logits, row, spec.vocab_size, args.grad_width);
  });
}

}  // namespace
}  // namespace opd

opd_status_t opd_topk_divergence_fwd_cpu(const opd_topk_divergence_fwd_args_t* args) {
  return opd::guarded_rows(args, opd::topk_divergence::check_args, [&] {
    opd::check_ids(args->spec);
    opd::visit_real(args->spec.logits,
                    [&](auto real) { opd::forward<decltype(real)>(*args); });
  });
}

opd_status_t opd_topk_divergence_bwd_cpu(const opd_topk_divergence_bwd_args_t* args) {
  return opd::guarded_rows(args, opd::topk_divergence::check_args, [&] {
    opd::check_ids(args->spec);
    opd::visit_real(args->spec.logits,
                    [&](auto real) { opd::backward<decltype(real)>(*args); });
  });
}
