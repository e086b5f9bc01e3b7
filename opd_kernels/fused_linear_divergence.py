# SPDX-License-Identifier: Apache-2.0
"""sum_t w[t] D(P_t, Q_t) from hidden states and LM heads; no [T, V] is ever formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _linear, reference
from ._registration import register
from .divergences import Divergence, parse

_OP = "fused_linear_divergence"
STATISTICS = (
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
)


class FusedLinearDivergenceOutput(NamedTuple):
    """`loss`: scalar ("sum") or [T] ("none"), nats. `statistics`: name -> [T], no gradient."""

    loss: Tensor
    statistics: dict[str, Tensor]


def fused_linear_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    divergence: str | Divergence = "reverse_kl",
    temperature: float | Sequence[float] = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    statistics: Sequence[str] = (),
    vocab_size: int | None = None,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    backend: str | None = None,
) -> FusedLinearDivergenceOutput:
    """Divergence of teacher and student from their hidden states, through both LM heads.

    loss = sum_t w[t] D(P_t, Q_t),  P_t = softmax(teacher_hidden[t] @ W_T.T / temperature),
    Q_t = softmax(student_hidden[t] @ W_S.T / temperature).

    Args:
        student_hidden: [T, Ds], float32 | bfloat16 | float16 (float64 on CPU).
        student_lm_head_weight: [Vs, Ds] of the same dtype, one row per token.
        teacher_hidden: [T, Dt], teacher_lm_head_weight: [Vt, Dt]; no gradient. Any float dtype.
        divergence: a name or `divergences.jsd(beta=0.3)`; `forward_kl` is KL(P || Q).
        temperature: divides the logits; > 0, or a pair (student, teacher). No implicit
            temperature**2 factor.
        token_weights: [T], no gradient: mask x weight x 1/N. A token of weight 0 costs no FLOP and
            gives exactly 0. Default: ones.
        reduction: "sum": a scalar, gradients formed in forward (two student GEMMs cheaper).
            "none": [T], for weights that are known only later; backward recomputes the logits.
        statistics: of `student_entropy`, `teacher_entropy`, `forward_kl`, `reverse_kl`,
            `top1_agreement` (1 or 0), from the same pass, unweighted; 0 where the weight is 0.
        vocab_size: leading rows that both heads share, when they are padded differently.
        workspace_bytes: budget for logits and other temporaries; the gradients come on top
            (dW is float32 until it is returned in the head's dtype).
        backend: "cpu" | "triton" | "reference"; None picks one (`explain` says which).

    Returns:
        FusedLinearDivergenceOutput(loss, statistics): float32 (float64 for float64), nats.

    Raises:
        ValueError: shapes, vocabularies, ranges or a workspace that do not fit.
        TypeError: a dtype or type that is not supported. UnsupportedBackendError.

    Notes:
        FLOPs 2TV(3Ds + Dt) with both gradients, 2TV(2Ds + Dt) with the head frozen ("none": one
        student and one teacher GEMM more). Logits are float32 whatever the inputs are;
        precision, special values and memory: docs/numerics.md.

    Source: GKD, arXiv:2306.13649; MiniLLM, arXiv:2306.08543; DistiLLM, arXiv:2402.03898.
    """
    spec = parse(divergence)
    _checks.hidden_and_head(_OP, "student", student_hidden, student_lm_head_weight)
    _checks.hidden_and_head(_OP, "teacher", teacher_hidden, teacher_lm_head_weight)
    _checks.floating(_OP, student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    _checks.same_device(
        _OP,
        student_hidden=student_hidden,
        student_lm_head_weight=student_lm_head_weight,
        teacher_hidden=teacher_hidden,
        teacher_lm_head_weight=teacher_lm_head_weight,
    )
    num_tokens = student_hidden.shape[0]
    _checks.length(_OP, "teacher_hidden", teacher_hidden, num_tokens, "student_hidden")
    vocab_size = _checks.vocab_prefix(
        _OP,
        vocab_size,
        student_lm_head_weight=student_lm_head_weight.shape[0],
        teacher_lm_head_weight=teacher_lm_head_weight.shape[0],
    )
    temperatures = _checks.temperatures(_OP, temperature)
    real = _checks.real_dtype(student_hidden)
    token_weights = _checks.token_weights(
        _OP, token_weights, num_tokens, student_hidden.device, real
    )
    _checks.one_of(_OP, "reduction", reduction, ("sum", "none"))
    statistics = _checks.names(_OP, "statistics", statistics)
    for name in statistics:
        _checks.one_of(_OP, "statistics", name, STATISTICS)
    heads = (student_lm_head_weight, teacher_lm_head_weight)
    _linear.plan(_OP, num_tokens, vocab_size, heads, workspace_bytes)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(student_hidden), backend)
    if chosen == "reference":
        loss, rows = reference.fused_linear_divergence(
            student_hidden,
            student_lm_head_weight,
            teacher_hidden,
            teacher_lm_head_weight,
            divergence=spec,
            temperature=temperatures,
            token_weights=token_weights,
            reduction=reduction,
            statistics=statistics,
            vocab_size=vocab_size,
        )
        return FusedLinearDivergenceOutput(
            loss.to(real), {name: row.to(real) for name, row in rows.items()}
        )
    inputs = (
        student_hidden,
        student_lm_head_weight,
        teacher_hidden.detach(),
        teacher_lm_head_weight.detach(),
        token_weights,
    )
    numbers = (spec.id, *spec.kernel_params, *temperatures, vocab_size, workspace_bytes)
    if reduction == "sum":
        grad = torch.is_grad_enabled()
        loss, _, _, rows = torch.ops.opd.fused_linear_divergence_sum(
            *inputs,
            *numbers,
            grad and student_hidden.requires_grad,
            grad and student_lm_head_weight.requires_grad,
            bool(statistics),
            chosen,
        )
    else:
        loss, rows = torch.ops.opd.fused_linear_divergence_fwd(
            *inputs, *numbers, bool(statistics), chosen
        )
    return FusedLinearDivergenceOutput(
        loss, {name: rows[STATISTICS.index(name)] for name in statistics}
    )


def _run(
    student_hidden,
    student_lm_head_weight,
    teacher_hidden,
    teacher_lm_head_weight,
    token_weights,
    divergence,
    param0,
    param1,
    student_temperature,
    teacher_temperature,
    vocab_size,
    workspace_bytes,
    with_grad_hidden,
    with_grad_weight,
    with_statistics,
    backend,
):
    """(loss [T], grad_student_hidden, grad_student_lm_head_weight, statistics): path A.

    Everything is float32 (float64): gradients are rounded to the inputs' dtype once, after the
    upstream gradient has been applied. What nobody asked for has no elements.
    """
    rows = _dispatch.row_ops(backend)
    real = _checks.real_dtype(student_hidden)
    num_tokens = student_hidden.shape[0]
    token_idx = _linear.active_tokens(token_weights)
    num_active = num_tokens if token_idx is None else token_idx.shape[0]
    heads = (student_lm_head_weight, teacher_lm_head_weight)
    plan = _linear.plan(_OP, num_active, vocab_size, heads, workspace_bytes)
    slice_rows = plan.head_slice_rows
    with_grad = with_grad_hidden or with_grad_weight

    new = student_hidden.new_zeros if token_idx is not None else student_hidden.new_empty
    loss = new(num_tokens, dtype=real)
    statistics = new((len(STATISTICS), num_tokens if with_statistics else 0), dtype=real)
    grad_hidden = new(student_hidden.shape if with_grad_hidden else 0, dtype=real)
    grad_weight = (
        _linear.new_grad_weight(student_lm_head_weight, vocab_size, num_active)
        if with_grad_weight
        else student_lm_head_weight.new_empty(0, dtype=real)
    )
    buffers = _linear.new_buffer(student_hidden, 2, plan.chunk_tokens, vocab_size)
    numbers = (divergence, param0, param1, student_temperature, teacher_temperature, vocab_size)

    def run_chunk(begin: int, end: int) -> None:
        # a function, so that its gathered rows are gone before the next chunk's exist
        student = _linear.take(student_hidden, token_idx, begin, end)
        teacher = _linear.take(teacher_hidden, token_idx, begin, end)
        weights = None if token_idx is None else token_weights[token_idx[begin:end]]
        student_logits, teacher_logits = buffers[0, : end - begin], buffers[1, : end - begin]
        with _linear.phase(student, _OP, "teacher_logits"):
            _linear.logits_into(teacher_logits, teacher, teacher_lm_head_weight, slice_rows)
        with _linear.phase(student, _OP, "student_logits"):
            _linear.logits_into(student_logits, student, student_lm_head_weight, slice_rows)
        with _linear.phase(student, _OP, "rows"):
            if with_grad:
                chunk_loss, chunk_statistics = rows.divergence_fwd_grad_(
                    student_logits, teacher_logits, weights, *numbers, with_statistics
                )
            else:
                chunk_loss, *_, chunk_statistics = rows.divergence_fwd(
                    student_logits, teacher_logits, weights, *numbers, with_statistics
                )
        _linear.put(loss, token_idx, begin, end, chunk_loss)
        if with_statistics:
            _linear.put(statistics.t(), token_idx, begin, end, chunk_statistics.t())
        _linear.backproject(
            _OP,
            (token_idx, begin, end),
            student_logits,
            student,
            student_lm_head_weight,
            slice_rows,
            grad_hidden if with_grad_hidden else None,
            grad_weight if with_grad_weight else None,
        )

    for begin, end in plan.chunks():
        run_chunk(begin, end)
    return loss, grad_hidden, grad_weight, statistics


def _sum(*arguments):
    loss, *rest = _run(*arguments)
    # float64: a sum over 100k tokens in float32 would be the least accurate step of the op
    return loss.sum(dtype=torch.float64).to(loss.dtype), *rest


def _sum_fake(student_hidden, student_lm_head_weight, *arguments):
    *_, with_grad_hidden, with_grad_weight, with_statistics, _ = arguments
    real = _checks.real_dtype(student_hidden)
    num_statistics = student_hidden.shape[0] if with_statistics else 0
    return (
        student_hidden.new_empty((), dtype=real),
        student_hidden.new_empty(student_hidden.shape if with_grad_hidden else 0, dtype=real),
        student_lm_head_weight.new_empty(
            student_lm_head_weight.shape if with_grad_weight else 0, dtype=real
        ),
        student_hidden.new_empty((len(STATISTICS), num_statistics), dtype=real),
    )


def _sum_setup_context(ctx, inputs, output):
    _, grad_hidden, grad_weight, statistics = output
    ctx.mark_non_differentiable(grad_hidden, grad_weight, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.with_grad = inputs[-4:-2]
    ctx.dtype = inputs[0].dtype
    ctx.num_rest = len(inputs) - 2


def _sum_backward(_):
    def backward(ctx, grad_loss, *__):
        gradients = [None, None]
        if grad_loss is not None:
            for i, (formed, saved) in enumerate(zip(ctx.with_grad, ctx.saved_tensors, strict=True)):
                if formed and ctx.needs_input_grad[i]:
                    gradients[i] = _linear.scaled(saved, grad_loss).to(ctx.dtype)
        return *gradients, *(None,) * ctx.num_rest

    return backward


def _fwd(*arguments):
    *inputs, with_statistics, backend = arguments
    loss, _, _, statistics = _run(*inputs, False, False, with_statistics, backend)
    return loss, statistics


def _fwd_fake(student_hidden, *arguments):
    real = _checks.real_dtype(student_hidden)
    num_tokens = student_hidden.shape[0]
    with_statistics = arguments[-2]
    return (
        student_hidden.new_empty(num_tokens, dtype=real),
        student_hidden.new_empty(
            (len(STATISTICS), num_tokens if with_statistics else 0), dtype=real
        ),
    )


def _fwd_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    *tensors_and_numbers, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors_and_numbers[:5])
    ctx.numbers = tensors_and_numbers[5:]
    ctx.num_rest = len(inputs) - 2


def _fwd_backward(_):
    def backward(ctx, grad_loss, *__):
        if grad_loss is None:
            return (None,) * (ctx.num_rest + 2)
        wanted = ctx.needs_input_grad[:2]
        gradients = torch.ops.opd.fused_linear_divergence_bwd(
            grad_loss.contiguous(), *ctx.saved_tensors, *ctx.numbers, *wanted, ctx.backend
        )
        return (
            *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
            *(None,) * ctx.num_rest,
        )

    return backward


def _bwd(grad_loss, *arguments):
    *inputs, with_grad_hidden, with_grad_weight, backend = arguments
    # the upstream gradient is one more token weight, and its zeros cost nothing either
    weights = grad_loss
    if inputs[4] is not None:
        # a token of weight 0 stays out whatever comes from above, inf included
        weights = torch.where(inputs[4] == 0, torch.zeros_like(grad_loss), inputs[4] * grad_loss)
    _, grad_hidden, grad_weight, _ = _run(
        *inputs[:4], weights, *inputs[5:], with_grad_hidden, with_grad_weight, False, backend
    )
    dtype = inputs[0].dtype
    return grad_hidden.to(dtype), grad_weight.to(dtype)


def _bwd_fake(grad_loss, student_hidden, student_lm_head_weight, *arguments):
    *_, with_grad_hidden, with_grad_weight, _ = arguments
    return (
        student_hidden.new_empty(student_hidden.shape if with_grad_hidden else 0),
        student_lm_head_weight.new_empty(student_lm_head_weight.shape if with_grad_weight else 0),
    )


register(
    "fused_linear_divergence_sum",
    fake=_sum_fake,
    setup_context=_sum_setup_context,
    backward=_sum_backward,
    python=_sum,
)
register(
    "fused_linear_divergence_fwd",
    fake=_fwd_fake,
    setup_context=_fwd_setup_context,
    backward=_fwd_backward,
    python=_fwd,
)
register(
    "fused_linear_divergence_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    python=_bwd,
)
