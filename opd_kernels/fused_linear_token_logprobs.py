# SPDX-License-Identifier: Apache-2.0
"""log softmax(hidden @ W.T / temperature)[token_ids], per token; no [T, V] is ever formed."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _dispatch, _linear, reference
from ._registration import register
from .token_logprobs import TokenLogprobs, fwd_outputs

_OP = "fused_linear_token_logprobs"


def fused_linear_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of one token per position from hidden states, through the LM head.

    logprobs[t] = z_t[token_ids[t]] - lse[t],  z_t = hidden[t] @ W.T / temperature,
    lse[t] = log sum_v exp z_t[v],  entropy[t] = -sum_v q_v log q_v.

    Args:
        hidden: [T, D], float32 | bfloat16 | float16 (float64 on CPU).
        lm_head_weight: [V, D] of the same dtype, one row per token.
        token_ids: [T] int64 or int32, each in [0, vocab_size). Drop ignored positions (-100) before
            the call. Checked on CPU; on a GPU it is the caller's contract.
        temperature: divides the logits; > 0.
        vocab_size: the leading rows of the head that count.
        workspace_bytes: budget for logits and other temporaries; the gradients come on top.
        backend: "cpu" | "triton" | "reference"; None picks one.

    Returns:
        TokenLogprobs of [T] float32 (float64 for float64), nats, all three differentiable in
        hidden and lm_head_weight.

    Raises:
        ValueError: shapes, ranges, ids (on CPU) or a workspace that do not fit.
        TypeError: unsupported dtype. UnsupportedBackendError.

    Notes:
        FLOPs 2TVD forward; backward recomputes the logits: 6TVD, 4TVD with the head frozen.

    Source: chosen-token access of arXiv:2306.08543 and of policy-gradient distillation.
    """
    _checks.hidden_and_head(_OP, "", hidden, lm_head_weight)
    _checks.floating(_OP, hidden=hidden)
    _checks.same_device(_OP, hidden=hidden, lm_head_weight=lm_head_weight)
    vocab_size = _checks.vocab_prefix(_OP, vocab_size, lm_head_weight=lm_head_weight.shape[0])
    temperature = _checks.temperature(_OP, "temperature", temperature)
    token_ids = _checks.token_ids(_OP, token_ids, hidden.shape[0], hidden.device)
    _linear.plan(
        _OP,
        hidden.shape[0],
        vocab_size,
        (lm_head_weight,),
        workspace_bytes,
        whole_rows=_linear.NO_PATH_B,
    )
    real = _checks.real_dtype(hidden)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(hidden), backend)
    if chosen == "reference":
        values = reference.fused_linear_token_logprobs(
            hidden, lm_head_weight, token_ids, temperature=temperature, vocab_size=vocab_size
        )
    else:
        values = torch.ops.opd.fused_linear_token_logprobs_fwd(
            hidden, lm_head_weight, token_ids, temperature, vocab_size, workspace_bytes, chosen
        )
    return TokenLogprobs(*(value.to(real) for value in values))


def _fwd(hidden, lm_head_weight, token_ids, temperature, vocab_size, workspace_bytes, backend):
    rows = _dispatch.row_ops(backend)
    _checks.token_ids_in_range(_OP, token_ids, vocab_size)
    plan = _linear.plan(
        _OP,
        hidden.shape[0],
        vocab_size,
        (lm_head_weight,),
        workspace_bytes,
        whole_rows=_linear.NO_PATH_B,
    )
    outputs = fwd_outputs(hidden)
    buffer = _linear.new_buffer(hidden, plan.chunk_tokens, vocab_size)
    for begin, end in plan.chunks():
        chunk = _linear.take(hidden, None, begin, end)
        logits = buffer[: end - begin]
        with _linear.phase(chunk, _OP, "logits"):
            _linear.logits_into(logits, chunk, lm_head_weight, plan.head_slice_rows)
        with _linear.phase(chunk, _OP, "rows"):
            values = rows.token_logprobs_fwd(logits, token_ids[begin:end], temperature, vocab_size)
        for output, value in zip(outputs, values, strict=True):
            output[begin:end] = value
    return outputs


def _fwd_fake(hidden, *_):
    return fwd_outputs(hidden)


def _fwd_setup_context(ctx, inputs, output):
    hidden, lm_head_weight, token_ids, *ctx.numbers, ctx.backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, lm_head_weight, token_ids, lse, entropy)


def _fwd_backward(_):
    def backward(ctx, grad_logprobs, grad_lse, grad_entropy):
        wanted = ctx.needs_input_grad[:2]
        gradients = torch.ops.opd.fused_linear_token_logprobs_bwd(
            grad_logprobs.contiguous(),
            grad_lse.contiguous(),
            grad_entropy.contiguous(),
            *ctx.saved_tensors,
            *ctx.numbers,
            *wanted,
            ctx.backend,
        )
        return (
            *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
            *(None,) * 5,
        )

    return backward


def _bwd(
    grad_logprobs,
    grad_lse,
    grad_entropy,
    hidden,
    lm_head_weight,
    token_ids,
    lse,
    entropy,
    temperature,
    vocab_size,
    workspace_bytes,
    with_grad_hidden,
    with_grad_weight,
    backend,
):
    rows = _dispatch.row_ops(backend)
    # tokens without an upstream gradient (a masked loss) cost nothing
    token_idx = _linear.active_tokens((grad_logprobs != 0) | (grad_lse != 0) | (grad_entropy != 0))
    num_active = token_idx.shape[0]
    plan = _linear.plan(
        _OP,
        num_active,
        vocab_size,
        (lm_head_weight,),
        workspace_bytes,
        whole_rows=_linear.NO_PATH_B,
    )
    grad_hidden = hidden.new_zeros(hidden.shape if with_grad_hidden else 0)
    grad_weight = (
        _linear.new_grad_weight(lm_head_weight, vocab_size, num_active)
        if with_grad_weight
        else lm_head_weight.new_empty(0)
    )
    per_token = (grad_logprobs, grad_lse, grad_entropy, token_ids, lse, entropy)
    buffer = _linear.new_buffer(hidden, plan.chunk_tokens, vocab_size)

    def run_chunk(begin: int, end: int) -> None:
        chunk = _linear.take(hidden, token_idx, begin, end)
        *gradients, ids, chunk_lse, chunk_entropy = (
            values[token_idx[begin:end]] for values in per_token
        )
        logits = buffer[: end - begin]
        with _linear.phase(chunk, _OP, "logits"):
            _linear.logits_into(logits, chunk, lm_head_weight, plan.head_slice_rows)
        with _linear.phase(chunk, _OP, "rows"):
            rows.token_logprobs_bwd_(
                *gradients, logits, ids, chunk_lse, chunk_entropy, temperature, vocab_size
            )
        _linear.backproject(
            _OP,
            (token_idx, begin, end),
            logits,
            chunk,
            lm_head_weight,
            plan.head_slice_rows,
            grad_hidden if with_grad_hidden else None,
            grad_weight if with_grad_weight else None,
        )

    for begin, end in plan.chunks():
        run_chunk(begin, end)
    return grad_hidden, grad_weight.to(lm_head_weight.dtype)


def _bwd_fake(grad_logprobs, grad_lse, grad_entropy, hidden, lm_head_weight, *arguments):
    *_, with_grad_hidden, with_grad_weight, _ = arguments
    return (
        hidden.new_empty(hidden.shape if with_grad_hidden else 0),
        lm_head_weight.new_empty(lm_head_weight.shape if with_grad_weight else 0),
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
