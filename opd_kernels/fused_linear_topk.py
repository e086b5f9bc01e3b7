# SPDX-License-Identifier: Apache-2.0
"""The best tokens of softmax(z_t), z_t made of hidden[t] @ W.T; no [T, V] is ever formed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import (
    _checks,
    _dispatch,
    _laws,
    _linear,
    _one_head,
    _parallel,
    _plan,
    _topk_shards,
    reference,
)
from ._registration import register
from .token_logprobs import pack_law
from .topk_logprobs import TopkLogprobs, fwd_outputs, id_table, outputs_of

_OP = "fused_linear_topk"


def fused_linear_topk(
    hidden: Tensor,
    lm_head_weight: Tensor,
    *,
    num_topk: int,
    token_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> TopkLogprobs:
    """The num_topk most probable tokens of each position, and the log of the mass of all others.

    logprobs[t, k] = z_t[ids[t, k]] - lse[t],  lse[t] = log sum_v exp z_t[v],
    tail_logprob[t] = log sum_{v not in ids[t]} exp(z_t[v] - lse[t]),
    z_t = cap(logit_scale * (hidden[t] @ W.T + bias)) / temperature[t],  cap(x) = c tanh(x / c).

    Args:
        hidden: [T, D], float32 | bfloat16 | float16 (float64 on CPU). Like every tensor here it may
            require grad; the outputs have none.
        lm_head_weight: [V, D] of the same dtype, one row per token.
        num_topk: K, from 1 to 4096. Best first; of equal z the smaller id. A z of -inf is no
            candidate: with fewer than K others, the rest is id -1, log-prob -inf.
        token_ids: [T] or [T, J] int64 or int32, J <= 4096, each below vocab_size: their log-probs
            from the same pass. Negative: no id, -inf. Checked on CPU; on a GPU it is the caller's
            contract.
        temperature: divides the logits; > 0. A number, or [T] without gradient.
        bias: [V] of the head.
        softcap: c of cap, Gemma's; > 0. None: no cap.
        logit_scale: multiplies the logits before the cap, Cohere's; not 0.
        lora: (A [r, D], B [V, r], scaling): the head is W + scaling * B @ A, which is never formed.
        vocab_size: the leading rows of the head that count; with a process_group, of all ranks.
        workspace_bytes: budget for logits and other temporaries.
        process_group: each rank holds the next rows of the head (of bias and of B), as torch.chunk
            cuts them, and the same hidden states; ids are those of the whole head, and every rank
            gets the whole result. DTensor heads bring their own.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

    Returns:
        TopkLogprobs in float32 (float64 for float64), nats, on every rank alike. tail_logprob is
        summed over the tokens outside; -inf exactly where nothing is outside.

    Raises:
        ValueError: shapes, ranges, ids (on CPU) or a workspace that do not fit.
        TypeError: unsupported dtype. UnsupportedBackendError.

    Notes:
        FLOPs 2TVD. Ranks exchange one message per call, of 2K + J + 3 float64 per token.

    Source: the teacher's compressed law of arXiv:1503.02531 and its bucketed tail.
    """
    heads, group = _parallel.local_heads(_OP, {"lm_head_weight": lm_head_weight}, process_group)
    hidden, lm_head_weight = _checks.autocast_pair(hidden, heads["lm_head_weight"])
    _checks.hidden_and_head(_OP, "", hidden, lm_head_weight)
    _checks.floating(_OP, hidden=hidden)
    _checks.same_device(_OP, hidden=hidden, lm_head_weight=lm_head_weight)
    widths = {"lm_head_weight": lm_head_weight.shape[0]}
    total_size, group_name = _parallel.vocabulary(_OP, vocab_size, widths, group)
    num_topk = _checks.num_topk(_OP, num_topk, total_size)
    shard = _parallel.resolve(group_name)
    local_size = total_size if shard is None else shard.num_columns
    rows = _laws.rows_of(_OP, hidden)
    law = pack_law(
        rows,
        local_size,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        bias=bias.detach() if isinstance(bias, Tensor) else bias,
    )
    low_rank = _checks.lora(rows, lora, lm_head_weight, "lora")
    table = id_table(rows, token_ids)
    planned = _parallel.planned_size(group_name, local_size)
    _plan.check(_OP, planned, (lm_head_weight,), workspace_bytes, whole_rows=_plan.NO_PATH_B)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(hidden), backend)
    if chosen == "reference":
        if group is not None:
            raise ValueError(
                f"{_OP}: backend 'reference' must be used without process_group: it forms the "
                "logits of a whole head."
            )
        values = reference.fused_linear_topk(
            hidden,
            lm_head_weight,
            num_topk=num_topk,
            token_ids=table,
            temperature=temperature,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            lora=lora,
            vocab_size=vocab_size,
        )
    else:
        tensors = [
            None if tensor is None else tensor.detach()
            for tensor in (hidden, lm_head_weight, *low_rank)
        ]
        values = torch.ops.opd.fused_linear_topk_fwd(
            *tensors, table, *law, num_topk, workspace_bytes, group_name, chosen
        )
    return outputs_of(values, token_ids, rows.real)


def _fwd(*arguments):
    inputs, law, (num_topk, workspace_bytes, group_name, backend) = _one_head.split(arguments)
    shard, kernels = _parallel.resolve(group_name), _dispatch.row_ops(backend)
    total_size = law.vocab_size if shard is None else shard.total_columns
    table = inputs.per_token
    if table is not None:
        _checks.token_ids_in_range(_OP, table, total_size, padding=True)
    plan = inputs.plan(_OP, _parallel.planned_size(group_name, law.vocab_size), workspace_bytes)
    part = None
    if shard is None:
        outputs = fwd_outputs(inputs.hidden, table, num_topk)
    else:
        num_topk_here = min(num_topk, law.vocab_size)
        outputs = fwd_outputs(inputs.hidden, None, num_topk_here)
        part = _topk_shards.Part.of(inputs.hidden, table, num_topk_here, shard.first_column)

    def rows(logits: Tensor, here: slice) -> tuple[Tensor, ...]:
        ids = table[here] if table is not None and shard is None else None
        values = kernels.topk_logprobs_fwd(logits, ids, *law.rows(here), outputs[0].shape[1])
        if part is not None:
            part.read(logits, values[0], law.rows(here), here)
        return values

    _one_head.fill(_OP, outputs, inputs, law, plan, rows)
    if part is None:
        return outputs
    with _linear.phase(inputs.hidden, _OP, "exchange"):
        return _topk_shards.merge(part, outputs, shard.group, num_topk)


def _fwd_fake(*arguments):
    inputs, _, (num_topk, *_) = _one_head.split(arguments)
    return fwd_outputs(inputs.hidden, inputs.per_token, num_topk)


register("fused_linear_topk_fwd", fake=_fwd_fake, python=_fwd)
