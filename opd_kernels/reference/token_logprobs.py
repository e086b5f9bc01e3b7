# SPDX-License-Identifier: Apache-2.0
"""logprobs[t] = log softmax(logits[t] / temperature)[token_ids[t]], lse and entropy, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import entropy as _entropy


class TokenLogprobs(NamedTuple):
    """logprobs, lse, entropy: [T] float64, nats, all differentiable."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TokenLogprobs:
    """Log-probability of one token per row, with log-sum-exp and entropy.

    logprobs[t] = logits[t, token_ids[t]] / temperature - lse[t]
    lse[t] = log sum_v exp(logits[t, v] / temperature)

    Args:
        logits: [T, >= V], any floating dtype; upcast to float64. Differentiable.
        token_ids: [T] integers in [0, V).
        temperature: divides the logits; > 0.
        vocab_size: V. Default: every column.

    Returns:
        TokenLogprobs, [T] float64 each, nats.

    Source: the definition of a softmax; entropy is Shannon's, -sum_v q_v log q_v.
    """
    scaled = logits[..., :vocab_size].to(torch.float64) / float(temperature)
    logprobs = torch.log_softmax(scaled, dim=-1)
    chosen = logprobs.gather(-1, token_ids.to(torch.int64).unsqueeze(-1)).squeeze(-1)
    return TokenLogprobs(chosen, scaled.logsumexp(-1), _entropy(logprobs))
