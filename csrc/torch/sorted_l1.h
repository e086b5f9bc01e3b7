// SPDX-License-Identifier: Apache-2.0
// sorted_l1 as torch ops of the CPU; on a GPU they are the library's sort (opd_kernels/sorted_l1.py).
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace opd::torch_ops {

// The arguments behind OPD_RANKS in ops.cpp, in its order.
#define OPD_RANKS_PARAMETERS                                                                     \
  Optional student_bias, Optional student_temperatures, std::vector<double> student_numbers,     \
      int64_t student_vocab_size, Optional teacher_bias, Optional teacher_temperatures,          \
      std::vector<double> teacher_numbers, int64_t teacher_vocab_size,                           \
      Optional student_log_scales, Optional teacher_log_scales, Optional student_pairs,          \
      Optional teacher_paired, Optional token_weights, std::vector<double> weights
#define OPD_RANKS_ARGUMENTS                                                                      \
  student_bias, student_temperatures, student_numbers, student_vocab_size, teacher_bias,         \
      teacher_temperatures, teacher_numbers, teacher_vocab_size, student_log_scales,             \
      teacher_log_scales, student_pairs, teacher_paired, token_weights, weights

inline const void* row_values(const Optional& values, int64_t num_tokens, ScalarType real) {
  if (values) check_rows(*values, num_tokens, real);
  return data_or_null(values);
}

// Runs the kernel: the loss, and with a matrix `grad` the gradient there and that of the log-scales.
inline std::tuple<Tensor, Tensor> sorted_l1_into(const Tensor& student_logits,
                                                 const Tensor& teacher_logits,
                                                 const Optional& grad, OPD_RANKS_PARAMETERS) {
  require(student_numbers.size() == 3 && teacher_numbers.size() == 3 && weights.size() == 3,
          "opd: numbers and weights must hold 3 values");
  const int64_t num_tokens = student_logits.dim() > 0 ? student_logits.size(0) : 0;
  const ScalarType real = real_of(student_logits);
  opd_sorted_l1_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = num_tokens;
  args.student_vocab_size = student_vocab_size;
  args.teacher_vocab_size = teacher_vocab_size;
  args.parallel_for = &parallel_for;
  args.student = side(student_logits, num_tokens, student_vocab_size, real, student_bias,
                      student_numbers[0], student_numbers[1], student_numbers[2],
                      student_temperatures);
  args.teacher = side(teacher_logits, num_tokens, teacher_vocab_size, real, teacher_bias,
                      teacher_numbers[0], teacher_numbers[1], teacher_numbers[2],
                      teacher_temperatures);
  args.student_log_scales = row_values(student_log_scales, num_tokens, real);
  args.teacher_log_scales = row_values(teacher_log_scales, num_tokens, real);
  args.token_weights = row_values(token_weights, num_tokens, real);
  args.student_pairs = static_cast<const int64_t*>(
      row_values(student_pairs, student_vocab_size, ScalarType::Long));
  args.teacher_paired = static_cast<const uint8_t*>(
      row_values(teacher_paired, teacher_vocab_size, ScalarType::Byte));
  args.rest_weight = weights[0];
  args.pair_weight = weights[1];
  args.beta = weights[2];
  args.num_workers = std::max<int64_t>(
      1, std::min<int64_t>(num_tokens, torch::stable::get_num_threads()));
  const int64_t bytes = opd_sorted_l1_workspace_bytes(
      args.num_workers, student_vocab_size, teacher_vocab_size, dtype_of(student_logits));
  Tensor workspace = torch::stable::new_empty(student_logits, {bytes}, ScalarType::Byte);
  Tensor loss = torch::stable::new_empty(student_logits, {num_tokens}, real);
  Tensor grad_log_scales =
      torch::stable::new_empty(student_logits, {grad ? num_tokens : 0}, real);
  args.workspace = workspace.data_ptr();
  args.loss = loss.data_ptr();
  if (grad) {
    args.grad = matrix(*grad);
    args.grad_width = grad->size(1);
    args.grad_log_scales = grad_log_scales.data_ptr();
  }
  check(opd_sorted_l1_cpu(&args));
  return {loss, grad_log_scales};
}

inline Tensor sorted_l1_fwd(Tensor student_logits, Tensor teacher_logits, OPD_RANKS_PARAMETERS) {
  return std::get<0>(
      sorted_l1_into(student_logits, teacher_logits, std::nullopt, OPD_RANKS_ARGUMENTS));
}

inline std::tuple<Tensor, Tensor> sorted_l1_bwd(Tensor student_logits, Tensor teacher_logits,
                                                OPD_RANKS_PARAMETERS) {
  Tensor grad = torch::stable::new_empty(student_logits,
                                         {student_logits.size(0), student_logits.size(1)});
  auto [loss, grad_log_scales] =
      sorted_l1_into(student_logits, teacher_logits, grad, OPD_RANKS_ARGUMENTS);
  return {grad, grad_log_scales};
}

inline std::tuple<Tensor, Tensor> sorted_l1_grad_(Tensor student_logits, Tensor teacher_logits,
                                                  OPD_RANKS_PARAMETERS) {
  return sorted_l1_into(student_logits, teacher_logits, student_logits, OPD_RANKS_ARGUMENTS);
}

}  // namespace opd::torch_ops
