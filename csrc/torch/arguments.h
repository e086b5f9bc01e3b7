// SPDX-License-Identifier: Apache-2.0
// From the arguments of a torch op to the args structs of the C API: pointers, strides, dtypes. No
// maths. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "opd/opd.h"

namespace opd::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline void parallel_for(int64_t num_rows, opd_rows_fn body, void* context) {
  torch::stable::parallel_for(
      0, num_rows, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

inline void require(bool condition, const char* what) {
  // not STD_TORCH_CHECK: it would put the path of this file before the sentence
  if (!condition) throw std::runtime_error(what);
}

inline void check(opd_status_t status) { require(status == OPD_OK, opd_last_error()); }

inline void check_device(const Tensor& first, const Tensor& other) {
  require(other.device() == first.device(), "opd: every tensor of a call must be on one device");
}

inline void check_device(const Tensor& first, const Optional& other) {
  if (other) check_device(first, *other);
}

template <class NoTensor>
void check_device(const Tensor&, const NoTensor&) {}

// What the Python layer has checked in words; here so that a direct call of torch.ops.opd can be
// refused but not crash.
inline void check_logits(const Tensor& logits, int64_t num_tokens, int64_t vocab_size) {
  require(logits.dim() == 2 && logits.size(0) == num_tokens,
          "opd: logits must have two dimensions and one row per token");
  require(logits.numel() == 0 || logits.size(1) == 1 || logits.stride(1) == 1,
          "opd: logits must be contiguous in the last dimension");
  require(vocab_size > 0 && vocab_size <= logits.size(1),
          "opd: vocab_size must be in [1, columns of the logits]");
}

inline void check_rows(const Tensor& values, int64_t num_tokens, ScalarType dtype) {
  require(values.dim() == 1 && values.size(0) == num_tokens && values.scalar_type() == dtype &&
              (num_tokens <= 1 || values.stride(0) == 1),
          "opd: per-token tensors must be contiguous, one value per token, in the kernel's dtype");
}

inline int32_t dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return OPD_FLOAT32;
    case ScalarType::Double:
      return OPD_FLOAT64;
    case ScalarType::BFloat16:
      return OPD_BFLOAT16;
    case ScalarType::Half:
      return OPD_FLOAT16;
    default:
      throw std::runtime_error("opd: logits must be float32, float64, bfloat16 or float16");
  }
}

inline opd_const_matrix_t const_matrix(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), dtype_of(tensor)};
}

inline opd_matrix_t matrix(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), dtype_of(tensor)};
}

// grad_dtype of a gradient in the dtype of its logits
constexpr int64_t kDtypeOfLogits = -1;

// Where a gradient goes that has the shape of the logits. grad_dtype: a 16-bit opd_dtype_t packs each
// row into the first half of a float32 row.
inline opd_matrix_t gradient_in(const Tensor& tensor, int64_t grad_dtype) {
  if (grad_dtype == kDtypeOfLogits) return matrix(tensor);
  require((grad_dtype == OPD_BFLOAT16 || grad_dtype == OPD_FLOAT16) &&
              tensor.scalar_type() == ScalarType::Float,
          "opd: grad_dtype must be -1, or bfloat16 or float16 in float32 logits");
  return {tensor.data_ptr(), 2 * tensor.stride(0), static_cast<int32_t>(grad_dtype)};
}

inline ScalarType real_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const void* data_or_null(const Optional& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

using Components = std::array<opd_divergence_component_t, OPD_MAX_COMPONENTS>;

// The arguments behind OPD_LAWS, in its order; kept alive by the caller for the call.
struct Laws {
  Optional student_bias, teacher_bias, reference_bias, student_temperatures, teacher_temperatures,
      token_weights, coefficients, mixture_weights, labels, label_weights, token_ids, topk_ids;
  std::vector<int64_t> divergences;
  std::vector<double> params, numbers;
  int64_t target;
  bool live_target;
  int64_t vocab_size;
  Components components;
};
#define OPD_LAW_PARAMETERS                                                                       \
  Optional student_bias, Optional teacher_bias, Optional reference_bias,                         \
      Optional student_temperatures, Optional teacher_temperatures, Optional token_weights,      \
      Optional coefficients, Optional mixture_weights, Optional labels, Optional label_weights,  \
      Optional token_ids, Optional topk_ids, std::vector<int64_t> divergences,                   \
      std::vector<double> params, std::vector<double> numbers, int64_t target, bool live_target, \
      int64_t vocab_size
#define OPD_LAW_ARGUMENTS                                                                     \
  {student_bias, teacher_bias,    reference_bias, student_temperatures, teacher_temperatures, \
   token_weights, coefficients,   mixture_weights, labels, label_weights, token_ids,          \
   topk_ids,     divergences,     params,         numbers, target, live_target, vocab_size, {}}

inline opd_logits_t side(const Tensor& logits, int64_t num_tokens, int64_t vocab_size,
                         ScalarType real, const Optional& bias, double scale, double softcap,
                         double temperature, const Optional& temperatures) {
  check_logits(logits, num_tokens, vocab_size);
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) >= vocab_size && bias->scalar_type() == real &&
                bias->is_contiguous(),
            "opd: a bias must be contiguous, in the kernel's dtype, one value per column");
  }
  if (temperatures) check_rows(*temperatures, num_tokens, real);
  return {const_matrix(logits), data_or_null(bias), scale, softcap, temperature,
          data_or_null(temperatures)};
}

