# SPDX-License-Identifier: Apache-2.0
"""log softmax(z_t)[token_ids[t]], z_t made of hidden[t] @ W.T; no [T, V] is ever formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws, _linear, reference
from ._registration import register
from .token_logprobs import Law, TokenLogprobs, fwd_outputs, pack_law

_OP = "fused_linear_token_logprobs"


def fused_linear_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of one token per position from hidden states, through the LM head.

    logprobs[t] = z_t[token_ids[t]] - lse[t],
    z_t = cap(logit_scale * (hidden[t] @ W.T + bias)) / temperature[t],  cap(x) = c tanh(x / c),
    lse[t] = log sum_v exp z_t[v],  entropy[t] = -sum_v q_v log q_v.

    Args:
        hidden: [T, D], float32 | bfloat16 | float16 (float64 on CPU).
        lm_head_weight: [V, D] of the same dtype, one row per token.
        token_ids: [T] int64 or int32, each in [0, vocab_size). Drop ignored positions (-100) before
            the call. Checked on CPU; on a GPU it is the caller's contract.
        temperature: divides the logits; > 0. A number, or [T] without gradient.
        bias: [V] of the head, differentiable.
        softcap: c of cap, Gemma's; > 0. None: no cap.
        logit_scale: multiplies the logits before the cap, Cohere's; not 0.
        lora: (A [r, D], B [V, r], scaling): the head is W + scaling * B @ A, which is never formed.
            A and B are differentiable; freeze W and no gradient of it exists.
        vocab_size: the leading rows of the head that count.
        workspace_bytes: budget for logits and other temporaries; the gradients come on top.
        backend: "cpu" | "triton" | "reference"; None picks one.

    Returns:
        TokenLogprobs of [T] float32 (float64 for float64), nats, all three differentiable in
        hidden, lm_head_weight, bias and lora.

    Raises:
        ValueError: shapes, ranges, ids (on CPU) or a workspace that do not fit.
        TypeError: unsupported dtype. UnsupportedBackendError.

    Notes:
        FLOPs 2TVD forward; backward recomputes the logits: 6TVD, 4TVD with the head frozen.

    Source: chosen-token access of arXiv:2306.08543 and of policy-gradient distillation.
    """
    hidden, lm_head_weight = _checks.autocast_pair(hidden, lm_head_weight)
    _checks.hidden_and_head(_OP, "", hidden, lm_head_weight)
    _checks.floating(_OP, hidden=hidden)
    _checks.same_device(_OP, hidden=hidden, lm_head_weight=lm_head_weight)
    vocab_size = _checks.vocab_prefix(_OP, vocab_size, lm_head_weight=lm_head_weight.shape[0])
    rows = _laws.rows_of(_OP, hidden)
    law = pack_law(
        rows,
        vocab_size,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        bias=bias,
    )
    low_rank = _checks.lora(rows, lora, lm_head_weight, "lora")
    token_ids = _checks.token_ids(_OP, token_ids, hidden.shape[0], hidden.device)
    inputs = Inputs(hidden, lm_head_weight, *low_rank, token_ids)
    _plan(inputs, law, workspace_bytes, hidden.shape[0])
    chosen = _dispatch.select(_OP, _dispatch.meta_of(hidden), backend)
    if chosen == "reference":
        values = reference.fused_linear_token_logprobs(
            hidden,
            lm_head_weight,
            token_ids,
            temperature=temperature,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            lora=lora,
            vocab_size=vocab_size,
        )
    else:
        _checks.no_forward_mode(_OP, hidden, lm_head_weight)
        values = torch.ops.opd.fused_linear_token_logprobs_fwd(
            *inputs, *law, workspace_bytes, chosen
        )
    return TokenLogprobs(*(value.to(rows.real) for value in values))


class Inputs(NamedTuple):
    """The tensors of OPD_LINEAR in csrc/torch/ops.cpp; the low-rank pair carries its scale in A."""

    hidden: Tensor
    lm_head_weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    token_ids: Tensor

    def low_rank(self) -> _linear.LowRank | None:
        if self.lora_a is None:
            return None
        real = _checks.real_dtype(self.hidden)
        return _linear.LowRank(self.lora_a.to(real), self.lora_b.to(real))


