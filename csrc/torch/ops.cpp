// SPDX-License-Identifier: Apache-2.0
// The compiled ops of torch.ops.opd: every schema on this screen, and the row kernels of the CPU
// behind them; those of CUDA are in ops_cuda.cpp. LibTorch stable ABI: one build runs on every
// torch >= 2.11, any Python.
#include <torch/csrc/stable/library.h>

#include "row_ops.h"
#include "sorted_l1.h"

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
#define OPD_LINEAR_OF_ANY_IDS                                                               \
  "Tensor hidden, Tensor lm_head_weight, Tensor? lora_a, Tensor? lora_b, Tensor? token_ids, "
#define OPD_TOPK                                                                            \
  "(Tensor ids, Tensor logprobs, Tensor lse, Tensor tail_logprob, Tensor entropy, "          \
  "Tensor token_logprobs)"
#define OPD_SAMPLES "(Tensor ids, Tensor weights, Tensor logprobs, Tensor lse)"
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
  // ids int32 [T, num_topk]; token_ids int64 [T, J], and token_logprobs [T, 0] without
  m.def("topk_logprobs_fwd(Tensor logits, Tensor? token_ids, " OPD_LAW
        ", int num_topk) -> " OPD_TOPK);
  // ids [T, K] int64, < 0 is none, none twice in a row; tail_logprob and lse are float64. lse of the
  // backward is what exp(z - lse) grad_rest is relative to, off the ids
  m.def("topk_divergence_fwd(Tensor logits, Tensor token_ids, " OPD_LAW
        ") -> (Tensor logprobs, Tensor tail_logprob, Tensor lse, Tensor entropy)");
  m.def("topk_divergence_bwd(Tensor logits, Tensor token_ids, Tensor grad_ids, Tensor grad_rest, "
        "Tensor lse, " OPD_LAW ") -> Tensor");
  m.def("topk_divergence_bwd_(Tensor(a!) logits, Tensor token_ids, Tensor grad_ids, "
        "Tensor grad_rest, Tensor lse, " OPD_LAW ", int grad_dtype) -> ()");
  // the K + 1 cells of a sparse teacher, and its ids as the ops above take them; `tail` is a place
  // in opd_kernels/_cells.py's TAILS
  m.def("topk_divergence_cells(Tensor teacher_ids, Tensor teacher_logprobs, Tensor? tail_logprob, "
        "Tensor? token_weights, int vocab_size, int tail, bool in_float64) -> "
        "(Tensor token_ids, Tensor cells)");
  // the summands of tail "drop" and their gradient, of masses that sum to anything
  m.def("topk_divergence_drop(Tensor teacher_cells, Tensor student_cells, Tensor? token_weights, "
        "Tensor? coefficients, int[] divergences, float[] params) -> (Tensor loss, Tensor grad)");
  // ids int32 [T, N], ascending; uniforms float64 [T, N]
  m.def("sample_tokens_fwd(Tensor logits, Tensor uniforms, " OPD_LAW
        ", float proposal_temperature) -> " OPD_SAMPLES);
  // per row: token_ids int64, -1 is none, below it the row is not read; lse and logprobs float64,
  // ranks and argmax int32; top_k 0 and top_p 1 cut nothing
  m.def("speculative_verify_rows_fwd(Tensor logits, Tensor token_ids, " OPD_LAW
        ", int top_k, float top_p) -> (Tensor lse, Tensor floor, Tensor logprobs, Tensor ranks, "
        "Tensor argmax, Tensor largest)");
  // row n of max(scale p - scale q, 0) takes row teacher_rows[n] and student_rows[n] of the logits, int64,
  // negative for none; `numbers` of the student, then of the teacher; scales and uniforms float64
  m.def("speculative_verify_residual_fwd(Tensor teacher_logits, Tensor? student_logits, "
        "Tensor teacher_rows, Tensor student_rows, Tensor teacher_lse, Tensor teacher_floor, "
        "Tensor? student_lse, Tensor? student_floor, Tensor teacher_scale, Tensor student_scale, "
        "Tensor uniforms, Tensor? student_bias, Tensor? teacher_bias, "
        "Tensor? student_temperatures, Tensor? teacher_temperatures, float[] numbers, "
        "int vocab_size, bool draws) -> (Tensor mass, Tensor overlap, Tensor tokens, "
        "Tensor student_logprobs, Tensor teacher_logprobs)");
  // the two together, over drafts [B, G] int64; pairs are the student's and the teacher's;
  // implemented in opd_kernels/_verify.py