inline void check_table(const Optional& table, int64_t num_tokens, ScalarType dtype) {
  if (!table) return;
  require(table->dim() == 2 && table->size(0) == num_tokens && table->scalar_type() == dtype &&
              table->is_contiguous(),
          "opd: tables of ids and weights must be contiguous, one row per token, in their dtype");
}

// Everything but what is written to. `laws` must outlive the result.
inline opd_divergence_args_t divergence_args(const Tensor& student_logits,
                                             const Tensor& teacher_logits,
                                             const Optional& reference_logits, Laws& laws) {
  const int64_t num_tokens = student_logits.dim() > 0 ? student_logits.size(0) : 0;
  const ScalarType real = real_of(student_logits);
  const std::vector<double>& numbers = laws.numbers;
  const size_t num_components = laws.divergences.size();
  require(numbers.size() == 11, "opd: numbers must hold 11 values");
  require(num_components >= 1 && num_components <= OPD_MAX_COMPONENTS &&
              laws.params.size() == 2 * num_components,
          "opd: there must be 1 to 16 divergences, with two params each");
  opd_divergence_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = num_tokens;
  args.vocab_size = laws.vocab_size;
  args.parallel_for = &parallel_for;
  args.student = side(student_logits, num_tokens, laws.vocab_size, real, laws.student_bias,
                      numbers[0], numbers[1], numbers[2], laws.student_temperatures);
  args.teacher = side(teacher_logits, num_tokens, laws.vocab_size, real, laws.teacher_bias,
                      numbers[3], numbers[4], numbers[5], laws.teacher_temperatures);
  args.reference = {{nullptr, 0, OPD_FLOAT32}, nullptr, 1.0, 0.0, 1.0, nullptr};
  if (reference_logits) {
    args.reference = side(*reference_logits, num_tokens, laws.vocab_size, real,
                          laws.reference_bias, numbers[6], numbers[7], numbers[5],
                          laws.teacher_temperatures);
  }
  args.target = static_cast<int32_t>(laws.target);
  args.live_target = laws.live_target;
  args.target_student = numbers[8];
  args.target_teacher = numbers[9];
  args.target_reference = numbers[10];
  if (laws.coefficients) {
    const Tensor& table = *laws.coefficients;
    require(table.dim() == 2 && table.size(0) == static_cast<int64_t>(num_components) &&
                table.size(1) == num_tokens && table.scalar_type() == real && table.is_contiguous(),
            "opd: coefficients must be contiguous [divergences, T] in the kernel's dtype");
  }
  for (size_t j = 0; j < num_components; ++j) {
    const int64_t id = laws.divergences[j];
    require(id >= 0 && id <= std::numeric_limits<int32_t>::max(),
            "opd: divergence must be an id of opd_divergence_t");
    const char* row = nullptr;
    if (laws.coefficients) {
      row = static_cast<const char*>(laws.coefficients->data_ptr()) +
            j * num_tokens * laws.coefficients->element_size();
    }
    laws.components[j] = {static_cast<int32_t>(id), laws.params[2 * j], laws.params[2 * j + 1],
                          row};
  }
  args.components = laws.components.data();
  args.num_components = static_cast<int32_t>(num_components);
  if (laws.token_weights) check_rows(*laws.token_weights, num_tokens, real);
  if (laws.mixture_weights) check_rows(*laws.mixture_weights, num_tokens, real);
  if (laws.token_ids) check_rows(*laws.token_ids, num_tokens, ScalarType::Long);
  check_table(laws.labels, num_tokens, ScalarType::Long);
  check_table(laws.label_weights, num_tokens, real);
  check_table(laws.topk_ids, num_tokens, ScalarType::Long);
  args.token_weights = data_or_null(laws.token_weights);
  args.mixture_weights = data_or_null(laws.mixture_weights);
  args.labels = static_cast<const int64_t*>(data_or_null(laws.labels));
  args.label_weights = data_or_null(laws.label_weights);
  args.num_labels = laws.labels ? laws.labels->size(1) : 0;
  require(!laws.label_weights || (laws.labels && laws.label_weights->size(1) == args.num_labels),
          "opd: label_weights must have the shape of labels");
  args.token_ids = static_cast<const int64_t*>(data_or_null(laws.token_ids));
  args.topk_ids = static_cast<const int64_t*>(data_or_null(laws.topk_ids));
  args.num_topk = laws.topk_ids ? laws.topk_ids->size(1) : 0;
  return args;
}

