# SPDX-License-Identifier: Apache-2.0
"""Hidden states to what a reply has: the best tokens, chosen tokens' log-probs, the entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opd_kernels as opk
from opd.batch import Head


class TopkRows(NamedTuple):
    """Of R laws; as `opd_kernels.fused_linear_topk` returns them."""

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    entropy: Tensor
    token_logprobs: Tensor


@torch.no_grad()
def topk_rows(
    hidden: Tensor,
    head: Head,
    *,
    num_topk: int,
    token_ids: Tensor,
    temperature: float,
    vocab_size: int,
    workspace_bytes: int = 1 << 28,
) -> TopkRows:
    """p = softmax(logits / temperature) over the first `vocab_size` tokens: its K best, and more.

    Args:
        hidden: [R, D].
        head: what makes logits of them.
        num_topk: K, at most vocab_size.
        token_ids: [R, J] int64, further ids whose log-probs are wanted; -1: no id.

    Returns:
        ids [R, K] int32, logprobs [R, K], tail_logprob [R], entropy [R], token_logprobs [R, J],
        float32, nats.
    """
    if not hasattr(opk, "fused_linear_topk"):
        return _chunked_topk(
            hidden,
            head,
            num_topk=num_topk,
            token_ids=token_ids,
            temperature=temperature,
            vocab_size=vocab_size,
            workspace_bytes=workspace_bytes,
        )
    found = opk.fused_linear_topk(
        hidden,
        head.weight,
        num_topk=num_topk,
        token_ids=token_ids,
        temperature=temperature,
        **head.options(),
        vocab_size=vocab_size,
        workspace_bytes=workspace_bytes,
    )
    return TopkRows(
        found.ids, found.logprobs, found.tail_logprob, found.entropy, found.token_logprobs
    )


def _chunked_topk(hidden, head, *, num_topk, token_ids, temperature, vocab_size, workspace_bytes):
    """Until `fused_linear_topk` is there: whole rows of float32 logits, a few at a time."""
    rows = max(1, workspace_bytes // (16 * head.weight.shape[0]))
    parts = []
    for chunk, ids in zip(hidden.split(rows), token_ids.split(rows), strict=True):
        law = (head.logits(chunk)[:, :vocab_size] / temperature).log_softmax(-1)
        best = law.topk(num_topk)
        outside = law.scatter(1, best.indices, -torch.inf)
        terms = torch.where(law == -torch.inf, 0.0, law * law.exp())
        chosen = law.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        best_ids = best.indices.masked_fill(best.values == -torch.inf, -1)
        entropy, tail = -terms.sum(1), outside.logsumexp(1)
        parts.append(TopkRows(best_ids.int(), best.values, tail, entropy, chosen))
    return TopkRows(*(torch.cat(column) for column in zip(*parts, strict=True)))