#define OPD_TWO_LAWS \
  "Tensor? student_bias, Tensor? teacher_bias, float[] numbers, int vocab_size, "
#define OPD_DECISION                                                                           \
  "Tensor uniforms, Tensor? num_draft, Tensor? history, int[] top_k, float[] top_p, str mode, " \
  "int num_topk, float threshold, bool with_acceptance, "
#define OPD_VERDICT                                                                            \
  "(Tensor num_accepted, Tensor next_token, Tensor accepted, Tensor student_logprobs, "          \
  "Tensor teacher_logprobs, Tensor acceptance, Tensor divergence)"
  m.def("speculative_verify_fwd(Tensor draft_token_ids, Tensor? student_logits, "
        "Tensor teacher_logits, " OPD_TWO_LAWS OPD_DECISION "str backend) -> " OPD_VERDICT);
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
  // two laws of different vocabularies; log-scales [T], student_pairs int64 [Vs], teacher_paired uint8
  // [Vt]; weights: of the ranks, of the pairs, and the JSD's beta. A backward's token_weights are
  // times the upstream gradient
#define OPD_RANKS                                                                              \
  "Tensor? student_bias, Tensor? student_temperatures, float[] student_numbers, "              \
  "int student_vocab_size, Tensor? teacher_bias, Tensor? teacher_temperatures, "               \
  "float[] teacher_numbers, int teacher_vocab_size, Tensor? student_log_scales, "              \
  "Tensor? teacher_log_scales, Tensor? student_pairs, Tensor? teacher_paired, "                \
  "Tensor? token_weights, float[] weights"
  m.def("sorted_l1_fwd(Tensor student_logits, Tensor teacher_logits, " OPD_RANKS ") -> Tensor");
  m.def("sorted_l1_bwd(Tensor student_logits, Tensor teacher_logits, " OPD_RANKS
        ") -> (Tensor grad_logits, Tensor grad_log_scales)");
  m.def("sorted_l1_grad_(Tensor(a!) student_logits, Tensor(b!) teacher_logits, " OPD_RANKS
        ") -> (Tensor loss, Tensor grad_log_scales)");
  // top-k laws as rows of bytes: ids int32, log-probs float32, codes uint8, status int32
  m.def(
      "topk_codec_encode(Tensor ids, Tensor logprobs, Tensor tail_logprob, int vocab_size, "
      "int bits) -> (Tensor codes, Tensor status)");
  m.def(
      "topk_codec_decode(Tensor codes, int num_topk, int vocab_size, int bits) -> (Tensor ids, "
      "Tensor logprobs, Tensor tail_logprob, Tensor status)");
  // out (+)= a @ b, float32, a and b also of 16 bits; where the library's GEMMs are slow
  m.def("gemm_(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");
  m.def("gemm_preferred() -> bool");
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
  // the same of a sparse teacher, whose student has one side's law
#define OPD_TOPK_HIDDEN                                                                      \
  "Tensor student_hidden, Tensor student_lm_head_weight, Tensor? student_lora_a, "           \
  "Tensor? student_lora_b, Tensor teacher_ids, Tensor teacher_logprobs, "                    \
  "Tensor? tail_logprob, Tensor? token_weights, Tensor? coefficients, int[] divergences, "   \
  "float[] params, int tail, "
