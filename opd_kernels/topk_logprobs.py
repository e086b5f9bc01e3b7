# SPDX-License-Identifier: Apache-2.0
"""The num_topk best tokens of softmax(z_t) and the mass of the rest, z_t made of logits[t]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws, reference
from ._registration import register
from .token_logprobs import pack_law

_OP = "topk_logprobs"


class TopkLogprobs(NamedTuple):
    """The best tokens of each law, and what they leave out; no gradient, nats.

    ids [T, K] int32, logprobs [T, K], lse, tail_logprob, entropy [T]. A place without a token is
    id -1, log-prob -inf. token_logprobs has the shape of token_ids, and is None without.
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
    backend: str | None = None,
) -> TopkLogprobs:
    """The num_topk most probable tokens of each row, and the log of the mass of all others.

    logprobs[t, k] = z[ids[t, k]] - lse[t],  lse[t] = log sum_v exp z_v,
    tail_logprob[t] = log sum_{v not in ids[t]} exp(z_v - lse[t]),  entropy[t] = -sum_v q_v log q_v,
    z = cap(logit_scale * logits[t]) / temperature[t],  cap(x) = c tanh(x / c).

    Args:
        logits: [T, V], float32 | bfloat16 | float16 (float64 on CPU). May require grad; the
            outputs have none.
        num_topk: K, from 1 to 4096. Best first; of equal z (-0.0 == 0.0) the smaller id. A z of
            -inf is no candidate: with fewer than K others, the rest is id -1, log-prob -inf.
        token_ids: [T] or [T, J] int64 or int32, J <= 4096, each below vocab_size: their log-probs
            from the same pass. Negative: no id, -inf. Checked on CPU; on a GPU it is the caller's
            contract.
        temperature: divides the logits; > 0. A number, or [T] without gradient.
        softcap: c of cap, Gemma's; > 0. None: no cap.
        logit_scale: multiplies the logits before the cap; not 0.
        vocab_size: the leading columns that count; the rest is not read.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

    Returns:
        TopkLogprobs in float32 (float64 for float64 logits), nats. tail_logprob is summed over the
        tokens outside and never 1 minus the rest; -inf exactly where nothing is outside. A row with
        a NaN or a +inf z has ids -1 and NaN elsewhere; so has a row of nothing but -inf, whose lse
        is -inf.

    Raises:
        ValueError: shapes or numbers that do not fit. TypeError: unsupported dtype.
        RuntimeError: an id beyond the vocabulary (on CPU). UnsupportedBackendError.

    Source: the teacher's compressed law of arXiv:1503.02531 and its bucketed tail.
    """
    _checks.tensor(_OP, "logits", logits, 2)
    _checks.floating(_OP, logits=logits)
    vocab_size = _checks.vocab_prefix(_OP, vocab_size, logits=logits.shape[1])
    num_topk = _checks.num_topk(_OP, num_topk, vocab_size)
    rows = _laws.rows_of(_OP, logits)
    law = pack_law(
        rows, vocab_size, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    table = id_table(rows, token_ids)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(logits), backend)
    if chosen == "reference":
        values = reference.topk_logprobs(
            logits,
            num_topk,
            token_ids=table,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
        )
    else:
        values = _dispatch.row_ops(chosen).topk_logprobs_fwd(
            _checks.unit_stride(logits.detach()), table, *law, num_topk
        )
    return outputs_of(values, token_ids, rows.real)


def id_table(rows: _laws.Rows, token_ids: Tensor | None) -> Tensor | None:
    """token_ids as [T, J] int64, or None."""
    if token_ids is None:
        return None
    table = _checks.id_table(rows, "token_ids", token_ids)
    if table.shape[1] > _checks.MAX_TOPK:
        raise ValueError(
            f"{rows.op}: token_ids must have at most {_checks.MAX_TOPK} columns, got "
            f"{table.shape[1]}. Score more of them in several calls."
        )
    return table


def outputs_of(
    values: tuple[Tensor, ...], token_ids: Tensor | None, real: torch.dtype
) -> TopkLogprobs:
    """What a call returns, from what a row kernel or the reference does."""
    ids, *reals, at_ids = values
    if token_ids is None:
        at_ids = None
    else:
        at_ids = at_ids.reshape(token_ids.shape).to(real)
    return TopkLogprobs(ids, *(value.to(real) for value in reals), at_ids)


def fwd_outputs(
    like: Tensor, token_ids: Tensor | None, num_topk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs for the rows of `like`; lse in float64."""
    num_tokens, real = like.shape[0], _checks.real_dtype(like)
    num_ids = 0 if token_ids is None else token_ids.shape[1]
    return (
        like.new_empty(num_tokens, num_topk, dtype=torch.int32),
        like.new_empty(num_tokens, num_topk, dtype=real),
        like.new_empty(num_tokens, dtype=torch.float64),
        like.new_empty(num_tokens, dtype=real),
        like.new_empty(num_tokens, dtype=real),
        like.new_empty(num_tokens, num_ids, dtype=real),
    )


def _fwd_fake(logits, token_ids, bias, temperatures, numbers, vocab_size, num_topk):
    return fwd_outputs(logits, token_ids, num_topk)


def _triton_fwd(*arguments):
    from .triton import topk_logprobs as kernels

    return kernels.topk_logprobs_fwd(*arguments)


register("topk_logprobs_fwd", fake=_fwd_fake, triton=_triton_fwd)
