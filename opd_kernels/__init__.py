# SPDX-License-Identifier: Apache-2.0
"""Fused LM-head divergence kernels for on-policy distillation."""

from . import divergences, errors, reference, targets
from ._buffers import release_workspace
from ._dispatch import kernel_table, use_backend
from ._explain import explain
from .align_tokens import AlignedBatch, Alignment, align_batch, align_tokens
from .chunk_logprobs import ChunkIndex, chunk_index, chunk_logprobs
from .divergence import divergence
from .errors import AlignmentError, BuildError, OpdError, TokenBytesError, UnsupportedBackendError
from .fused_linear_divergence import FusedLinearDivergenceOutput, fused_linear_divergence
from .fused_linear_overlap_divergence import (
    FusedLinearOverlapDivergenceOutput,
    fused_linear_overlap_divergence,
)
from .fused_linear_sample_tokens import fused_linear_sample_tokens
from .fused_linear_sorted_l1 import FusedLinearSortedL1Output, fused_linear_sorted_l1
from .fused_linear_speculative_verify import fused_linear_speculative_verify
from .fused_linear_token_logprobs import fused_linear_token_logprobs
from .fused_linear_topk import fused_linear_topk
from .fused_linear_topk_divergence import (
    FusedLinearTopkDivergenceOutput,
    fused_linear_topk_divergence,
)
from .project_vocab import VocabProjection, project_vocab
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
from .token_bytes import TokenBytes
from .token_logprobs import TokenLogprobs, token_logprobs
from .topk_codec import (
    TopkCodes,
    TopkLaws,
    codec_status,
    decode_topk,
    encode_topk,
    topk_row_bytes,
)
from .topk_divergence import topk_divergence, topk_support
from .topk_logprobs import TopkLogprobs, topk_logprobs

__version__ = "0.1.0"

__all__ = [
    "AlignedBatch",
    "Alignment",
    "AlignmentError",
    "BuildError",
    "ChunkIndex",
    "FusedLinearDivergenceOutput",
    "FusedLinearOverlapDivergenceOutput",
    "FusedLinearSortedL1Output",
    "FusedLinearTopkDivergenceOutput",
    "GroupStatistics",
    "OpdError",
    "SpeculativeVerification",
    "TokenBytes",
    "TokenBytesError",
    "TokenLogprobs",
    "TokenSamples",
    "TopkCodes",
    "TopkLaws",
    "TopkLogprobs",
    "UnsupportedBackendError",
    "VocabProjection",
    "align_batch",
    "align_tokens",
    "chunk_index",
    "chunk_logprobs",
    "codec_status",
    "decode_topk",
    "divergence",
    "divergences",
    "encode_topk",
    "errors",
    "explain",
    "fused_linear_divergence",
    "fused_linear_overlap_divergence",
    "fused_linear_sample_tokens",
    "fused_linear_sorted_l1",
    "fused_linear_speculative_verify",
    "fused_linear_token_logprobs",
    "fused_linear_topk",
    "fused_linear_topk_divergence",
    "group_statistics",
    "kernel_table",
    "project_vocab",
    "reference",
    "release_workspace",
    "sample_tokens",
    "segment_broadcast",
    "segment_reduce",
    "segment_scan",
    "sorted_l1",
    "speculative_verify",
    "targets",
    "token_logprobs",
    "topk_divergence",
    "topk_logprobs",
    "topk_row_bytes",
    "topk_support",
    "use_backend",
]
