# SPDX-License-Identifier: Apache-2.0
"""The float64 truth: each op from its definition, whole tensors, gradients by autograd alone."""

from .align_tokens import AlignedBatch, Alignment, align_batch, align_tokens
from .divergence import divergence
from .fused_linear_divergence import FusedLinearDivergence, fused_linear_divergence
from .fused_linear_overlap_divergence import (
    FusedLinearOverlapDivergence,
    fused_linear_overlap_divergence,
)
from .fused_linear_sample_tokens import fused_linear_sample_tokens
from .fused_linear_sorted_l1 import FusedLinearSortedL1, fused_linear_sorted_l1
from .fused_linear_speculative_verify import fused_linear_speculative_verify
from .fused_linear_token_logprobs import fused_linear_token_logprobs
from .fused_linear_topk import fused_linear_topk
from .fused_linear_topk_divergence import (
    FusedLinearTopkDivergence,
    fused_linear_topk_divergence,
)
from .sample_tokens import TokenSamples, sample_tokens
from .segment_scan import (
    GroupStatistics,
    group_statistics,
    segment_broadcast,
    segment_reduce,
    segment_scan,
)
from .sorted_l1 import sorted_l1
from .speculative_verify import SpeculativeVerification, speculative_verify
from .token_logprobs import TokenLogprobs, token_logprobs
from .topk_codec import TopkCodes, TopkLaws, decode_topk, encode_topk
from .topk_divergence import topk_divergence
from .topk_logprobs import TopkLogprobs, topk_logprobs

__all__ = [
    "AlignedBatch",
    "Alignment",
    "FusedLinearDivergence",
    "FusedLinearOverlapDivergence",
    "FusedLinearSortedL1",
    "FusedLinearTopkDivergence",
    "GroupStatistics",
    "SpeculativeVerification",
    "TokenLogprobs",
    "TokenSamples",
    "TopkCodes",
    "TopkLaws",
    "TopkLogprobs",
    "align_batch",
    "align_tokens",
    "decode_topk",
    "divergence",
    "encode_topk",
    "fused_linear_divergence",
    "fused_linear_overlap_divergence",
    "fused_linear_sample_tokens",
    "fused_linear_sorted_l1",
    "fused_linear_speculative_verify",
    "fused_linear_token_logprobs",
    "fused_linear_topk",
    "fused_linear_topk_divergence",
    "group_statistics",
    "sample_tokens",
    "segment_broadcast",
    "segment_reduce",
    "segment_scan",
    "sorted_l1",
    "speculative_verify",
    "token_logprobs",
    "topk_divergence",
    "topk_logprobs",
]
