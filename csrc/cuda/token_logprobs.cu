// SPDX-License-Identifier: Apache-2.0
// Log-probability of one token, log-sum-exp and entropy of a row of logits, and their gradient, one
// block per row and each row read once. The entropy comes from the same pass as the log-sum-exp:
// with m the largest logit, S = sum_v e^(z_v - m) and W = sum_v e^(z_v - m) (z_v - m),
// H = log S - W / S, two summands that are both >= 0. The gradient's formula is in
// csrc/core/token_logprobs.cpp.
#include <limits>

#include "row_passes.cuh"
#include "seen.cuh"
#include "token_logprobs_check.h"

namespace opd {
namespace cuda {
namespace {

struct ForwardParameters {
  Side side;
  int64_t vocab_size;
  const int64_t* token_ids;
  float* logprobs;
  double* lse;
  float* entropy;
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, 2) token_logprobs_forward(ForwardParameters p) {
  const int64_t row = blockIdx.x;
  const RowLaw law(p.side, row);
  const Storage* const logits = row_of<Storage>(p.side, row);
  const Pieces<Storage> pieces(logits, p.vocab_size);
  Seen seen;
  const auto add_one = [&](int64_t column) {
    float value[1] = {to_real(logits[column])};
    law.apply(column, value);
    seen.add(value);
  };
  if (pieces.loose_column() >= 0) add_one(pieces.loose_column());
  read_pieces(logits, pieces, 0, pieces.pieces, [&](int64_t column, auto& values) {
    law.apply(column, values);
    seen.add(values);
  });

  const SeenByAll all = reduce_block(seen, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x != 0) return;
  const double log_sum = ::log(all.sum);
  const double lse = static_cast<double>(all.largest) + log_sum;
  const int64_t token_id = p.token_ids[row];
  float logprob = std::numeric_limits<float>::quiet_NaN();
  if (token_id >= 0 && token_id < p.vocab_size) {
    float value[1] = {to_real(logits[token_id])};
    law.apply(token_id, value);
    logprob = static_cast<float>(static_cast<double>(value[0]) - lse);
  }
  p.logprobs[row] = logprob;
  p.lse[row] = lse;
  p.entropy[row] = static_cast<float>(log_sum - all.weighted / all.sum);
}

struct BackwardParameters {
  Side side;
  int64_t vocab_size;
  const int64_t* token_ids;
  const float* grad_logprobs;
  const double* grad_lse;
  const float* grad_entropy;
  const double* lse;
  const float* entropy;
  void* grad_logits;
  int64_t grad_row_stride, grad_width;
  bool overlaps;  // as rewrite_row() has it
};

// What a row's gradient needs, and N columns of it side by side.
struct RowGradient {
  RowLaw law;
  int64_t token_id;
  float lse_high, lse_low, c0, c1, of_token;

  // the logits become their gradient, in place
  template <int N>
  __device__ __forceinline__ void apply(int64_t column, float (&values)[N]) const {
    law.to_gradient(column, values, [&](float (&logits)[N]) {
      const int64_t distance = token_id - column;
      const int own = distance >= 0 && distance < N ? static_cast<int>(distance) : -1;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float lq = (logits[i] - lse_high) - lse_low;
        const float q = exp(lq);
        const float gradient = q == 0.0f ? 0.0f : q * (c0 + c1 * lq);
        logits[i] = i == own ? gradient + of_token : gradient;
      }
    });
  }
};

template <class Storage, class Gradient>
__global__ void __launch_bounds__(kThreads, 2) token_logprobs_backward(BackwardParameters p) {
  const int64_t row = blockIdx.x;
  Gradient* const out = static_cast<Gradient*>(p.grad_logits) + row * p.grad_row_stride;
  const float grad_logprob = p.grad_logprobs[row], grad_entropy = p.grad_entropy[row];
  const float grad_lse = static_cast<float>(p.grad_lse[row]);
  if (grad_logprob == 0.0f && grad_entropy == 0.0f && grad_lse == 0.0f) {
    zero(out, 0, p.grad_width);
    return;
  }
  const RowLaw law(p.side, row);
  const float slope = law.slope();
  const double lse = p.lse[row];
  // in two parts: the rounding of a large lse to float32 would scale the whole row
  const float high = static_cast<float>(lse), low = static_cast<float>(lse - high);
  const RowGradient gradient{law,
                             p.token_ids[row],
                             high,
                             low,
                             slope * (grad_lse - grad_logprob - grad_entropy * p.entropy[row]),
                             slope * -grad_entropy,
                             slope * grad_logprob};
  const Storage* const logits = row_of<Storage>(p.side, row);
  rewrite_row(logits, p.vocab_size, p.overlaps, out,
              [&](int64_t column, auto& values) { gradient.apply(column, values); });
  zero(out, p.vocab_size, p.grad_width);
}

void forward(const opd_token_logprobs_fwd_args_t& args, void* stream) {
  const opd_token_logprobs_spec_t& spec = args.spec;
  const ForwardParameters parameters{side_of(spec.logits),
                                     spec.vocab_size,
                                     spec.token_ids,
                                     static_cast<float*>(args.logprobs),
                                     args.lse,
                                     static_cast<float*>(args.entropy)};
  const Shape shape{spec.num_tokens, kThreads, kWarp * sizeof(double)};
  visit_storage(token_logprobs::kOp, "logits", spec.logits.matrix.dtype, [&](auto storage) {
    launch(shape, stream, &token_logprobs_forward<decltype(storage)>, parameters);
  });
}

void backward(const opd_token_logprobs_bwd_args_t& args, void* stream) {
  const opd_token_logprobs_spec_t& spec = args.spec;
  const opd_const_matrix_t logits = spec.logits.matrix;
  const BackwardParameters parameters{
      side_of(spec.logits),
      spec.vocab_size,
      spec.token_ids,
      static_cast<const float*>(args.grad_logprobs),
      args.grad_lse,
      static_cast<const float*>(args.grad_entropy),
      args.lse,
      static_cast<const float*>(args.entropy),
      args.grad_logits.data,
      args.grad_logits.row_stride,
      args.grad_width,
      overlaps_logits(token_logprobs::kOp, logits, args.grad_logits, spec.num_tokens)};
  const Shape shape{spec.num_tokens, kThreads};
  visit_storages(token_logprobs::kOp, logits, args.grad_logits, [&](auto storage, auto gradient) {
    launch(shape, stream, &token_logprobs_backward<decltype(storage), decltype(gradient)>,
           parameters);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_token_logprobs_fwd_cuda(const opd_token_logprobs_fwd_args_t* args, void* stream) {
  return opd::guarded_rows(args, opd::token_logprobs::check_args,
                           [&] { opd::cuda::forward(*args, stream); });
}

opd_status_t opd_token_logprobs_bwd_cuda(const opd_token_logprobs_bwd_args_t* args, void* stream) {
  return opd::guarded_rows(args, opd::token_logprobs::check_args,
                           [&] { opd::cuda::backward(*args, stream); });
}
