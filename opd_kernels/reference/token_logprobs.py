# SPDX-License-Identifier: Apache-2.0
"""logprobs[t] = log softmax(z_t)[token_ids[t]], lse and entropy, in float64; z_t from logits[t]."""

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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> TokenLogprobs:
    """Log-probability of one token per row, with log-sum-exp and entropy.

    logprobs[t] = z[token_ids[t]] - lse[t],  lse[t] = log sum_v exp z_v
    z = cap(logit_scale * logits[t]) / temperature[t],  cap(x) = c tanh(x / c)

    Args:
        logits: [T, >= V], any floating dtype; upcast to float64. Differentiable.
        token_ids: [T] integers in [0, V).
        temperature: divides the logits; > 0. A number or [T].
        softcap: c of cap; None for none.
        logit_scale: factor before cap.
        vocab_size: V. Default: every column.

    Returns:
        TokenLogprobs, [T] float64 each, nats.

    Source: the definition of a softmax; entropy is Shannon's, -sum_v q_v log q_v; the cap is
    Gemma 2's, arXiv:2408.00118.
    """
    scaled = logit_scale * logits[..., :vocab_size].to(torch.float64)
    if softcap is not None:
        scaled = softcap * torch.tanh(scaled / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(torch.float64).unsqueeze(-1)
    scaled = scaled / temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    chosen = logprobs.gather(-1, token_ids.to(torch.int64).unsqueeze(-1)).squeeze(-1)
    return TokenLogprobs(chosen, scaled.logsumexp(-1), _entropy(logprobs))
