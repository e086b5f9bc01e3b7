// SPDX-License-Identifier: Apache-2.0
// The compiled ops of torch.ops.opd: every schema on this screen, then pointer extraction and the
// C API call. No maths. LibTorch stable ABI: one build runs on every torch >= 2.11, any Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "opd/opd.h"

// What a call says of its laws and of its loss; opd_kernels/_laws.py packs it. `numbers`: scale,
// softcap and temperature of the student and of the teacher, scale and softcap of the reference, then
// the coefficients of student, teacher and reference in a geometric target.
#define OPD_LAWS                                                                               \
  "Tensor? student_bias, Tensor? teacher_bias, Tensor? reference_bias, "                       \
  "Tensor? student_temperatures, Tensor? teacher_temperatures, Tensor? token_weights, "        \
  "Tensor? coefficients, Tensor? mixture_weights, Tensor? labels, Tensor? label_weights, "     \
  "Tensor? token_ids, Tensor? topk_ids, int[] divergences, float[] params, float[] numbers, "  \
  "int target, bool live_target, int vocab_size"
#define OPD_LOGITS "Tensor student_logits, Tensor teacher_logits, Tensor? reference_logits, "
#define OPD_HIDDEN                                                                             \
  "Tensor student_hidden, Tensor student_lm_head_weight, Tensor teacher_hidden, "              \
  "Tensor teacher_lm_head_weight, Tensor? reference_hidden, Tensor? reference_lm_head_weight, " \
  "Tensor? student_lora_a, Tensor? student_lora_b, "

// The same of one side alone; opd_kernels/token_logprobs.py packs it. `numbers`: scale, softcap,
// temperature.
#define OPD_LAW "Tensor? bias, Tensor? temperatures, float[] numbers, int vocab_size"
#define OPD_LINEAR \
  "Tensor hidden, Tensor lm_head_weight, Tensor? lora_a, Tensor? lora_b, Tensor token_ids, "
#define OPD_TOKEN_GRADS "Tensor grad_logprobs, Tensor grad_lse, Tensor grad_entropy, "