_NUM_INPUTS, _NUM_LAW = len(Inputs._fields), len(Law._fields)
# where the differentiable tensors are among the arguments: hidden, head, bias, A and B
_DIFFERENTIABLE = (0, 1, _NUM_INPUTS, 2, 3)


def _split(arguments: Sequence) -> tuple[Inputs, Law, list]:
    law = _NUM_INPUTS + _NUM_LAW
    return (
        Inputs(*arguments[:_NUM_INPUTS]),
        Law(*arguments[_NUM_INPUTS:law]),
        list(arguments[law:]),
    )


def _plan(inputs: Inputs, law: Law, workspace_bytes: int, num_tokens: int) -> _linear.Plan:
    return _linear.plan(
        _OP,
        num_tokens,
        law.vocab_size,
        (inputs.lm_head_weight,),
        workspace_bytes,
        whole_rows=_linear.NO_PATH_B,
    )


def _form_logits(
    logits: Tensor,
    chunk: Tensor,
    head: Tensor,
    low_rank: _linear.LowRank | None,
    head_slice_rows: int,
) -> Tensor | None:
    """Fills `logits`; returns chunk @ A.T of the low-rank pair."""
    with _linear.phase(chunk, _OP, "logits"):
        _linear.logits_into(logits, chunk, head, head_slice_rows)
        if low_rank is None:
            return None
        projected = low_rank.project(chunk)
        low_rank.add_logits(logits, projected)
        return projected


def _fwd(*arguments):
    inputs, law, (workspace_bytes, backend) = _split(arguments)
    rows = _dispatch.row_ops(backend)
    _checks.token_ids_in_range(_OP, inputs.token_ids, law.vocab_size)
    plan = _plan(inputs, law, workspace_bytes, inputs.hidden.shape[0])
    outputs = fwd_outputs(inputs.hidden)
    low_rank = inputs.low_rank()
    buffer = _linear.new_buffer(inputs.hidden, plan.chunk_tokens, law.vocab_size)
    for begin, end in plan.chunks():
        chunk = _linear.take(inputs.hidden, None, begin, end)
        logits = buffer[: end - begin]
        _form_logits(logits, chunk, inputs.lm_head_weight, low_rank, plan.head_slice_rows)
        with _linear.phase(chunk, _OP, "rows"):
            here = slice(begin, end)
            values = rows.token_logprobs_fwd(logits, inputs.token_ids[here], *law.rows(here))
        for output, value in zip(outputs, values, strict=True):
            output[begin:end] = value
    return outputs


def _fwd_fake(hidden, *_):
    return fwd_outputs(hidden)


def _fwd_setup_context(ctx, inputs, output):
    _, lse, entropy = output
    tensors = _NUM_INPUTS + 2
    ctx.save_for_backward(*inputs[:tensors], lse, entropy)
    *ctx.numbers, ctx.workspace_bytes, ctx.backend = inputs[tensors:]
    ctx.num_inputs = len(inputs)


def _fwd_backward(_):
    def backward(ctx, grad_logprobs, grad_lse, grad_entropy):
        wanted = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
        *inputs, bias, temperatures, lse, entropy = ctx.saved_tensors
        formed = torch.ops.opd.fused_linear_token_logprobs_bwd(
            grad_logprobs.contiguous(),
            grad_lse.contiguous(),
            grad_entropy.contiguous(),
            *inputs,
            lse,
            entropy,
            bias,
            temperatures,
            *ctx.numbers,
            ctx.workspace_bytes,
            wanted,
            ctx.backend,
        )
        gradients = [None] * ctx.num_inputs
        for position, want, gradient in zip(_DIFFERENTIABLE, wanted, formed, strict=True):
            if want:
                gradients[position] = gradient
        return tuple(gradients)

    return backward