#define OPD_TOPK_OPTIONS                                                                     \
  ", int workspace_bytes, bool[] with_grads, bool with_statistics, str process_group, "      \
  "bool? compact_tokens, str backend) -> (Tensor loss, Tensor grad_student_hidden, "         \
  "Tensor grad_student_lm_head_weight, Tensor grad_student_bias, "                           \
  "Tensor grad_student_lora_a, Tensor grad_student_lora_b, Tensor statistics)"
  m.def("fused_linear_topk_divergence_sum(" OPD_TOPK_HIDDEN OPD_LAW OPD_TOPK_OPTIONS);
  m.def("fused_linear_topk_divergence_sum_(Tensor(a!) student_lm_head_weight_grad, "
        "float grad_scale, " OPD_TOPK_HIDDEN OPD_LAW OPD_TOPK_OPTIONS);
  m.def("fused_linear_topk_divergence_fwd(" OPD_TOPK_HIDDEN OPD_LAW
        ", int workspace_bytes, bool with_statistics, str process_group, bool? compact_tokens, "
        "str backend) -> (Tensor loss, Tensor statistics)");
  m.def("fused_linear_topk_divergence_bwd(Tensor grad_loss, " OPD_TOPK_HIDDEN OPD_LAW
        ", int workspace_bytes, bool[] with_grads, str process_group, bool? compact_tokens, "
        "str backend) -> (Tensor grad_student_hidden, Tensor grad_student_lm_head_weight, "
        "Tensor grad_student_bias, Tensor grad_student_lora_a, Tensor grad_student_lora_b)");
// two vocabularies: each side has its law, ids pair what they share (none: all, in their order)
#define OPD_OVERLAP                                                                          \
  "Tensor student_hidden, Tensor student_lm_head_weight, Tensor teacher_hidden, "            \
  "Tensor teacher_lm_head_weight, Tensor? student_ids, Tensor? teacher_ids, "                \
  "Tensor? student_extra_logits, Tensor? teacher_extra_logits, Tensor? token_weights, "      \
  "Tensor? coefficients, int[] divergences, float[] params, int tail, "                      \
  "Tensor? student_bias, Tensor? student_temperatures, float[] student_numbers, "            \
  "int student_vocab_size, Tensor? teacher_bias, Tensor? teacher_temperatures, "             \
  "float[] teacher_numbers, int teacher_vocab_size, int workspace_bytes"
#define OPD_OVERLAP_GRADS                                                                    \
  "Tensor grad_student_hidden, Tensor grad_student_lm_head_weight, Tensor grad_student_bias, " \
  "Tensor grad_student_extra_logits"
  m.def("fused_linear_overlap_divergence_sum(" OPD_OVERLAP
        ", bool[] with_grads, bool with_statistics, bool? compact_tokens, str backend) -> "
        "(Tensor loss, " OPD_OVERLAP_GRADS ", Tensor statistics)");
  m.def("fused_linear_overlap_divergence_fwd(" OPD_OVERLAP
        ", bool with_statistics, bool? compact_tokens, str backend) -> "
        "(Tensor loss, Tensor statistics)");
  m.def("fused_linear_overlap_divergence_bwd(Tensor grad_loss, " OPD_OVERLAP
        ", bool[] with_grads, bool? compact_tokens, str backend) -> (" OPD_OVERLAP_GRADS ")");
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
  m.def("fused_linear_topk_fwd(" OPD_LINEAR_OF_ANY_IDS OPD_LAW
        ", int num_topk, int workspace_bytes, str process_group, str backend) -> " OPD_TOPK);
  m.def("fused_linear_sample_tokens_fwd(Tensor hidden, Tensor lm_head_weight, Tensor? lora_a, "
        "Tensor? lora_b, Tensor uniforms, " OPD_LAW
        ", float proposal_temperature, int workspace_bytes, str backend) -> " OPD_SAMPLES);
#define OPD_TWO_HIDDEN                                                            \
  "Tensor student_hidden, Tensor student_lm_head_weight, Tensor teacher_hidden, " \
  "Tensor teacher_lm_head_weight, "
