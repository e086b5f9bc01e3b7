# SPDX-License-Identifier: Apache-2.0
"""The float64 truth: each op from its definition, whole tensors, gradients by autograd alone."""

from .divergence import divergence
from .fused_linear_divergence import FusedLinearDivergence, fused_linear_divergence
from .fused_linear_token_logprobs import fused_linear_token_logprobs
from .token_logprobs import TokenLogprobs, token_logprobs

__all__ = [
    "FusedLinearDivergence",
    "TokenLogprobs",
    "divergence",
    "fused_linear_divergence",
    "fused_linear_token_logprobs",
    "token_logprobs",
]