def _sources(inputs: Inputs, law: Law) -> tuple[Tensor | None, ...]:
    return (*inputs[:2], law.bias, *inputs[2:4])


def _bwd(grad_logprobs, grad_lse, grad_entropy, *arguments):
    *tensors, lse, entropy = arguments[: _NUM_INPUTS + 2]
    inputs, law, (workspace_bytes, with_grads, backend) = _split(
        (*tensors, *arguments[_NUM_INPUTS + 2 :])
    )
    hidden, head = inputs[:2]
    rows, low_rank, real = _dispatch.row_ops(backend), inputs.low_rank(), entropy.dtype
    # tokens without an upstream gradient (a masked loss) cost nothing
    token_idx = _linear.active_tokens((grad_logprobs != 0) | (grad_lse != 0) | (grad_entropy != 0))
    num_active = token_idx.shape[0]
    plan = _plan(inputs, law, workspace_bytes, num_active)
    with_hidden, with_head, *_ = with_grads
    grad_hidden = hidden.new_zeros(hidden.shape) if with_hidden else None
    grad_head = _linear.new_grad_weight(head, law.vocab_size, num_active) if with_head else None
    grad_bias, grad_down, grad_up = (
        torch.zeros_like(source, dtype=real) if wanted else None
        for source, wanted in zip(_sources(inputs, law)[2:], with_grads[2:], strict=True)
    )
    per_token = (grad_logprobs, grad_lse, grad_entropy, inputs.token_ids, lse, entropy)
    buffer = _linear.new_buffer(hidden, plan.chunk_tokens, law.vocab_size)

    def run_chunk(begin: int, end: int) -> None:
        here = token_idx[begin:end]
        chunk = _linear.take(hidden, token_idx, begin, end)
        *upstream, token_ids, chunk_lse, chunk_entropy = (values[here] for values in per_token)
        logits = buffer[: end - begin]
        projected = _form_logits(logits, chunk, head, low_rank, plan.head_slice_rows)
        with _linear.phase(chunk, _OP, "rows"):
            rows.token_logprobs_bwd_(
                *upstream, logits, token_ids, chunk_lse, chunk_entropy, *law.rows(here)
            )
        grad_chunk = None
        if grad_hidden is not None:
            with _linear.phase(chunk, _OP, "grad_hidden"):
                grad_chunk = _linear.grad_hidden(logits, head, plan.head_slice_rows)
        if grad_head is not None:
            with _linear.phase(chunk, _OP, "grad_weight"):
                _linear.accumulate_grad_weight(grad_head, logits, chunk, first=begin == 0)
        if grad_bias is not None:
            grad_bias[: law.vocab_size] += logits.sum(0)
        if low_rank is not None:
            low_rank.backproject(logits, chunk, projected, (grad_chunk, grad_down, grad_up))
        if grad_hidden is not None:
            _linear.put(grad_hidden, token_idx, begin, end, grad_chunk)

    for begin, end in plan.chunks():
        run_chunk(begin, end)
    formed = (grad_hidden, grad_head, grad_bias, grad_down, grad_up)
    return tuple(
        hidden.new_empty(0) if gradient is None else gradient.to(source.dtype)
        for gradient, source in zip(formed, _sources(inputs, law), strict=True)
    )


def _bwd_fake(grad_logprobs, grad_lse, grad_entropy, *arguments):
    inputs, law, (_, with_grads, _) = _split(
        (*arguments[:_NUM_INPUTS], *arguments[_NUM_INPUTS + 2 :])
    )
    hidden = inputs.hidden
    return tuple(
        hidden.new_empty(source.shape, dtype=source.dtype) if wanted else hidden.new_empty(0)
        for source, wanted in zip(_sources(inputs, law), with_grads, strict=True)
    )


register(
    "fused_linear_token_logprobs_fwd",
    fake=_fwd_fake,
    setup_context=_fwd_setup_context,
    backward=_fwd_backward,
    python=_fwd,
)
register(
    "fused_linear_token_logprobs_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    python=_bwd,
)
