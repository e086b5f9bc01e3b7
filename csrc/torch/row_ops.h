// SPDX-License-Identifier: Apache-2.0
// The row kernels as torch ops, each written once for all backends. A Backend is made from the
// first tensor of a call and has one member per entry point of the C API, which takes what the
// entry point takes and throws its error; kTakesNarrowGradients says whether a 16-bit gradient of
// float32 logits may be written in their place.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "arguments.h"

// the entry points opd_{name}_{cpu,cuda} that the ops below call
#define OPD_ENTRY_POINTS(X)                                                     \
  X(divergence_fwd) X(divergence_bwd) X(divergence_fwd_grad) X(divergence_init) \
  X(divergence_phase) X(divergence_close_lse) X(divergence_finish)              \
  X(token_logprobs_fwd) X(token_logprobs_bwd)                                   \
  X(topk_logprobs_fwd) X(sample_tokens_fwd)                                     \
  X(topk_divergence_fwd) X(topk_divergence_bwd)                                 \
  X(topk_codec_encode) X(topk_codec_decode)                                     \
  X(speculative_verify_rows) X(speculative_verify_residual)                     \
  X(segment_scan) X(segment_reduce) X(segment_broadcast) X(group_statistics)    \
  X(sparse_gradient_mark) X(sparse_gradient_pack) X(sparse_gradient_add)

// the ops below, each a schema of ops.cpp
#define OPD_ROW_OPS(X)                                                             \
  X(divergence_fwd) X(divergence_bwd) X(divergence_fwd_grad_) X(divergence_phase_) \
  X(divergence_bwd_)                                                               \
  X(token_logprobs_fwd) X(token_logprobs_bwd) X(token_logprobs_bwd_)               \
  X(topk_logprobs_fwd) X(sample_tokens_fwd)                                        \
  X(topk_divergence_fwd) X(topk_divergence_bwd) X(topk_divergence_bwd_)            \
  X(topk_codec_encode) X(topk_codec_decode)                                        \
  X(speculative_verify_rows_fwd) X(speculative_verify_residual_fwd)                \
  X(segment_scan_fwd) X(segment_scan_reduce) X(segment_scan_broadcast)             \
  X(segment_scan_group_statistics)                                                 \
  X(sparse_gradient_mark) X(sparse_gradient_pack_) X(sparse_gradient_add_)

