// SPDX-License-Identifier: Apache-2.0
// The CUDA entry points of a library that was built without CUDA; weak, so that a kernel takes the
// place of its own.
#include "check.h"

namespace {

opd_status_t unsupported() {
  opd::set_last_error("opd: this library was built without CUDA; build it where nvcc is found");
  return OPD_UNSUPPORTED;
}

}  // namespace

#define OPD_WITHOUT_CUDA(NAME, ARGS) \
  __attribute__((weak)) opd_status_t NAME(const ARGS*, void*) { return unsupported(); }

OPD_WITHOUT_CUDA(opd_divergence_fwd_cuda, opd_divergence_args_t)
OPD_WITHOUT_CUDA(opd_divergence_bwd_cuda, opd_divergence_args_t)
OPD_WITHOUT_CUDA(opd_divergence_fwd_grad_cuda, opd_divergence_args_t)
OPD_WITHOUT_CUDA(opd_divergence_init_cuda, opd_divergence_args_t)
OPD_WITHOUT_CUDA(opd_divergence_close_lse_cuda, opd_divergence_args_t)
OPD_WITHOUT_CUDA(opd_divergence_finish_cuda, opd_divergence_args_t)
OPD_WITHOUT_CUDA(opd_token_logprobs_fwd_cuda, opd_token_logprobs_fwd_args_t)
OPD_WITHOUT_CUDA(opd_token_logprobs_bwd_cuda, opd_token_logprobs_bwd_args_t)
OPD_WITHOUT_CUDA(opd_topk_logprobs_fwd_cuda, opd_topk_logprobs_args_t)
OPD_WITHOUT_CUDA(opd_sample_tokens_fwd_cuda, opd_sample_tokens_args_t)
OPD_WITHOUT_CUDA(opd_topk_divergence_fwd_cuda, opd_topk_divergence_fwd_args_t)
OPD_WITHOUT_CUDA(opd_topk_divergence_bwd_cuda, opd_topk_divergence_bwd_args_t)
OPD_WITHOUT_CUDA(opd_speculative_verify_rows_cuda, opd_speculative_verify_rows_args_t)
OPD_WITHOUT_CUDA(opd_speculative_verify_residual_cuda, opd_speculative_verify_residual_args_t)
OPD_WITHOUT_CUDA(opd_sparse_gradient_mark_cuda, opd_sparse_gradient_args_t)
OPD_WITHOUT_CUDA(opd_sparse_gradient_pack_cuda, opd_sparse_gradient_args_t)
OPD_WITHOUT_CUDA(opd_sparse_gradient_add_cuda, opd_sparse_gradient_add_args_t)
OPD_WITHOUT_CUDA(opd_segment_scan_cuda, opd_segment_scan_args_t)
OPD_WITHOUT_CUDA(opd_segment_reduce_cuda, opd_segment_reduce_args_t)
OPD_WITHOUT_CUDA(opd_segment_broadcast_cuda, opd_segment_broadcast_args_t)
OPD_WITHOUT_CUDA(opd_group_statistics_cuda, opd_group_statistics_args_t)
OPD_WITHOUT_CUDA(opd_topk_codec_encode_cuda, opd_topk_codec_args_t)
OPD_WITHOUT_CUDA(opd_topk_codec_decode_cuda, opd_topk_codec_args_t)

__attribute__((weak)) opd_status_t opd_divergence_phase_cuda(const opd_divergence_args_t*, int32_t,
                                                             void*) {
  return unsupported();
}
