# SPDX-License-Identifier: Apache-2.0
"""The num_topk largest log-probabilities of a row and the mass that they leave out, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import entropy as _entropy


class TopkLogprobs(NamedTuple):
    """ids [T, K] int32; logprobs [T, K], lse, tail_logprob, entropy [T] float64, nats.

    token_logprobs has the shape of token_ids, and is None without.
    """

    ids: Tensor
    logprobs: Tensor
    lse: Tensor
    tail_logprob: Tensor
    entropy: Tensor
    token_logprobs: Tensor | None


def topk_logprobs(
    logits: Tensor,
    num_topk: int,
    *,
    token_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> TopkLogprobs:
    """The num_topk most probable tokens of each row, and log of the mass of all others.

    logprobs[t, k] = z[ids[t, k]] - lse[t],  lse[t] = log sum_v exp z_v,
    tail_logprob[t] = log sum_{v not in ids[t]} exp(z_v - lse[t]),
    z = cap(logit_scale * logits[t]) / temperature[t],  cap(x) = c tanh(x / c)

    Args:
        logits: [T, >= V], any floating dtype; upcast to float64.
        num_topk: K. Of equal logits the smaller id counts first; -inf is no candidate: what is
            left of K is id -1, log-prob -inf.
        token_ids: [T] or [T, J] integers below V; negative is no id, and gives -inf.
        temperature: divides the logits; > 0. A number or [T].
        softcap: c of cap; None for none.
        logit_scale: factor before cap.
        vocab_size: V. Default: every column.

    Returns:
        TopkLogprobs without gradient, nats. A row with a NaN or +inf has ids -1 and NaN elsewhere;
        so has a row of nothing but -inf, whose lse is -inf.

    Source: the definition of a softmax and of an order; entropy is Shannon's.
    """
    scaled = logit_scale * logits.detach()[..., :vocab_size].to(torch.float64)
    if softcap is not None:
        scaled = softcap * torch.tanh(scaled / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(torch.float64).unsqueeze(-1)
    scaled = scaled / temperature
    broken = (scaled.isnan() | (scaled == math.inf)).any(-1)
    lawless = broken | (scaled == -math.inf).all(-1)
    lse = scaled.logsumexp(-1).masked_fill(broken, math.nan)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    best, ids = ordered[:, :num_topk], order[:, :num_topk]
    is_padding = (best == -math.inf) | lawless[:, None]
    rows = lse[:, None]
    logprobs = (best - rows).masked_fill(best == -math.inf, -math.inf)
    tail = ordered[:, num_topk:].logsumexp(-1) - lse
    entropy = _entropy(torch.log_softmax(scaled, dim=-1))
    at_ids = None
    if token_ids is not None:
        table = token_ids.to(torch.int64)
        table = table.unsqueeze(-1) if table.dim() == 1 else table
        at_ids = scaled.gather(-1, table.clamp(min=0)).masked_fill(table < 0, -math.inf) - rows
        at_ids = at_ids.masked_fill(lawless[:, None], math.nan).reshape(token_ids.shape)
    return TopkLogprobs(
        ids.masked_fill(is_padding, -1).to(torch.int32),
        logprobs.masked_fill(lawless[:, None], math.nan),
        lse,
        tail.masked_fill(lawless, math.nan),
        entropy.masked_fill(lawless, math.nan),
        at_ids,
    )