namespace opd::torch_ops {

template <class Backend>
void check_grad_dtype(int64_t grad_dtype) {
  require(grad_dtype == kDtypeOfLogits || Backend::kTakesNarrowGradients,
          "opd: grad_dtype must be -1 on CPU, where the GEMMs take dZ in the dtype of the logits");
}

// ---- divergences ----

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> divergence_fwd(const Backend& kernels, Tensor student_logits,
                                                  Tensor teacher_logits, Optional reference_logits,
                                                  OPD_LAW_PARAMETERS, bool with_statistics) {
  Laws laws = OPD_LAW_ARGUMENTS;
  opd_divergence_args_t args =
      divergence_args(student_logits, teacher_logits, reference_logits, laws);
  Tensor loss =
      torch::stable::new_empty(student_logits, {args.num_tokens}, real_of(student_logits));
  Tensor state = torch::stable::new_empty(student_logits, {args.num_tokens, state_size(args)},
                                          ScalarType::Double);
  Tensor statistics = empty_statistics(student_logits, with_statistics);
  args.with_statistics = with_statistics;
  args.loss = loss.data_ptr();
  args.state = static_cast<double*>(state.data_ptr());
  args.statistics = with_statistics ? statistics.data_ptr() : nullptr;
  kernels.divergence_fwd(&args);
  return {loss, state, statistics};
}

template <class Backend>
void divergence_bwd_into(const Backend& kernels, const Tensor& grad, const Tensor& grad_loss,
                         const Tensor& state, opd_divergence_args_t args,
                         int64_t grad_dtype = kDtypeOfLogits) {
  check_rows(grad_loss, args.num_tokens, real_of(grad));
  check_state(state, args);
  args.grad_loss = grad_loss.data_ptr();
  args.state = static_cast<double*>(state.data_ptr());
  args.grad = gradient_in(grad, grad_dtype);
  args.grad_width = grad_dtype == kDtypeOfLogits ? grad.size(1) : args.vocab_size;
  kernels.divergence_bwd(&args);
}

template <class Backend>
Tensor divergence_bwd(const Backend& kernels, Tensor grad_loss, Tensor state, Tensor student_logits,
                      Tensor teacher_logits, Optional reference_logits, OPD_LAW_PARAMETERS) {
  Laws laws = OPD_LAW_ARGUMENTS;
  const opd_divergence_args_t args =
      divergence_args(student_logits, teacher_logits, reference_logits, laws);
  Tensor grad = torch::stable::new_empty(student_logits,
                                         {student_logits.size(0), student_logits.size(1)});
  divergence_bwd_into(kernels, grad, grad_loss, state, args);
  return grad;
}

template <class Backend>
void divergence_bwd_(const Backend& kernels, Tensor grad_loss, Tensor state, Tensor student_logits,
                     Tensor teacher_logits, Optional reference_logits, OPD_LAW_PARAMETERS,
                     int64_t first_column, int64_t grad_dtype) {
  check_grad_dtype<Backend>(grad_dtype);
  Laws laws = OPD_LAW_ARGUMENTS;
  opd_divergence_args_t args =
      divergence_args(student_logits, teacher_logits, reference_logits, laws);
  args.first_column = first_column;
  divergence_bwd_into(kernels, student_logits, grad_loss, state, args, grad_dtype);
}

template <class Backend>
std::tuple<Tensor, Tensor> divergence_fwd_grad_(const Backend& kernels, Tensor student_logits,
                                                Tensor teacher_logits, Optional reference_logits,
                                                OPD_LAW_PARAMETERS, bool with_statistics,
                                                int64_t grad_dtype) {
  check_grad_dtype<Backend>(grad_dtype);
  Laws laws = OPD_LAW_ARGUMENTS;
  opd_divergence_args_t args =
      divergence_args(student_logits, teacher_logits, reference_logits, laws);
  Tensor loss =
      torch::stable::new_empty(student_logits, {args.num_tokens}, real_of(student_logits));
  Tensor statistics = empty_statistics(student_logits, with_statistics);
  args.with_statistics = with_statistics;
  args.loss = loss.data_ptr();
  args.statistics = with_statistics ? statistics.data_ptr() : nullptr;
  args.grad = gradient_in(student_logits, grad_dtype);
  args.grad_width = laws.vocab_size;
  args.scratch = matrix(teacher_logits);
  kernels.divergence_fwd_grad(&args);
  return {loss, statistics};
}

template <class Backend>
std::tuple<Tensor, Tensor> divergence_phase_(const Backend& kernels, Tensor state,
                                             Tensor student_logits, Tensor teacher_logits,
                                             Optional reference_logits, OPD_LAW_PARAMETERS,
                                             int64_t phase, int64_t first_column,
                                             bool with_statistics) {
  Laws laws = OPD_LAW_ARGUMENTS;
  opd_divergence_args_t args =
      divergence_args(student_logits, teacher_logits, reference_logits, laws);
  check_state(state, args);
  const bool finishes = phase == 5;
  Tensor loss = torch::stable::new_empty(student_logits, {finishes ? args.num_tokens : 0},
                                         real_of(student_logits));
  Tensor statistics = empty_statistics(student_logits, finishes && with_statistics);
  args.first_column = first_column;
  args.with_statistics = with_statistics;
  args.state = static_cast<double*>(state.data_ptr());
  if (phase == 3) {
    kernels.divergence_init(&args);
  } else if (phase == 4) {
    kernels.divergence_close_lse(&args);
  } else if (finishes) {
    args.loss = loss.data_ptr();
    args.statistics = with_statistics ? statistics.data_ptr() : nullptr;
    kernels.divergence_finish(&args);
  } else {
    kernels.divergence_phase(&args, static_cast<int32_t>(phase));
  }
  return {loss, statistics};
}

// ---- token_logprobs ----

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> token_logprobs_fwd(const Backend& kernels, Tensor logits,
                                                      Tensor token_ids, OPD_ONE_LAW_PARAMETERS) {
  opd_token_logprobs_fwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = token_logprobs_spec(logits, token_ids, bias, temperatures, numbers, vocab_size);
  const int64_t num_tokens = args.spec.num_tokens;
  Tensor logprobs = torch::stable::new_empty(logits, {num_tokens}, real_of(logits));
  Tensor lse = torch::stable::new_empty(logits, {num_tokens}, ScalarType::Double);
  Tensor entropy = torch::stable::new_empty(logits, {num_tokens}, real_of(logits));
  args.logprobs = logprobs.data_ptr();
  args.lse = static_cast<double*>(lse.data_ptr());
  args.entropy = entropy.data_ptr();
  kernels.token_logprobs_fwd(&args);
  return {logprobs, lse, entropy};
}

template <class Backend>
void token_logprobs_bwd_into(const Backend& kernels, const Tensor& grad_logits,
                             const Tensor& grad_logprobs, const Tensor& grad_lse,
                             const Tensor& grad_entropy, const Tensor& lse, const Tensor& entropy,
                             const opd_token_logprobs_spec_t& spec,
                             int64_t grad_dtype = kDtypeOfLogits) {
  for (const Tensor& values : {grad_lse, lse}) {
    check_rows(values, spec.num_tokens, ScalarType::Double);
  }
  for (const Tensor& values : {grad_logprobs, grad_entropy, entropy}) {
    check_rows(values, spec.num_tokens, real_of(grad_logits));
  }
  opd_token_logprobs_bwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec;
  args.grad_logprobs = grad_logprobs.data_ptr();
  args.grad_lse = static_cast<const double*>(grad_lse.data_ptr());
  args.grad_entropy = grad_entropy.data_ptr();
  args.lse = static_cast<const double*>(lse.data_ptr());
  args.entropy = entropy.data_ptr();
  args.grad_logits = gradient_in(grad_logits, grad_dtype);
  args.grad_width = grad_dtype == kDtypeOfLogits ? grad_logits.size(1) : spec.vocab_size;
  kernels.token_logprobs_bwd(&args);
}

template <class Backend>
Tensor token_logprobs_bwd(const Backend& kernels, Tensor grad_logprobs, Tensor grad_lse,
                          Tensor grad_entropy, Tensor logits, Tensor token_ids, Tensor lse,
                          Tensor entropy, OPD_ONE_LAW_PARAMETERS) {
  const opd_token_logprobs_spec_t spec =
      token_logprobs_spec(logits, token_ids, bias, temperatures, numbers, vocab_size);
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  token_logprobs_bwd_into(kernels, grad_logits, grad_logprobs, grad_lse, grad_entropy, lse, entropy,
                          spec);
  return grad_logits;
}

template <class Backend>
void token_logprobs_bwd_(const Backend& kernels, Tensor grad_logprobs, Tensor grad_lse,
                         Tensor grad_entropy, Tensor logits, Tensor token_ids, Tensor lse,
                         Tensor entropy, OPD_ONE_LAW_PARAMETERS, int64_t grad_dtype) {
  check_grad_dtype<Backend>(grad_dtype);
  const opd_token_logprobs_spec_t spec =
      token_logprobs_spec(logits, token_ids, bias, temperatures, numbers, vocab_size);
  token_logprobs_bwd_into(kernels, logits, grad_logprobs, grad_lse, grad_entropy, lse, entropy,
                          spec, grad_dtype);
}

// ---- topk_logprobs ----

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_logprobs_fwd(
    const Backend& kernels, Tensor logits, Optional token_ids, OPD_ONE_LAW_PARAMETERS,
    int64_t num_topk) {
  require(numbers.size() == 3, "opd: numbers must hold 3 values");
  require(num_topk >= 1 && num_topk <= OPD_MAX_TOPK && num_topk <= vocab_size,
          "opd: num_topk must be in [1, 4096] and not above vocab_size");
  const int64_t num_tokens = logits.dim() > 0 ? logits.size(0) : 0;
  const ScalarType real = real_of(logits);
  check_table(token_ids, num_tokens, ScalarType::Long);
  opd_topk_logprobs_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = num_tokens;
  args.vocab_size = vocab_size;
  args.parallel_for = &parallel_for;
  args.logits = side(logits, num_tokens, vocab_size, real, bias, numbers[0], numbers[1], numbers[2],
                     temperatures);
  args.num_topk = num_topk;
  args.num_ids = token_ids ? token_ids->size(1) : 0;
  args.token_ids = static_cast<const int64_t*>(data_or_null(token_ids));
  Tensor ids = torch::stable::new_empty(logits, {num_tokens, num_topk}, ScalarType::Int);
  Tensor logprobs = torch::stable::new_empty(logits, {num_tokens, num_topk}, real);
  Tensor lse = torch::stable::new_empty(logits, {num_tokens}, ScalarType::Double);
  Tensor tail_logprob = torch::stable::new_empty(logits, {num_tokens}, real);
  Tensor entropy = torch::stable::new_empty(logits, {num_tokens}, real);
  Tensor token_logprobs = torch::stable::new_empty(logits, {num_tokens, args.num_ids}, real);
  Tensor workspace = torch::stable::new_empty(
      logits, {opd_topk_logprobs_workspace_bytes(num_tokens, vocab_size, num_topk)},
      ScalarType::Byte);
  args.ids = static_cast<int32_t*>(ids.data_ptr());
  args.logprobs = logprobs.data_ptr();
  args.lse = static_cast<double*>(lse.data_ptr());
  args.tail_logprob = tail_logprob.data_ptr();
  args.entropy = entropy.data_ptr();
  args.token_logprobs = token_logprobs.data_ptr();
  args.workspace = workspace.data_ptr();
  kernels.topk_logprobs_fwd(&args);
  return {ids, logprobs, lse, tail_logprob, entropy, token_logprobs};
}

// ---- sample_tokens ----

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens_fwd(const Backend& kernels, Tensor logits,
                                                             Tensor uniforms,
                                                             OPD_ONE_LAW_PARAMETERS,
                                                             double proposal_temperature) {
  require(numbers.size() == 3, "opd: numbers must hold 3 values");
  const int64_t num_tokens = logits.dim() > 0 ? logits.size(0) : 0;
  const ScalarType real = real_of(logits);
  check_table(uniforms, num_tokens, ScalarType::Double);
  opd_sample_tokens_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = num_tokens;
  args.vocab_size = vocab_size;
  args.parallel_for = &parallel_for;
  args.logits = side(logits, num_tokens, vocab_size, real, bias, numbers[0], numbers[1], numbers[2],
                     temperatures);
  args.num_draws = uniforms.size(1);
  args.uniforms = static_cast<const double*>(uniforms.data_ptr());
  args.proposal_temperature = proposal_temperature;
  Tensor ids = torch::stable::new_empty(logits, {num_tokens, args.num_draws}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(logits, {num_tokens, args.num_draws}, real);
  Tensor logprobs = torch::stable::new_empty(logits, {num_tokens, args.num_draws}, real);
  Tensor lse = torch::stable::new_empty(logits, {num_tokens}, ScalarType::Double);
  Tensor workspace = torch::stable::new_empty(
      logits, {opd_sample_tokens_workspace_bytes(num_tokens, vocab_size)}, ScalarType::Byte);
  args.ids = static_cast<int32_t*>(ids.data_ptr());
  args.weights = weights.data_ptr();
  args.logprobs = logprobs.data_ptr();
  args.lse = static_cast<double*>(lse.data_ptr());
  args.workspace = workspace.data_ptr();
  kernels.sample_tokens_fwd(&args);
  return {ids, weights, logprobs, lse};
}

// ---- topk_divergence ----

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> topk_divergence_fwd(const Backend& kernels,
                                                               Tensor logits, Tensor token_ids,
                                                               OPD_ONE_LAW_PARAMETERS) {
  opd_topk_divergence_fwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = topk_divergence_spec(logits, token_ids, bias, temperatures, numbers, vocab_size);
  const int64_t num_tokens = args.spec.num_tokens;
  Tensor logprobs =
      torch::stable::new_empty(logits, {num_tokens, args.spec.num_ids}, real_of(logits));
  Tensor tail_logprob = torch::stable::new_empty(logits, {num_tokens}, ScalarType::Double);
  Tensor lse = torch::stable::new_empty(logits, {num_tokens}, ScalarType::Double);
  Tensor entropy = torch::stable::new_empty(logits, {num_tokens}, real_of(logits));
  args.logprobs = logprobs.data_ptr();
  args.tail_logprob = static_cast<double*>(tail_logprob.data_ptr());
  args.lse = static_cast<double*>(lse.data_ptr());
  args.entropy = entropy.data_ptr();
  kernels.topk_divergence_fwd(&args);
  return {logprobs, tail_logprob, lse, entropy};
}

template <class Backend>
void topk_divergence_bwd_into(const Backend& kernels, const Tensor& grad_logits,
                              const Tensor& grad_ids, const Tensor& grad_rest, const Tensor& lse,
                              const opd_topk_divergence_spec_t& spec,
                              int64_t grad_dtype = kDtypeOfLogits) {
  check_table(grad_ids, spec.num_tokens, real_of(grad_logits));
  require(grad_ids.size(1) == spec.num_ids, "opd: grad_ids must have the shape of token_ids");
  check_rows(grad_rest, spec.num_tokens, real_of(grad_logits));
  check_rows(lse, spec.num_tokens, ScalarType::Double);
  opd_topk_divergence_bwd_args_t args{};
  args.struct_size = sizeof(args);
  args.spec = spec;
  args.grad_ids = grad_ids.data_ptr();
  args.grad_rest = grad_rest.data_ptr();
  args.lse = static_cast<const double*>(lse.data_ptr());
  args.grad_logits = gradient_in(grad_logits, grad_dtype);
  args.grad_width = grad_dtype == kDtypeOfLogits ? grad_logits.size(1) : spec.vocab_size;
  kernels.topk_divergence_bwd(&args);
}

template <class Backend>
Tensor topk_divergence_bwd(const Backend& kernels, Tensor logits, Tensor token_ids, Tensor grad_ids,
                           Tensor grad_rest, Tensor lse, OPD_ONE_LAW_PARAMETERS) {
  const opd_topk_divergence_spec_t spec =
      topk_divergence_spec(logits, token_ids, bias, temperatures, numbers, vocab_size);
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  topk_divergence_bwd_into(kernels, grad_logits, grad_ids, grad_rest, lse, spec);
  return grad_logits;
}

template <class Backend>
void topk_divergence_bwd_(const Backend& kernels, Tensor logits, Tensor token_ids, Tensor grad_ids,
                          Tensor grad_rest, Tensor lse, OPD_ONE_LAW_PARAMETERS,
                          int64_t grad_dtype) {
  check_grad_dtype<Backend>(grad_dtype);
  const opd_topk_divergence_spec_t spec =
      topk_divergence_spec(logits, token_ids, bias, temperatures, numbers, vocab_size);
  topk_divergence_bwd_into(kernels, logits, grad_ids, grad_rest, lse, spec, grad_dtype);
}

// ---- verification of drafts ----

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> speculative_verify_rows_fwd(
    const Backend& kernels, Tensor logits, Tensor token_ids, OPD_ONE_LAW_PARAMETERS, int64_t top_k,
    double top_p) {
  require(numbers.size() == 3, "opd: numbers must hold 3 values");
  const int64_t num_rows = logits.dim() > 0 ? logits.size(0) : 0;
  const ScalarType real = real_of(logits);
  check_rows(token_ids, num_rows, ScalarType::Long);
  opd_speculative_verify_rows_args_t args{};
  args.struct_size = sizeof(args);
  args.num_rows = num_rows;
  args.vocab_size = vocab_size;
  args.parallel_for = &parallel_for;
  args.logits = side(logits, num_rows, vocab_size, real, bias, numbers[0], numbers[1], numbers[2],
                     temperatures);
  args.token_ids = static_cast<const int64_t*>(token_ids.data_ptr());
  args.top_k = top_k;
  args.top_p = top_p;
  Tensor lse = torch::stable::new_empty(logits, {num_rows}, ScalarType::Double);
  Tensor floor = torch::stable::new_empty(logits, {num_rows}, real);
  Tensor logprobs = torch::stable::new_empty(logits, {num_rows}, ScalarType::Double);
  Tensor ranks = torch::stable::new_empty(logits, {num_rows}, ScalarType::Int);
  Tensor argmax = torch::stable::new_empty(logits, {num_rows}, ScalarType::Int);
  Tensor largest = torch::stable::new_empty(logits, {num_rows}, real);
  Tensor workspace = verify_workspace(logits, num_rows, vocab_size);
  args.lse = static_cast<double*>(lse.data_ptr());
  args.floor = floor.data_ptr();
  args.logprobs = static_cast<double*>(logprobs.data_ptr());
  args.ranks = static_cast<int32_t*>(ranks.data_ptr());
  args.argmax = static_cast<int32_t*>(argmax.data_ptr());
  args.largest = largest.data_ptr();
  args.workspace = workspace.data_ptr();
  kernels.speculative_verify_rows(&args);
  return {lse, floor, logprobs, ranks, argmax, largest};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> speculative_verify_residual_fwd(
    const Backend& kernels, Tensor teacher_logits, Optional student_logits, Tensor teacher_rows,
    Tensor student_rows, Tensor teacher_lse, Tensor teacher_floor, Optional student_lse,
    Optional student_floor, Tensor teacher_scale, Tensor student_scale, Tensor uniforms,
    Optional student_bias, Optional teacher_bias, Optional student_temperatures,
    Optional teacher_temperatures, std::vector<double> numbers, int64_t vocab_size, bool draws) {
  require(numbers.size() == 6, "opd: numbers must hold 6 values");
  require(student_logits.has_value() == student_lse.has_value() &&
              student_logits.has_value() == student_floor.has_value(),
          "opd: student_logits, student_lse and student_floor must come together");
  const int64_t num_rows = teacher_rows.numel();
  const ScalarType real = real_of(teacher_logits);
  for (const Tensor& rows : {teacher_rows, student_rows}) {
    check_rows(rows, num_rows, ScalarType::Long);
  }
  check_rows(student_scale, num_rows, ScalarType::Double);
  check_rows(uniforms, num_rows, ScalarType::Double);
  opd_speculative_verify_residual_args_t args{};
  args.struct_size = sizeof(args);
  args.num_rows = num_rows;
  args.vocab_size = vocab_size;
  args.parallel_for = &parallel_for;
  args.teacher = cut_law(teacher_logits, teacher_lse, teacher_floor, teacher_rows, teacher_scale,
                         vocab_size, real, teacher_bias, teacher_temperatures, &numbers[3]);
  // without a student's matrix no row of it exists
  args.student = {{{nullptr, 0, OPD_FLOAT32}, nullptr, 1.0, 0.0, 1.0, nullptr}, 0, nullptr, nullptr,
                  static_cast<const int64_t*>(student_rows.data_ptr()),
                  static_cast<const double*>(student_scale.data_ptr())};
  if (student_logits) {
    require(real_of(*student_logits) == real, "opd: both sides must be float64 or none");
    args.student = cut_law(*student_logits, *student_lse, *student_floor, student_rows,
                           student_scale, vocab_size, real, student_bias, student_temperatures,
                           numbers.data());
  }
  Tensor mass = torch::stable::new_empty(teacher_logits, {num_rows}, ScalarType::Double);
  Tensor overlap = torch::stable::new_empty(teacher_logits, {num_rows}, ScalarType::Double);
  Tensor tokens = torch::stable::new_empty(teacher_logits, {num_rows}, ScalarType::Int);
  Tensor student_logprobs =
      torch::stable::new_empty(teacher_logits, {num_rows}, ScalarType::Double);
  Tensor teacher_logprobs =
      torch::stable::new_empty(teacher_logits, {num_rows}, ScalarType::Double);
  Tensor workspace = verify_workspace(teacher_logits, num_rows, vocab_size);
  args.draws = draws;
  args.uniforms = static_cast<const double*>(uniforms.data_ptr());
  args.mass = static_cast<double*>(mass.data_ptr());
  args.overlap = static_cast<double*>(overlap.data_ptr());
  args.tokens = static_cast<int32_t*>(tokens.data_ptr());
  args.student_logprobs = static_cast<double*>(student_logprobs.data_ptr());
  args.teacher_logprobs = static_cast<double*>(teacher_logprobs.data_ptr());
  args.workspace = workspace.data_ptr();
  kernels.speculative_verify_residual(&args);
  return {mass, overlap, tokens, student_logprobs, teacher_logprobs};
}

// ---- segments ----

template <class Backend>
Tensor segment_scan_fwd(const Backend& kernels, Tensor values, Tensor offsets, double discount,
                        int64_t first_step, int64_t num_steps, int64_t stride, bool prefix) {
  const int64_t num_tokens = values.numel();
  check_rows(values, num_tokens, values.scalar_type());
  opd_segment_scan_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = segments_of(offsets, num_tokens, values);
  const bool is_windowed = num_steps != 1 && num_steps < num_tokens;
  Tensor out = torch::stable::new_empty(values, {num_tokens});
  Tensor scratch =
      torch::stable::new_empty(values, {is_windowed ? num_tokens : 0}, ScalarType::Double);
  args.discount = discount;
  args.first_step = first_step;
  args.num_steps = num_steps;
  args.stride = stride;
  args.prefix = prefix;
  args.values = values.data_ptr();
  args.out = out.data_ptr();
  args.scratch = static_cast<double*>(scratch.data_ptr());
  kernels.segment_scan(&args);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> segment_scan_reduce(const Backend& kernels, Tensor values,
                                               Optional weights, Tensor offsets,
                                               int64_t reduction) {
  const int64_t num_tokens = values.numel();
  check_rows(values, num_tokens, values.scalar_type());
  if (weights) check_rows(*weights, num_tokens, values.scalar_type());
  require(reduction >= OPD_SUM && reduction <= OPD_MIN,
          "opd: reduction must be an opd_reduction_t");
  opd_segment_reduce_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = segments_of(offsets, num_tokens, values);
  const int64_t num_segments = args.segments.num_segments;
  const bool is_extreme = reduction == OPD_MAX || reduction == OPD_MIN;
  Tensor out = torch::stable::new_empty(values, {num_segments});
  Tensor index =
      torch::stable::new_empty(values, {is_extreme ? num_segments : 0}, ScalarType::Long);
  args.reduction = static_cast<int32_t>(reduction);
  args.values = values.data_ptr();
  args.weights = data_or_null(weights);
  args.out = out.data_ptr();
  args.index = is_extreme ? static_cast<int64_t*>(index.data_ptr()) : nullptr;
  kernels.segment_reduce(&args);
  return {out, index};
}

template <class Backend>
Tensor segment_scan_broadcast(const Backend& kernels, Tensor segment_values, Optional weights,
                              Tensor offsets, int64_t num_tokens) {
  require(num_tokens >= 0, "opd: num_tokens must be >= 0");
  check_rows(segment_values, offsets.numel() - 1, segment_values.scalar_type());
  if (weights) check_rows(*weights, num_tokens, segment_values.scalar_type());
  opd_segment_broadcast_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = segments_of(offsets, num_tokens, segment_values);
  Tensor out = torch::stable::new_empty(segment_values, {num_tokens});
  args.segment_values = segment_values.data_ptr();
  args.weights = data_or_null(weights);
  args.out = out.data_ptr();
  kernels.segment_broadcast(&args);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> segment_scan_group_statistics(
    const Backend& kernels, Tensor values, Optional mask, Tensor offsets, int64_t correction) {
  const int64_t num_tokens = values.numel();
  check_rows(values, num_tokens, values.scalar_type());
  if (mask) check_rows(*mask, num_tokens, ScalarType::Byte);
  require(correction == 0 || correction == 1, "opd: correction must be 0 or 1");
  opd_group_statistics_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = segments_of(offsets, num_tokens, values);
  const int64_t num_groups = args.segments.num_segments;
  Tensor count = torch::stable::new_empty(values, {num_groups}, ScalarType::Long);
  Tensor mean = torch::stable::new_empty(values, {num_groups});
  Tensor std_ = torch::stable::new_empty(values, {num_groups});
  Tensor leave_one_out_mean = torch::stable::new_empty(values, {num_tokens});
  args.correction = static_cast<int32_t>(correction);
  args.values = values.data_ptr();
  args.mask = static_cast<const uint8_t*>(data_or_null(mask));
  args.count = static_cast<int64_t*>(count.data_ptr());
  args.mean = mean.data_ptr();
  args.std = std_.data_ptr();
  args.leave_one_out_mean = leave_one_out_mean.data_ptr();
  kernels.group_statistics(&args);
  return {count, mean, std_, leave_one_out_mean};
}

// ---- sparse gradients ----

template <class Backend>
Tensor sparse_gradient_mark(const Backend& kernels, Tensor grad_logits, Optional token_weights,
                            double tolerance) {
  opd_sparse_gradient_args_t args = sparse_gradient_args(grad_logits, token_weights);
  Tensor kept = torch::stable::new_empty(grad_logits, {args.vocab_size}, ScalarType::Byte);
  args.tolerance = tolerance;
  args.kept = static_cast<uint8_t*>(kept.data_ptr());
  kernels.sparse_gradient_mark(&args);
  return kept;
}

template <class Backend>
Tensor sparse_gradient_pack_(const Backend& kernels, Tensor packed, Tensor grad_logits,
                             Optional token_weights, Tensor columns, Tensor kept) {
  opd_sparse_gradient_args_t args = sparse_gradient_args(grad_logits, token_weights);
  check_rows(columns, columns.numel(), ScalarType::Long);
  check_rows(kept, args.vocab_size, ScalarType::Byte);
  require(packed.dim() == 2 && packed.size(0) == args.num_tokens &&
              packed.size(1) == columns.numel() &&
              packed.scalar_type() == grad_logits.scalar_type() && packed.is_contiguous(),
          "opd: packed must be contiguous [T, columns], in the dtype of grad_logits");
  Tensor dropped = torch::stable::new_empty(grad_logits, {args.num_tokens}, real_of(grad_logits));
  args.kept = static_cast<uint8_t*>(kept.data_ptr());
  args.columns = static_cast<const int64_t*>(columns.data_ptr());
  args.num_columns = columns.numel();
  args.packed = matrix(packed);
  args.dropped = dropped.data_ptr();
  kernels.sparse_gradient_pack(&args);
  return dropped;
}

template <class Backend>
void sparse_gradient_add_(const Backend& kernels, Tensor target, Tensor columns, Tensor rows) {
  check_rows(columns, columns.numel(), ScalarType::Long);
  require(target.dim() == 2 && rows.dim() == 2 && rows.size(0) == columns.numel() &&
              rows.size(1) == target.size(1) && rows.is_contiguous() &&
              (target.numel() == 0 || target.size(1) == 1 || target.stride(1) == 1),
          "opd: rows must be contiguous, one per column, as wide as the target");
  opd_sparse_gradient_add_args_t args{};
  args.struct_size = sizeof(args);
  args.num_columns = columns.numel();
  args.vocab_size = target.size(0);
  args.width = target.size(1);
  args.parallel_for = &parallel_for;
  args.columns = static_cast<const int64_t*>(columns.data_ptr());
  args.rows = const_matrix(rows);
  args.target = matrix(target);
  kernels.sparse_gradient_add(&args);
}

// ---- the codec of top-k laws ----

inline opd_topk_codec_args_t topk_codec_args(int64_t num_tokens, int64_t vocab_size,
                                             int64_t num_topk, int64_t bits) {
  require(bits >= 0 && bits <= 16 && opd_topk_codec_row_bytes(num_topk, vocab_size,
                                                              static_cast<int32_t>(bits)) > 0,
          "opd: num_topk must be in [1, 4096] and at most vocab_size, vocab_size at most 2^31, bits "
          "in [4, 16]");
  opd_topk_codec_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = num_tokens;
  args.vocab_size = vocab_size;
  args.num_topk = num_topk;
  args.bits = static_cast<int32_t>(bits);
  args.parallel_for = &parallel_for;
  return args;
}

template <class Backend>
std::tuple<Tensor, Tensor> topk_codec_encode(const Backend& kernels, Tensor ids, Tensor logprobs,
                                             Tensor tail_logprob, int64_t vocab_size,
                                             int64_t bits) {
  require(ids.dim() == 2 && logprobs.dim() == 2 && logprobs.size(0) == ids.size(0) &&
              logprobs.size(1) == ids.size(1) && ids.is_contiguous() && logprobs.is_contiguous() &&
              ids.scalar_type() == ScalarType::Int &&
              logprobs.scalar_type() == ScalarType::Float,
          "opd: ids must be int32 and logprobs float32, both contiguous [T, K]");
  check_rows(tail_logprob, ids.size(0), ScalarType::Float);
  opd_topk_codec_args_t args = topk_codec_args(ids.size(0), vocab_size, ids.size(1), bits);
  const int64_t row_bytes = opd_topk_codec_row_bytes(args.num_topk, vocab_size, args.bits);
  Tensor codes = torch::stable::new_empty(ids, {args.num_tokens, row_bytes}, ScalarType::Byte);
  Tensor status = torch::stable::new_empty(ids, {args.num_tokens}, ScalarType::Int);
  args.ids = static_cast<int32_t*>(ids.data_ptr());
  args.logprobs = static_cast<float*>(logprobs.data_ptr());
  args.tail_logprob = static_cast<float*>(tail_logprob.data_ptr());
  args.codes = static_cast<uint8_t*>(codes.data_ptr());
  args.status = static_cast<int32_t*>(status.data_ptr());
  kernels.topk_codec_encode(&args);
  return {codes, status};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> topk_codec_decode(const Backend& kernels, Tensor codes,
                                                             int64_t num_topk, int64_t vocab_size,
                                                             int64_t bits) {
  require(codes.dim() == 2 && codes.scalar_type() == ScalarType::Byte && codes.is_contiguous(),
          "opd: codes must be uint8 and contiguous [T, row bytes]");
  const int64_t num_tokens = codes.size(0);
  opd_topk_codec_args_t args = topk_codec_args(num_tokens, vocab_size, num_topk, bits);
  require(codes.size(1) == opd_topk_codec_row_bytes(num_topk, vocab_size, args.bits),
          "opd: rows of codes must have the bytes of their num_topk, vocab_size and bits");
  Tensor ids = torch::stable::new_empty(codes, {num_tokens, num_topk}, ScalarType::Int);
  Tensor logprobs = torch::stable::new_empty(codes, {num_tokens, num_topk}, ScalarType::Float);
  Tensor tail_logprob = torch::stable::new_empty(codes, {num_tokens}, ScalarType::Float);
  Tensor status = torch::stable::new_empty(codes, {num_tokens}, ScalarType::Int);
  args.ids = static_cast<int32_t*>(ids.data_ptr());
  args.logprobs = static_cast<float*>(logprobs.data_ptr());
  args.tail_logprob = static_cast<float*>(tail_logprob.data_ptr());
  args.codes = static_cast<uint8_t*>(codes.data_ptr());
  args.status = static_cast<int32_t*>(status.data_ptr());
  kernels.topk_codec_decode(&args);
  return {ids, logprobs, tail_logprob, status};
}

// ---- registration ----

// An op of a Backend as torch calls it: refuses tensors on several devices.
template <class Backend, auto op>
struct Bound;

template <class Backend, class Out, class... In, Out (*op)(const Backend&, Tensor, In...)>
struct Bound<Backend, op> {
  static Out run(Tensor first, In... rest) {
    (check_device(first, rest), ...);
    return op(Backend(first), first, rest...);
  }
};

template <class Backend>
void implement_row_ops(torch::stable::detail::StableLibrary& m) {
#define OPD_IMPLEMENT(NAME) m.impl(#NAME, TORCH_BOX((&Bound<Backend, &NAME<Backend>>::run)));
  OPD_ROW_OPS(OPD_IMPLEMENT)
#undef OPD_IMPLEMENT
}

}  // namespace opd::torch_ops
