# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn from a proposal and their importance weights, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TokenSamples(NamedTuple):
    """ids [T, N] int32, ascending, then -1; weights, logprobs [T, N], lse [T] float64, nats."""

    ids: Tensor
    weights: Tensor
    logprobs: Tensor
    lse: Tensor


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    proposal_temperature: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> TokenSamples:
    """N draws per row from r, as distinct tokens whose weights are the law p on average.

    p = softmax(z),  r = softmax(z / proposal_temperature),  z = cap(scale * logits) / temperature,
    draw[t, n] = min {v : r_0 + .. + r_v > uniforms[t, n]},  weight = count / N * p / r

    Args:
        logits: [T, >= V], any floating dtype; upcast to float64.
        uniforms: [T, N] in [0, 1).
        proposal_temperature: > 0; above 1 draws more of the tail, 1 draws from p itself.
        temperature: divides the logits; > 0. A number or [T].
        softcap: c of cap(x) = c tanh(x / c); None for none.
        logit_scale: factor before cap.
        vocab_size: V. Default: every column.

    Returns:
        TokenSamples without gradient, nats; -1, 0 and -inf where there is no token. A row with a
        NaN or +inf, or of nothing but -inf, has ids -1 and NaN elsewhere; the last's lse is -inf.

    Source: random-sampling knowledge distillation, arXiv:2503.16870.
    """
    scaled = logit_scale * logits.detach()[..., :vocab_size].to(torch.float64)
    if softcap is not None:
        scaled = softcap * torch.tanh(scaled / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(torch.float64).unsqueeze(-1)
    scaled = scaled / temperature
    broken = (scaled.isnan() | (scaled == math.inf)).any(-1)
    lse = scaled.logsumexp(-1).masked_fill(broken, math.nan)
    law = torch.log_softmax(scaled, -1)
    proposal = torch.log_softmax(scaled / proposal_temperature, -1)
    shape = uniforms.shape
    ids = torch.full(shape, -1, dtype=torch.int32)
    weights = torch.zeros(shape, dtype=torch.float64)
    logprobs = torch.full(shape, -math.inf, dtype=torch.float64)
    for t in range(len(scaled)):
        if broken[t] or lse[t] == -math.inf:
            weights[t], logprobs[t] = math.nan, math.nan
            continue
        possible = (proposal[t].exp() > 0).nonzero().squeeze(1)
        upto = proposal[t][possible].exp().cumsum(0)
        places = torch.searchsorted(upto, uniforms[t].to(upto), right=True)
        draws = possible[places.clamp(max=len(possible) - 1)]
        found, counts = draws.unique(sorted=True, return_counts=True)
        ids[t, : len(found)] = found.to(torch.int32)
        ratio = (law[t, found] - proposal[t, found]).exp()
        weights[t, : len(found)] = counts.to(torch.float64) / shape[1] * ratio
        logprobs[t, : len(found)] = law[t, found]
    device = logits.device
    return TokenSamples(ids.to(device), weights.to(device), logprobs.to(device), lse)
