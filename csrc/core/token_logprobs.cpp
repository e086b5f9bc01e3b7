// SPDX-License-Identifier: Apache-2.0
// Log-probability of one token, log-sum-exp and entropy of a row of logits, and their gradient:
// with c0 = g_lse - g_logprob - g_entropy H and c1 = -g_entropy,
// dz_v = slope_v (q_v (c0 + c1 log q_v) + g_logprob 1[v = id]), slope_v = scale / temperature, times
// the softcap's own slope.
#include "parallel.h"
#include "rows.h"
#include "token_logprobs_check.h"

namespace opd {
namespace {

template <class T>
OPD_ELEMENTWISE void entropy_terms(const T* __restrict__ logits, Shift<T> shift, int padded,
                                   T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const T lq = (logits[i] - shift.high) - shift.low;
    const T q = exp(lq);
    out[i] = select(q == T(0), T(0), -q * lq);
  }
}

template <class T>
OPD_ELEMENTWISE void gradient_terms(const T* __restrict__ logits, Shift<T> shift, T c0, T c1,
                                    int padded, T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const T lq = (logits[i] - shift.high) - shift.low;
    const T q = exp(lq);
    out[i] = select(q == T(0), T(0), q * (c0 + c1 * lq));
  }
}

template <class T>
T single_logprob(const LogitsRow<T>& logits, int64_t token_id, Shift<T> shift) {
  Block<T> staged;
  const T logit = *logits.block(token_id, 1, staged.values);
  return (logit - shift.high) - shift.low;
}

void check_ids(const opd_token_logprobs_spec_t& spec) {
  for (int64_t row = 0; row < spec.num_tokens; ++row) {
    OPD_CHECK(spec.token_ids[row] >= 0 && spec.token_ids[row] < spec.vocab_size,
              token_logprobs::kOp, ": token_ids must be in [0, ", spec.vocab_size, "), got ",
              spec.token_ids[row], " at position ", row,
              ". Drop ignored positions (-100) before the call.");
  }
}

template <class T>
void forward(const opd_token_logprobs_fwd_args_t& args) {
  const opd_token_logprobs_spec_t& spec = args.spec;
  parallel_rows(spec.parallel_for, spec.num_tokens, [&](int64_t row) {
    const LogitsRow<T> logits(spec.logits, row, spec.vocab_size);
    T largest;
    const double lse = row_lse(logits, &largest);
    const Shift<T> shift(lse);
    Block<T> staged, terms;
    double entropy = 0.0;
    for_each_block(spec.vocab_size, [&](int64_t begin, int count) {
      const T* block = logits.block(begin, count, staged.values);
      const int padded = round_up_to_lanes(count);
      entropy_terms(block, shift, padded, terms.values);
      entropy += lane_sum(terms.values, padded);
    });
    static_cast<T*>(args.logprobs)[row] = single_logprob(logits, spec.token_ids[row], shift);
    static_cast<T*>(args.entropy)[row] = static_cast<T>(entropy);
    args.lse[row] = lse;
  });
}

template <class T>
void backward(const opd_token_logprobs_bwd_args_t& args) {
  const opd_token_logprobs_spec_t& spec = args.spec;
  parallel_rows(spec.parallel_for, spec.num_tokens, [&](int64_t row) {
    const T grad_logprob = static_cast<const T*>(args.grad_logprobs)[row];
    const T grad_entropy = static_cast<const T*>(args.grad_entropy)[row];
    const T grad_lse = static_cast<T>(args.grad_lse[row]);
    if (grad_logprob == T(0) && grad_entropy == T(0) && grad_lse == T(0)) {
      zero_columns(args.grad_logits, row, 0, args.grad_width);
      return;
    }
    const T entropy = static_cast<const T*>(args.entropy)[row];
    const Shift<T> shift(args.lse[row]);
    const LogitsRow<T> logits(spec.logits, row, spec.vocab_size);
    const T scale = logits.slope();
    const T c0 = scale * (grad_lse - grad_logprob - grad_entropy * entropy);
    const T c1 = scale * -grad_entropy;
    const int64_t token_id = spec.token_ids[row];
    Block<T> staged, gradient, slope;
    // a block is read whole before it is written, so the logits may be overwritten by the gradient
    for_each_block(spec.vocab_size, [&](int64_t begin, int count) {
      const T* block = logits.block(begin, count, staged.values);
      gradient_terms(block, shift, c0, c1, round_up_to_lanes(count), gradient.values);
      if (token_id >= begin && token_id < begin + count) {
        gradient.values[token_id - begin] += scale * grad_logprob;
      }
      logits.times_softcap_slope(begin, count, gradient.values, slope.values);
      store_block(args.grad_logits, row, begin, count, gradient.values);
    });
    zero_columns(args.grad_logits, row, spec.vocab_size, args.grad_width);
  });
}

}  // namespace
}  // namespace opd

opd_status_t opd_token_logprobs_fwd_cpu(const opd_token_logprobs_fwd_args_t* args) {
  return opd::guarded_rows(args, opd::token_logprobs::check_args, [&] {
    opd::check_ids(args->spec);
    opd::visit_real(args->spec.logits,
                    [&](auto real) { opd::forward<decltype(real)>(*args); });
  });
}

opd_status_t opd_token_logprobs_bwd_cpu(const opd_token_logprobs_bwd_args_t* args) {
  return opd::guarded_rows(args, opd::token_logprobs::check_args, [&] {
    opd::check_ids(args->spec);
    opd::visit_real(args->spec.logits,
                    [&](auto real) { opd::backward<decltype(real)>(*args); });
  });
}