inline int64_t state_size(const opd_divergence_args_t& args) {
  return OPD_DIVERGENCE_STATE + args.num_components * OPD_DIVERGENCE_STATE_PER_COMPONENT;
}

inline void check_state(const Tensor& state, const opd_divergence_args_t& args) {
  require(state.dim() == 2 && state.size(0) == args.num_tokens &&
              state.size(1) == state_size(args) && state.scalar_type() == ScalarType::Double &&
              state.is_contiguous(),
          "opd: state must be contiguous float64, as divergence_fwd returns it");
}

inline Tensor empty_statistics(const Tensor& like, bool with_statistics) {
  return torch::stable::new_empty(
      like, {OPD_NUM_STATISTICS, with_statistics ? like.size(0) : 0}, real_of(like));
}

#define OPD_ONE_LAW_PARAMETERS \
  Optional bias, Optional temperatures, std::vector<double> numbers, int64_t vocab_size

inline opd_token_logprobs_spec_t token_logprobs_spec(const Tensor& logits, const Tensor& token_ids,
                                                     const Optional& bias,
                                                     const Optional& temperatures,
                                                     const std::vector<double>& numbers,
                                                     int64_t vocab_size) {
  require(numbers.size() == 3, "opd: numbers must hold 3 values");
  const int64_t num_tokens = logits.dim() > 0 ? logits.size(0) : 0;
  check_rows(token_ids, num_tokens, ScalarType::Long);
  return {num_tokens, vocab_size, &parallel_for,
          side(logits, num_tokens, vocab_size, real_of(logits), bias, numbers[0], numbers[1],
               numbers[2], temperatures),
          static_cast<const int64_t*>(token_ids.data_ptr())};
}

inline opd_topk_divergence_spec_t topk_divergence_spec(const Tensor& logits,
                                                       const Tensor& token_ids,
                                                       const Optional& bias,
                                                       const Optional& temperatures,
                                                       const std::vector<double>& numbers,
                                                       int64_t vocab_size) {
  require(numbers.size() == 3, "opd: numbers must hold 3 values");
  const int64_t num_tokens = logits.dim() > 0 ? logits.size(0) : 0;
  check_table(token_ids, num_tokens, ScalarType::Long);
  return {num_tokens, vocab_size, &parallel_for,
          side(logits, num_tokens, vocab_size, real_of(logits), bias, numbers[0], numbers[1],
               numbers[2], temperatures),
          static_cast<const int64_t*>(token_ids.data_ptr()), token_ids.size(1)};
}

// One side of the residual law; `law` is three of the six numbers.
inline opd_cut_law_t cut_law(const Tensor& logits, const Tensor& lse, const Tensor& floor,
                             const Tensor& rows, const Tensor& scale, int64_t vocab_size,
                             ScalarType real, const Optional& bias, const Optional& temperatures,
                             const double* law) {
  const int64_t num_rows = logits.dim() > 0 ? logits.size(0) : 0;
  check_rows(lse, num_rows, ScalarType::Double);
  check_rows(floor, num_rows, real);
  check_rows(scale, rows.numel(), ScalarType::Double);
  return {side(logits, num_rows, vocab_size, real, bias, law[0], law[1], law[2], temperatures),
          num_rows, static_cast<const double*>(lse.data_ptr()), floor.data_ptr(),
          static_cast<const int64_t*>(rows.data_ptr()),
          static_cast<const double*>(scale.data_ptr())};
}

inline Tensor verify_workspace(const Tensor& like, int64_t num_rows, int64_t vocab_size) {
  return torch::stable::new_empty(
      like, {opd_speculative_verify_workspace_bytes(num_rows, vocab_size)}, ScalarType::Byte);
}

inline opd_segments_t segments_of(const Tensor& offsets, int64_t num_tokens, const Tensor& real) {
  require(real.scalar_type() == ScalarType::Float || real.scalar_type() == ScalarType::Double,
          "opd: values of segments must be float32 or float64");
  require(offsets.dim() == 1 && offsets.size(0) >= 1, "opd: offsets must hold at least one value");
  check_rows(offsets, offsets.size(0), ScalarType::Long);
  return {static_cast<const int64_t*>(offsets.data_ptr()), offsets.size(0) - 1, num_tokens,
          dtype_of(real), &parallel_for};
}

inline opd_sparse_gradient_args_t sparse_gradient_args(const Tensor& grad_logits,
                                                       const Optional& token_weights) {
  require(grad_logits.dim() == 2 && grad_logits.size(1) > 0,
          "opd: grad_logits must have two dimensions and at least one column");
  check_logits(grad_logits, grad_logits.size(0), grad_logits.size(1));
  if (token_weights) check_rows(*token_weights, grad_logits.size(0), real_of(grad_logits));
  opd_sparse_gradient_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = grad_logits.size(0);
  args.vocab_size = grad_logits.size(1);
  args.parallel_for = &parallel_for;
  args.grad_logits = const_matrix(grad_logits);
  args.token_weights = data_or_null(token_weights);
  return args;
}

}  // namespace opd::torch_ops
