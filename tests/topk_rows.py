# SPDX-License-Identifier: Apache-2.0
"""The row kernels of topk_divergence in plain torch, at any precision, for the tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels.token_logprobs import Law


class Rows(NamedTuple):
    """What topk_divergence_fwd returns."""

    logprobs: Tensor
    tail_logprob: Tensor
    lse: Tensor
    entropy: Tensor


def ids_of(num_tokens: int, vocab_size: int, num_ids: int, seed: int) -> Tensor:
    """[T, K] int64, distinct in a row and in no order, some of them none; the first and the last
    column of the vocabulary are among them where there is room."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num_tokens):
        between = 1 + torch.randperm(max(vocab_size - 2, 0), generator=generator)
        ids = torch.cat([torch.tensor([0, vocab_size - 1])[:vocab_size], between])
        ids = torch.cat([ids, torch.full((num_ids,), -100)])[:num_ids]
        ids[(torch.arange(num_ids) + row) % 5 == 4] = -1
        rows.append(ids[torch.randperm(num_ids, generator=generator)])
    return torch.stack(rows)


def law_logits(logits: Tensor, law: Law, dtype: torch.dtype) -> Tensor:
    """What the law is the softmax of, [T, vocab_size]."""
    scale, softcap, temperature = law.numbers
    z = logits[:, : law.vocab_size].to(dtype)
    if law.bias is not None:
        z = z + law.bias[: law.vocab_size].to(dtype)
    z = z * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature if law.temperatures is None else law.temperatures.to(dtype)[:, None])


def _on(ids: Tensor, vocab_size: int) -> Tensor:
    """[T, V] bool: the columns of the ids."""
    on = torch.zeros(ids.shape[0], vocab_size + 1, dtype=torch.bool, device=ids.device)
    return on.scatter(1, torch.where(ids < 0, vocab_size, ids), True)[:, :vocab_size]


def forward(logits: Tensor, ids: Tensor, law: Law, dtype: torch.dtype) -> Rows:
    """The four outputs, in `dtype`."""
    z = law_logits(logits, law, dtype)
    logq = z.log_softmax(1)
    logprobs = logq.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -math.inf)
    lse = z.logsumexp(1)
    tail = z.masked_fill(_on(ids, law.vocab_size), -math.inf).logsumexp(1) - lse
    entropy = -(logq.exp() * logq.masked_fill(logq == -math.inf, 0.0)).sum(1)
    return Rows(logprobs, tail, lse, entropy)


def backward(
    logits: Tensor,
    ids: Tensor,
    grad_ids: Tensor,
    grad_rest: Tensor,
    lse: Tensor,
    law: Law,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of all columns, in `dtype`; scale, softcap and temperature by autograd."""
    leaf = logits.detach().to(dtype).requires_grad_()
    z = law_logits(leaf, law, dtype)
    on = _on(ids, law.vocab_size)
    q = (z.detach() - lse.to(dtype)[:, None]).exp().masked_fill(on, 0.0)
    upstream = torch.cat([grad_rest.to(dtype)[:, None] * q, q.new_zeros(len(ids), 1)], dim=1)
    at_ids = torch.where(ids < 0, law.vocab_size, ids)
    upstream = upstream.to(dtype).scatter(1, at_ids, grad_ids.to(dtype))
    z.backward(upstream[:, : law.vocab_size])
    return leaf.grad