STABLE_TORCH_LIBRARY(opd, m) {
  m.def("divergence_fwd(" OPD_LOGITS OPD_LAWS
        ", bool with_statistics) -> (Tensor loss, Tensor state, Tensor statistics)");
  m.def("divergence_bwd(Tensor grad_loss, Tensor state, " OPD_LOGITS OPD_LAWS ") -> Tensor");
  // grad_dtype of the calls in place: -1 is the dtype of the logits; an opd_dtype_t of 16 bits packs
  // each row's gradient into the first half of its own float32 row
  m.def(
      "divergence_fwd_grad_(Tensor(a!) student_logits, Tensor(b!) teacher_logits, "
      "Tensor? reference_logits, " OPD_LAWS ", bool with_statistics, int grad_dtype) -> "
      "(Tensor loss, Tensor statistics)");
  // the forward and the backward in phases, for slices of a vocabulary; 3 opens the state, 4 closes
  // the log-sum-exps, 5 finishes
  m.def("divergence_phase_(Tensor(a!) state, " OPD_LOGITS OPD_LAWS
        ", int phase, int first_column, bool with_statistics) -> (Tensor loss, Tensor statistics)");
  m.def("divergence_bwd_(Tensor grad_loss, Tensor state, Tensor(a!) student_logits, "
        "Tensor teacher_logits, Tensor? reference_logits, " OPD_LAWS ", int first_column, "
        "int grad_dtype) -> ()");
  m.def("token_logprobs_fwd(Tensor logits, Tensor token_ids, " OPD_LAW
        ") -> (Tensor logprobs, Tensor lse, Tensor entropy)");
  m.def("token_logprobs_bwd(" OPD_TOKEN_GRADS
        "Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy, " OPD_LAW ") -> Tensor");
  m.def("token_logprobs_bwd_(" OPD_TOKEN_GRADS
        "Tensor(a!) logits, Tensor token_ids, Tensor lse, Tensor entropy, " OPD_LAW
        ", int grad_dtype) -> ()");
  // segments: dtype float32 or float64 throughout, offsets int64, mask uint8; num_steps 2^63 - 1 is
  // the whole segment; reduction is an opd_reduction_t; index is empty for sums and means
  m.def(
      "segment_scan_fwd(Tensor values, Tensor offsets, float discount, int first_step, "
      "int num_steps, int stride, bool prefix) -> Tensor");
  m.def(
      "segment_scan_reduce(Tensor values, Tensor? weights, Tensor offsets, int reduction) -> "
      "(Tensor reduced, Tensor index)");
  m.def(
      "segment_scan_broadcast(Tensor segment_values, Tensor? weights, Tensor offsets, "
      "SymInt num_tokens) -> Tensor");
  m.def(
      "segment_scan_group_statistics(Tensor values, Tensor? mask, Tensor offsets, "
      "int correction) -> (Tensor count, Tensor mean, Tensor std, Tensor leave_one_out_mean)");
  // the columns of a chunk's gradient that some token needs, and what the others sum to
  m.def(
      "sparse_gradient_mark(Tensor grad_logits, Tensor? token_weights, float tolerance) -> "
      "Tensor kept");
  m.def(
      "sparse_gradient_pack_(Tensor(a!) packed, Tensor grad_logits, Tensor? token_weights, "
      "Tensor columns, Tensor kept) -> Tensor dropped");
  m.def("sparse_gradient_add_(Tensor(a!) target, Tensor columns, Tensor rows) -> ()");
  // loops over torch.mm and the row kernels above, implemented in opd_kernels/<op>.py; sum_ adds
  // grad_scale times the head's gradient to the caller's buffer, and attach is its autograd node
#define OPD_SUM_OPTIONS                                                                          \
  ", int workspace_bytes, bool[] with_grads, bool with_statistics, str process_group, "          \
  "float gradient_tolerance, bool? compact_tokens, str backend) -> (Tensor loss, "               \
  "Tensor grad_student_hidden, Tensor grad_student_lm_head_weight, Tensor grad_student_bias, "   \
  "Tensor grad_student_lora_a, Tensor grad_student_lora_b, Tensor statistics)"
  m.def("fused_linear_divergence_sum(" OPD_HIDDEN OPD_LAWS OPD_SUM_OPTIONS);
  m.def("fused_linear_divergence_sum_(Tensor(a!) student_lm_head_weight_grad, float grad_scale, "
        OPD_HIDDEN OPD_LAWS OPD_SUM_OPTIONS);
  m.def("fused_linear_divergence_attach(Tensor loss, Tensor student_hidden, "
        "Tensor student_lm_head_weight, Tensor? student_bias, Tensor? student_lora_a, "
        "Tensor? student_lora_b, Tensor grad_student_hidden, Tensor grad_student_bias, "
        "Tensor grad_student_lora_a, Tensor grad_student_lora_b, bool[] with_grads, "
        "float grad_scale) -> Tensor");
  m.def("fused_linear_divergence_fwd(" OPD_HIDDEN OPD_LAWS
        ", int workspace_bytes, bool with_statistics, str process_group, bool? compact_tokens, "
        "str backend) -> (Tensor loss, Tensor statistics)");
  m.def("fused_linear_divergence_bwd(Tensor grad_loss, " OPD_HIDDEN OPD_LAWS
        ", int workspace_bytes, bool[] with_grads, str process_group, bool? compact_tokens, "
        "str backend) -> (Tensor grad_student_hidden, Tensor grad_student_lm_head_weight, "
        "Tensor grad_student_bias, Tensor grad_student_lora_a, Tensor grad_student_lora_b)");
#define OPD_TOKEN_OPTIONS                                                                    \
  ", int workspace_bytes, bool[] with_grads, bool? compact_tokens, str backend) -> "         \
  "(Tensor grad_hidden, Tensor grad_lm_head_weight, Tensor grad_bias, Tensor grad_lora_a, "  \
  "Tensor grad_lora_b)"
  m.def("fused_linear_token_logprobs_fwd(" OPD_LINEAR OPD_LAW
        ", Tensor? lm_head_weight_grad, int workspace_bytes, bool? compact_tokens, str backend) -> "
        "(Tensor logprobs, Tensor lse, Tensor entropy)");
  m.def("fused_linear_token_logprobs_bwd(" OPD_TOKEN_GRADS OPD_LINEAR
        "Tensor lse, Tensor entropy, " OPD_LAW OPD_TOKEN_OPTIONS);
  m.def("fused_linear_token_logprobs_bwd_(Tensor(a!) lm_head_weight_grad, " OPD_TOKEN_GRADS
        OPD_LINEAR "Tensor lse, Tensor entropy, " OPD_LAW OPD_TOKEN_OPTIONS);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel_for(int64_t num_rows, opd_rows_fn body, void* context) {
  torch::stable::parallel_for(
      0, num_rows, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

void require(bool condition, const char* what) {
  // not STD_TORCH_CHECK: it would put the path of this file before the sentence
  if (!condition) throw std::runtime_error(what);
}

void check(opd_status_t status) { require(status == OPD_OK, opd_last_error()); }

// What the Python layer has checked in words; here so that a direct call of torch.ops.opd can be
// refused but not crash.
void check_logits(const Tensor& logits, int64_t num_tokens, int64_t vocab_size) {
  require(logits.dim() == 2 && logits.size(0) == num_tokens,
          "opd: logits must have two dimensions and one row per token");
  require(logits.numel() == 0 || logits.size(1) == 1 || logits.stride(1) == 1,
          "opd: logits must be contiguous in the last dimension");
  require(vocab_size > 0 && vocab_size <= logits.size(1),
          "opd: vocab_size must be in [1, columns of the logits]");
}

void check_grad_dtype(int64_t grad_dtype) {
  require(grad_dtype == -1,
          "opd: grad_dtype must be -1 on CPU: 16-bit heads are widened there, so that dZ stays in the "
          "dtype of the logits");
}

void check_rows(const Tensor& values, int64_t num_tokens, ScalarType dtype) {
  require(values.dim() == 1 && values.size(0) == num_tokens && values.scalar_type() == dtype &&
              (num_tokens <= 1 || values.stride(0) == 1),
          "opd: per-token tensors must be contiguous, one value per token, in the kernel's dtype");
}

int32_t dtype_of(const Tensor& tensor) {
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

opd_const_matrix_t const_matrix(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), dtype_of(tensor)};
}

opd_matrix_t matrix(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), dtype_of(tensor)};
}

