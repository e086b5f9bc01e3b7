# SPDX-License-Identifier: Apache-2.0
"""Fused LM-head divergence kernels for on-policy distillation."""

from . import divergences, errors, reference, targets
from ._buffers import release_workspace
from ._dispatch import kernel_table, use_backend
from ._explain import explain
from .divergence import divergence
from .errors import BuildError, OpdError, UnsupportedBackendError
from .fused_linear_divergence import FusedLinearDivergenceOutput, fused_linear_divergence
from .fused_linear_sample_tokens import fused_linear_sample_tokens
from .fused_linear_token_logprobs import fused_linear_token_logprobs
from .fused_linear_topk import fused_linear_topk
from .sample_tokens import TokenSamples, sample_tokens
from .segment_scan import (
    GroupStatistics,
    group_statistics,
    segment_broadcast,
    segment_reduce,
    segment_scan,
)
from .token_logprobs import TokenLogprobs, token_logprobs
from .topk_logprobs import TopkLogprobs, topk_logprobs

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "FusedLinearDivergenceOutput",
    "GroupStatistics",
    "OpdError",
    "TokenLogprobs",
    "TokenSamples",
    "TopkLogprobs",
    "UnsupportedBackendError",
    "divergence",
    "divergences",
    "errors",
    "explain",
    "fused_linear_divergence",
    "fused_linear_sample_tokens",
    "fused_linear_token_logprobs",
    "fused_linear_topk",
    "group_statistics",
    "kernel_table",
    "reference",
    "release_workspace",
    "sample_tokens",
    "segment_broadcast",
    "segment_reduce",
    "segment_scan",
    "targets",
    "token_logprobs",
    "topk_logprobs",
    "use_backend",
]