#define OPD_TWO_GRADS                                                            \
  "Tensor grad_student_hidden, Tensor grad_student_lm_head_weight, "             \
  "Tensor grad_student_bias, Tensor grad_log_scales"
  m.def("fused_linear_sorted_l1_sum(" OPD_TWO_HIDDEN OPD_RANKS
        ", int workspace_bytes, bool[] with_grads, bool? compact_tokens) -> (Tensor loss, "
        OPD_TWO_GRADS ", Tensor row_losses)");
  m.def("fused_linear_sorted_l1_fwd(" OPD_TWO_HIDDEN OPD_RANKS
        ", int workspace_bytes, bool? compact_tokens) -> Tensor");
  m.def("fused_linear_sorted_l1_bwd(Tensor grad_loss, " OPD_TWO_HIDDEN OPD_RANKS
        ", int workspace_bytes, bool[] with_grads, bool? compact_tokens) -> (" OPD_TWO_GRADS ")");
  m.def("fused_linear_speculative_verify_fwd(Tensor draft_token_ids, Tensor? student_hidden, "
        "Tensor? student_lm_head_weight, Tensor? student_lora_a, Tensor? student_lora_b, "
        "Tensor teacher_hidden, Tensor teacher_lm_head_weight, " OPD_TWO_LAWS
        OPD_DECISION "int workspace_bytes, str backend) -> " OPD_VERDICT);
}

namespace opd::torch_ops {
namespace {

struct Cpu {
  static constexpr bool kTakesNarrowGradients = false;
  explicit Cpu(const Tensor&) {}
#define OPD_CALL(NAME)                      \
  template <class... Arguments>             \
  void NAME(Arguments... arguments) const { \
    check(opd_##NAME##_cpu(arguments...));  \
  }
  OPD_ENTRY_POINTS(OPD_CALL)
#undef OPD_CALL
};

// The GEMMs of a CPU, which no other backend has.
opd_gemm_operand_t operand(const Tensor& matrix) {
  const bool one_row = matrix.size(0) == 1, one_column = matrix.size(1) == 1;
  // the stride of a dimension of size 1 says nothing
  return {matrix.data_ptr(), one_row ? 1 : matrix.stride(0), one_column ? 1 : matrix.stride(1),
          dtype_of(matrix)};
}

bool gemm_preferred() { return opd_gemm_preferred() != 0; }

void gemm_(Tensor out, Tensor a, Tensor b, bool accumulate) {
  require(out.dim() == 2 && a.dim() == 2 && b.dim() == 2 && a.size(0) == out.size(0) &&
              b.size(1) == out.size(1) && a.size(1) == b.size(0),
          "opd: gemm_ takes out [m, n], a [m, k] and b [k, n]");
  require(out.scalar_type() == ScalarType::Float &&
              (out.numel() == 0 || out.size(1) == 1 || out.stride(1) == 1),
          "opd: out must be float32 and contiguous along its rows");
  opd_gemm_args_t args{};
  args.struct_size = sizeof(args);
  args.m = out.size(0);
  args.n = out.size(1);
  args.k = a.size(1);
  args.parallel_for = &parallel_for;
  args.a = operand(a);
  args.b = operand(b);
  args.out = out.data_ptr();
  args.out_row_stride = out.size(0) == 1 ? args.n : out.stride(0);
  args.accumulate = accumulate;
  const int64_t bytes = opd_gemm_workspace_bytes(args.m, args.n, args.k);
  Tensor workspace = torch::stable::new_empty(out, {bytes}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  check(opd_gemm_cpu(&args));
}

}  // namespace
}  // namespace opd::torch_ops

STABLE_TORCH_LIBRARY_IMPL(opd, CPU, m) {
  opd::torch_ops::implement_row_ops<opd::torch_ops::Cpu>(m);
  m.impl("gemm_", TORCH_BOX(&opd::torch_ops::gemm_));
  m.impl("sorted_l1_fwd", TORCH_BOX(&opd::torch_ops::sorted_l1_fwd));
  m.impl("sorted_l1_bwd", TORCH_BOX(&opd::torch_ops::sorted_l1_bwd));
  m.impl("sorted_l1_grad_", TORCH_BOX(&opd::torch_ops::sorted_l1_grad_));
}

STABLE_TORCH_LIBRARY_IMPL(opd, CompositeExplicitAutograd, m) {
  m.impl("gemm_preferred", TORCH_BOX(&opd::torch_ops::gemm_preferred));
}