ScalarType real_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

using Optional = std::optional<Tensor>;
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

opd_logits_t side(const Tensor& logits, int64_t num_tokens, int64_t vocab_size, ScalarType real,
                  const Optional& bias, double scale, double softcap, double temperature,
                  const Optional& temperatures) {
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

void check_table(const Optional& table, int64_t num_tokens, ScalarType dtype) {
  if (!table) return;
  require(table->dim() == 2 && table->size(0) == num_tokens && table->scalar_type() == dtype &&
              table->is_contiguous(),
          "opd: tables of ids and weights must be contiguous, one row per token, in their dtype");
}

// Everything but what is written to. `laws` must outlive the result.
opd_divergence_args_t divergence_args(const Tensor& student_logits, const Tensor& teacher_logits,
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
    laws.components[j] = {static_cast<int32_t>(id), laws.params[2 * j], laws.params[2 * j + 1], row};
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

int64_t state_size(const opd_divergence_args_t& args) {
  return OPD_DIVERGENCE_STATE + args.num_components * OPD_DIVERGENCE_STATE_PER_COMPONENT;
}

void check_state(const Tensor& state, const opd_divergence_args_t& args) {
  require(state.dim() == 2 && state.size(0) == args.num_tokens &&
              state.size(1) == state_size(args) && state.scalar_type() == ScalarType::Double &&
              state.is_contiguous(),
          "opd: state must be contiguous float64, as divergence_fwd returns it");
}

Tensor empty_statistics(const Tensor& like, bool with_statistics) {
  return torch::stable::new_empty(
      like, {OPD_NUM_STATISTICS, with_statistics ? like.size(0) : 0}, real_of(like));
}

std::tuple<Tensor, Tensor, Tensor> divergence_fwd(Tensor student_logits, Tensor teacher_logits,
                                                  Optional reference_logits, OPD_LAW_PARAMETERS,
                                                  bool with_statistics) {
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
  check(opd_divergence_fwd_cpu(&args));
  return {loss, state, statistics};
}

void divergence_bwd_into(const Tensor& grad, const Tensor& grad_loss, const Tensor& state,
                         opd_divergence_args_t args) {
  check_rows(grad_loss, args.num_tokens, real_of(grad));
  check_state(state, args);
  args.grad_loss = grad_loss.data_ptr();
  args.state = static_cast<double*>(state.data_ptr());
  args.grad = matrix(grad);
  args.grad_width = grad.size(1);
  check(opd_divergence_bwd_cpu(&args));
}

Tensor divergence_bwd(Tensor grad_loss, Tensor state, Tensor student_logits, Tensor teacher_logits,
                      Optional reference_logits, OPD_LAW_PARAMETERS) {
  Laws laws = OPD_LAW_ARGUMENTS;
  const opd_divergence_args_t args =
      divergence_args(student_logits, teacher_logits, reference_logits, laws);
  Tensor grad = torch::stable::new_empty(student_logits,
                                         {student_logits.size(0), student_logits.size(1)});
  divergence_bwd_into(grad, grad_loss, state, args);
  return grad;
}

void divergence_bwd_(Tensor grad_loss, Tensor state, Tensor student_logits, Tensor teacher_logits,
                     Optional reference_logits, OPD_LAW_PARAMETERS, int64_t first_column,
                     int64_t grad_dtype) {
  check_grad_dtype(grad_dtype);
  Laws laws = OPD_LAW_ARGUMENTS;
  opd_divergence_args_t args =
      divergence_args(student_logits, teacher_logits, reference_logits, laws);
  args.first_column = first_column;
  divergence_bwd_into(student_logits, grad_loss, state, args);
}

std::tuple<Tensor, Tensor> divergence_fwd_grad_(Tensor student_logits, Tensor teacher_logits,
                                                Optional reference_logits, OPD_LAW_PARAMETERS,
                                                bool with_statistics, int64_t grad_dtype) {
  check_grad_dtype(grad_dtype);
  Laws laws = OPD_LAW_ARGUMENTS;
  opd_divergence_args_t args =
      divergence_args(student_logits, teacher_logits, reference_logits, laws);
  Tensor loss =
      torch::stable::new_empty(student_logits, {args.num_tokens}, real_of(student_logits));
  Tensor statistics = empty_statistics(student_logits, with_statistics);
  args.with_statistics = with_statistics;
  args.loss = loss.data_ptr();
  args.statistics = with_statistics ? statistics.data_ptr() : nullptr;
  args.grad = matrix(student_logits);
  args.grad_width = laws.vocab_size;
  args.scratch = matrix(teacher_logits);
  check(opd_divergence_fwd_grad_cpu(&args));
  return {loss, statistics};
}

std::tuple<Tensor, Tensor> divergence_phase_(Tensor state, Tensor student_logits,
                                             Tensor teacher_logits, Optional reference_logits,
                                             OPD_LAW_PARAMETERS, int64_t phase,
                                             int64_t first_column, bool with_statistics) {
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
    check(opd_divergence_init_cpu(&args));
  } else if (phase == 4) {
    check(opd_divergence_close_lse_cpu(&args));
  } else if (finishes) {
    args.loss = loss.data_ptr();
    args.statistics = with_statistics ? statistics.data_ptr() : nullptr;
    check(opd_divergence_finish_cpu(&args));
  } else {
    check(opd_divergence_phase_cpu(&args, static_cast<int32_t>(phase)));
  }
  return {loss, statistics};
}

#define OPD_ONE_LAW_PARAMETERS \
  Optional bias, Optional temperatures, std::vector<double> numbers, int64_t vocab_size

opd_token_logprobs_spec_t token_logprobs_spec(const Tensor& logits, const Tensor& token_ids,
                                              const Optional& bias, const Optional& temperatures,
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

std::tuple<Tensor, Tensor, Tensor> token_logprobs_fwd(Tensor logits, Tensor token_ids,
                                                      OPD_ONE_LAW_PARAMETERS) {
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
  check(opd_token_logprobs_fwd_cpu(&args));
  return {logprobs, lse, entropy};
}

void token_logprobs_bwd_into(const Tensor& grad_logits, const Tensor& grad_logprobs,
                             const Tensor& grad_lse, const Tensor& grad_entropy, const Tensor& lse,
                             const Tensor& entropy, const opd_token_logprobs_spec_t& spec) {
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
  args.grad_logits = matrix(grad_logits);
  args.grad_width = grad_logits.size(1);
  check(opd_token_logprobs_bwd_cpu(&args));
}

Tensor token_logprobs_bwd(Tensor grad_logprobs, Tensor grad_lse, Tensor grad_entropy,
                          Tensor logits, Tensor token_ids, Tensor lse, Tensor entropy,
                          OPD_ONE_LAW_PARAMETERS) {
  const opd_token_logprobs_spec_t spec =
      token_logprobs_spec(logits, token_ids, bias, temperatures, numbers, vocab_size);
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  token_logprobs_bwd_into(grad_logits, grad_logprobs, grad_lse, grad_entropy, lse, entropy, spec);
  return grad_logits;
}

void token_logprobs_bwd_(Tensor grad_logprobs, Tensor grad_lse, Tensor grad_entropy, Tensor logits,
                         Tensor token_ids, Tensor lse, Tensor entropy, OPD_ONE_LAW_PARAMETERS,
                         int64_t grad_dtype) {
  check_grad_dtype(grad_dtype);
  const opd_token_logprobs_spec_t spec =
      token_logprobs_spec(logits, token_ids, bias, temperatures, numbers, vocab_size);
  token_logprobs_bwd_into(logits, grad_logprobs, grad_lse, grad_entropy, lse, entropy, spec);
}

// ---- segments ----

opd_segments_t segments_of(const Tensor& offsets, int64_t num_tokens, const Tensor& real) {
  require(real.scalar_type() == ScalarType::Float || real.scalar_type() == ScalarType::Double,
          "opd: values of segments must be float32 or float64");
  require(offsets.dim() == 1 && offsets.size(0) >= 1, "opd: offsets must hold at least one value");
  check_rows(offsets, offsets.size(0), ScalarType::Long);
  return {static_cast<const int64_t*>(offsets.data_ptr()), offsets.size(0) - 1, num_tokens,
          dtype_of(real), &parallel_for};
}

Tensor segment_scan_fwd(Tensor values, Tensor offsets, double discount, int64_t first_step,
                        int64_t num_steps, int64_t stride, bool prefix) {
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
  check(opd_segment_scan_cpu(&args));
  return out;
}

std::tuple<Tensor, Tensor> segment_scan_reduce(Tensor values, std::optional<Tensor> weights,
                                               Tensor offsets, int64_t reduction) {
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
  check(opd_segment_reduce_cpu(&args));
  return {out, index};
}

Tensor segment_scan_broadcast(Tensor segment_values, std::optional<Tensor> weights, Tensor offsets,
                              int64_t num_tokens) {
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
  check(opd_segment_broadcast_cpu(&args));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> segment_scan_group_statistics(
    Tensor values, std::optional<Tensor> mask, Tensor offsets, int64_t correction) {
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
  check(opd_group_statistics_cpu(&args));
  return {count, mean, std_, leave_one_out_mean};
}

// ---- sparse gradients ----

opd_sparse_gradient_args_t sparse_gradient_args(const Tensor& grad_logits,
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

Tensor sparse_gradient_mark(Tensor grad_logits, Optional token_weights, double tolerance) {
  opd_sparse_gradient_args_t args = sparse_gradient_args(grad_logits, token_weights);
  Tensor kept = torch::stable::new_empty(grad_logits, {args.vocab_size}, ScalarType::Byte);
  args.tolerance = tolerance;
  args.kept = static_cast<uint8_t*>(kept.data_ptr());
  check(opd_sparse_gradient_mark_cpu(&args));
  return kept;
}

Tensor sparse_gradient_pack_(Tensor packed, Tensor grad_logits, Optional token_weights,
                             Tensor columns, Tensor kept) {
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
  check(opd_sparse_gradient_pack_cpu(&args));
  return dropped;
}

void sparse_gradient_add_(Tensor target, Tensor columns, Tensor rows) {
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
  check(opd_sparse_gradient_add_cpu(&args));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opd, CPU, m) {
  m.impl("divergence_fwd", TORCH_BOX(&divergence_fwd));
  m.impl("divergence_bwd", TORCH_BOX(&divergence_bwd));
  m.impl("divergence_fwd_grad_", TORCH_BOX(&divergence_fwd_grad_));
  m.impl("divergence_phase_", TORCH_BOX(&divergence_phase_));
  m.impl("divergence_bwd_", TORCH_BOX(&divergence_bwd_));
  m.impl("token_logprobs_fwd", TORCH_BOX(&token_logprobs_fwd));
  m.impl("token_logprobs_bwd", TORCH_BOX(&token_logprobs_bwd));
  m.impl("token_logprobs_bwd_", TORCH_BOX(&token_logprobs_bwd_));
  m.impl("segment_scan_fwd", TORCH_BOX(&segment_scan_fwd));
  m.impl("segment_scan_reduce", TORCH_BOX(&segment_scan_reduce));
  m.impl("segment_scan_broadcast", TORCH_BOX(&segment_scan_broadcast));
  m.impl("segment_scan_group_statistics", TORCH_BOX(&segment_scan_group_statistics));
  m.impl("sparse_gradient_mark", TORCH_BOX(&sparse_gradient_mark));
  m.impl("sparse_gradient_pack_", TORCH_BOX(&sparse_gradient_pack_));
  m.impl("sparse_gradient_add_", TORCH_BOX(&sparse_gradient_add_));
}
