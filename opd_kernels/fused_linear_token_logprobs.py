# SPDX-License-Identifier: Apache-2.0
"""log softmax(z_t)[token_ids[t]], z_t made of hidden[t] @ W.T; no [T, V] is ever formed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import (
    _buffers,
    _checks,
    _dispatch,
    _gemms,
    _grad_sums,
    _laws,
    _linear,
    _one_head,
    _plan,
    reference,
)
from ._one_head import NUM_INPUTS, Inputs
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
    lm_head_weight_grad: Tensor | None = None,
    compact_tokens: bool | None = None,
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
        lm_head_weight_grad: float32 (float64) [V, D], a main_grad: backward adds dW to it; the head
            gets no .grad, and no other dW exists.
        compact_tokens: backward gathers the tokens that have an upstream gradient, which waits for
            the device once. False: GEMMs run on all tokens, nothing waits. None: unless a CUDA
            graph is captured.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

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
    _plan.check(_OP, vocab_size, (lm_head_weight,), workspace_bytes, whole_rows=_plan.NO_PATH_B)
    head_sum = _grad_sums.checked(_OP, "lm_head_weight_grad", lm_head_weight_grad, lm_head_weight)
    _checks.optional_bool(_OP, "compact_tokens", compact_tokens)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(hidden), backend)
    if chosen == "reference":
        if head_sum is not None:
            raise ValueError(
                f"{_OP}: backend 'reference' must be used without lm_head_weight_grad: its "
                "gradients are autograd's."
            )
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
            *inputs, *law, head_sum, workspace_bytes, compact_tokens, chosen
        )
    return TokenLogprobs(*(value.to(rows.real) for value in values))


# where the differentiable tensors are among the arguments: hidden, head, bias, A and B
_DIFFERENTIABLE = (0, 1, NUM_INPUTS, 2, 3)


def _fwd(*arguments):
    inputs, law, (_, workspace_bytes, _, backend) = _one_head.split(arguments)
    kernels, token_ids = _dispatch.row_ops(backend), inputs.per_token
    _checks.token_ids_in_range(_OP, token_ids, law.vocab_size)
    plan = inputs.plan(_OP, law.vocab_size, workspace_bytes)
    outputs = fwd_outputs(inputs.hidden)

    def rows(logits: Tensor, here: slice) -> tuple[Tensor, ...]:
        return kernels.token_logprobs_fwd(logits, token_ids[here], *law.rows(here))

    _one_head.fill(_OP, outputs, inputs, law, plan, rows)
    return outputs


def _fwd_fake(hidden, *_):
    return fwd_outputs(hidden)


def _fwd_setup_context(ctx, inputs, output):
    _, lse, entropy = output
    tensors = NUM_INPUTS + 2
    ctx.save_for_backward(*inputs[:tensors], lse, entropy)
    # not with the saved tensors: it may change before the backward, which only adds to it
    *ctx.numbers, ctx.head_sum, ctx.workspace_bytes, ctx.compact_tokens, ctx.backend = inputs[
        tensors:
    ]
    ctx.num_inputs = len(inputs)


def _fwd_backward(_):
    def backward(ctx, grad_logprobs, grad_lse, grad_entropy):
        wanted = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
        *inputs, bias, temperatures, lse, entropy = ctx.saved_tensors
        bwd = torch.ops.opd.fused_linear_token_logprobs_bwd
        if ctx.head_sum is not None:
            bwd = partial(torch.ops.opd.fused_linear_token_logprobs_bwd_, ctx.head_sum)
        formed = bwd(
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
            ctx.compact_tokens,
            ctx.backend,
        )
        gradients = [None] * ctx.num_inputs
        for position, want, gradient in zip(_DIFFERENTIABLE, wanted, formed, strict=True):
            if want and not (position == 1 and ctx.head_sum is not None):
                gradients[position] = gradient
        return tuple(gradients)

    return backward


def _sources(inputs: Inputs, law: Law) -> tuple[Tensor | None, ...]:
    return (*inputs[:2], law.bias, *inputs[2:4])


def _bwd(*arguments):
    return _run_backward(None, *arguments)


def _bwd_(head_sum, *arguments):
    return _run_backward(head_sum, *arguments)


def _run_backward(head_sum: Tensor | None, grad_logprobs, grad_lse, grad_entropy, *arguments):
    *tensors, lse, entropy = arguments[: NUM_INPUTS + 2]
    inputs, law, (workspace_bytes, with_grads, compact_tokens, backend) = _one_head.split(
        (*tensors, *arguments[NUM_INPUTS + 2 :])
    )
    hidden, head = inputs[:2]
    grad_dtype = _gemms.grad_dtype(head)
    rows, low_rank, real = _dispatch.row_ops(backend), inputs.low_rank(grad_dtype), entropy.dtype
    # tokens without an upstream gradient (a masked loss) cost nothing
    is_active = (grad_logprobs != 0) | (grad_lse != 0) | (grad_entropy != 0)
    token_idx = _linear.active_tokens(is_active, compact_tokens)
    num_active = hidden.shape[0] if token_idx is None else token_idx.shape[0]
    plan = inputs.plan(_OP, law.vocab_size, workspace_bytes, num_active, trained=with_grads[1])
    unit = _linear.gradient_unit(head, grad_logprobs, grad_lse, grad_entropy)
    upstream = [
        _linear.in_units(values, unit, num_active)
        for values in (grad_logprobs, grad_lse, grad_entropy)
    ]
    with_hidden, with_head, *_ = with_grads
    grad_hidden = hidden.new_zeros(hidden.shape) if with_hidden else None
    grad_head = head_sum if with_head else None
    if with_head and head_sum is None:
        grad_head = _gemms.new_grad_weight(head, law.vocab_size, num_active)
    grad_bias, grad_down, grad_up = (
        torch.zeros_like(source, dtype=real) if wanted else None
        for source, wanted in zip(_sources(inputs, law)[2:], with_grads[2:], strict=True)
    )
    per_token = (*upstream, inputs.per_token, lse, entropy)

    def run_chunk(buffer: Tensor, begin: int, end: int) -> None:
        here = slice(begin, end) if token_idx is None else token_idx[begin:end]
        with _linear.phase(hidden, _OP, "take"):
            chunk = _linear.take(hidden, token_idx, begin, end, is_active[here])
            *upstream, token_ids, chunk_lse, chunk_entropy = (values[here] for values in per_token)
        logits = _buffers.rows_of(buffer, end - begin, law.vocab_size)
        projected = _linear.form_logits(_OP, logits, chunk, head, low_rank, plan.head_slice_rows)
        with _linear.phase(chunk, _OP, "rows"):
            rows.token_logprobs_bwd_(
                *upstream, logits, token_ids, chunk_lse, chunk_entropy, *law.rows(here), grad_dtype
            )
        grad_logits = _gemms.gradient_of(logits, head, grad_dtype)
        grad_chunk = None
        if grad_hidden is not None:
            with _linear.phase(chunk, _OP, "grad_hidden"):
                grad_chunk = _gemms.grad_hidden(
                    grad_logits, head, plan.head_slice_rows, plan.grad_hidden_splits
                )
        if grad_head is not None:
            with _linear.phase(chunk, _OP, "grad_weight"):
                first = begin == 0 and head_sum is None
                _gemms.accumulate_grad_weight(grad_head, grad_logits, chunk, first)
        if grad_bias is not None:
            with _linear.phase(chunk, _OP, "grad_bias"):
                grad_bias[: law.vocab_size] += grad_logits.sum(0, dtype=real)
        if low_rank is not None:
            with _linear.phase(chunk, _OP, "grad_low_rank"):
                low_rank.backproject(
                    grad_logits, chunk, projected, (grad_chunk, grad_down, grad_up)
                )
        if grad_hidden is not None:
            if unit is not None:
                grad_chunk.mul_(unit)
            _linear.put(grad_hidden, token_idx, begin, end, grad_chunk)

    shapes = [(plan.chunk_tokens, law.vocab_size)]
    with (
        _linear.summed_in_units(head_sum, unit),
        _buffers.borrowed_buffers(hidden, shapes) as (buffer,),
    ):
        for begin, end in plan.chunks():
            run_chunk(buffer, begin, end)
    summed = [None if head_sum is not None else grad_head, grad_bias, grad_down, grad_up]
    if unit is not None:
        summed = [None if gradient is None else gradient.mul_(unit) for gradient in summed]
    formed = (grad_hidden, *summed)
    return tuple(
        hidden.new_empty(0) if gradient is None else _linear.rounded(gradient, source.dtype)
        for gradient, source in zip(formed, _sources(inputs, law), strict=True)
    )


def _bwd_fake(grad_logprobs, grad_lse, grad_entropy, *arguments):
    inputs, law, (_, with_grads, *_) = _one_head.split(
        (*arguments[:NUM_INPUTS], *arguments[NUM_INPUTS + 2 :])
    )
    hidden = inputs.hidden
    return tuple(
        hidden.new_empty(source.shape, dtype=source.dtype) if wanted else hidden.new_empty(0)
        for source, wanted in zip(_sources(inputs, law), with_grads, strict=True)
    )


def _bwd_into_fake(head_sum, *arguments):
    grad_hidden, _, *others = _bwd_fake(*arguments)
    return grad_hidden, grad_hidden.new_empty(0), *others


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
register("fused_linear_token_logprobs_bwd_", fake=_bwd_into_fake, python=_bwd_)
