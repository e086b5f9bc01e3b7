# SPDX-License-Identifier: Apache-2.0
"""sum_t w[t] sum_i |P_(i) - Q_(i)| from hidden states and LM heads of two vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _formed, _laws, _linear, _plan, _ranks, _row_chunks, reference
from ._ranks import Ranks
from ._registration import register
from ._row_chunks import Chunk, Options, Side
from .token_logprobs import Law

_OP = "fused_linear_sorted_l1"


class FusedLinearSortedL1Output(NamedTuple):
    """`loss`: scalar ("sum") or [T] ("none"). `row_losses`: [T], weighted, no gradient."""

    loss: Tensor
    row_losses: Tensor


def fused_linear_sorted_l1(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    *,
    temperature: _laws.Temperature = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    student_log_scales: Tensor | None = None,
    teacher_log_scales: Tensor | None = None,
    pairs: tuple[Tensor, Tensor] | None = None,
    pair_weight: float = 0.0,
    rest_weight: float = 1.0,
    beta: float = 0.5,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    workspace_bytes: int = _checks.DEFAULT_WORKSPACE_BYTES,
    compact_tokens: bool | None = None,
    backend: str | None = None,
) -> FusedLinearSortedL1Output:
    """Distance of two models' sorted laws from their hidden states; the vocabularies may differ.

    loss = sum_t w[t] (rest_weight sum_i |p_(i) - q_(i)| + pair_weight sum JSD_beta(p_w, q_v)),
    p = exp(teacher_log_scales[t]) P_t, q = exp(student_log_scales[t]) Q_t, see
    `opd_kernels.sorted_l1`; Q_t is the softmax of
    softcap(logit_scale * (student_hidden[t] @ W_S.T + bias)) / temperature, P_t likewise.

    Args:
        student_hidden: [T, Ds], student_lm_head_weight: [Vs, Ds] of the same dtype, float32 |
            bfloat16 | float16 (float64). Gather the positions that are compared before the call:
            row t of the student's is compared with row t of the teacher's.
        teacher_hidden: [T, Dt], teacher_lm_head_weight: [Vt, Dt]; no gradient. Any float dtype,
            but float64 with float64 alone.
        temperature, student_log_scales, teacher_log_scales, pairs, pair_weight, rest_weight, beta,
            softcaps and logit_scales: as `opd_kernels.sorted_l1`.
        token_weights: [T], no gradient. A row of weight 0 costs no FLOP and gives exactly 0.
        reduction: "sum": a scalar, gradients formed in forward. "none": [T]; backward forms the
            logits again.
        student_bias: [Vs] of the head, differentiable; teacher_bias: no gradient.
        student_vocab_size, teacher_vocab_size: the leading rows of the heads that count.
        workspace_bytes: budget for logits and other temporaries; the gradients come on top.
        compact_tokens: as `opd_kernels.fused_linear_divergence`.
        backend: "cpu" | "cuda" (the library's sort) | "reference"; None picks one.

    Returns:
        FusedLinearSortedL1Output, float32 (float64 for float64), of pairs in nats; differentiable
        in student_hidden, student_lm_head_weight, student_bias and student_log_scales.

    Raises:
        ValueError: shapes, ranges, ids (on CPU) or a workspace that do not fit.
        TypeError: a dtype or type that is not supported. UnsupportedBackendError.

    Notes:
        FLOPs 2T(3 Vs Ds + Vt Dt) with both gradients, 2T(2 Vs Ds + Vt Dt) with the head frozen;
        "none" forms all logits a second time.

    Source: ULD, arXiv:2402.12030; with pairs and scales, GOLD in TRL.
    """
    sides = {
        "student": (student_hidden, student_lm_head_weight),
        "teacher": (teacher_hidden, teacher_lm_head_weight),
    }
    for side, pair in sides.items():
        hidden, weight = sides[side] = _checks.autocast_pair(*pair)
        _checks.hidden_and_head(_OP, side, hidden, weight)
        _checks.length(_OP, f"{side}_hidden", hidden, student_hidden.shape[0], "student_hidden")
    hidden = {f"{side}_hidden": pair[0] for side, pair in sides.items()}
    heads = {f"{side}_lm_head_weight": pair[1] for side, pair in sides.items()}
    _checks.floating(_OP, **hidden)
    _checks.same_device(_OP, **hidden, **heads)
    _checks.one_of(_OP, "reduction", reduction, ("sum", "none"))
    _checks.optional_bool(_OP, "compact_tokens", compact_tokens)
    ranks = _ranks.pack(
        _laws.rows_of(_OP, sides["student"][0]),
        tuple(
            _checks.vocab_prefix(_OP, size, **{name: head.shape[0]})
            for size, (name, head) in zip(
                (student_vocab_size, teacher_vocab_size), heads.items(), strict=True
            )
        ),
        temperature=temperature,
        token_weights=token_weights,
        log_scales=(student_log_scales, teacher_log_scales),
        pairs=pairs,
        pair_weight=pair_weight,
        rest_weight=rest_weight,
        beta=beta,
        biases=(student_bias, teacher_bias),
        softcaps=(student_softcap, teacher_softcap),
        logit_scales=(student_logit_scale, teacher_logit_scale),
    )
    chosen = _dispatch.select(_OP, _dispatch.meta_of(sides["student"][0]), backend)
    if chosen == "reference":
        outputs = reference.fused_linear_sorted_l1(
            student_hidden,
            student_lm_head_weight,
            teacher_hidden,
            teacher_lm_head_weight,
            temperature=temperature,
            token_weights=token_weights,
            reduction=reduction,
            student_log_scales=student_log_scales,
            teacher_log_scales=teacher_log_scales,
            pairs=pairs,
            pair_weight=pair_weight,
            rest_weight=rest_weight,
            beta=beta,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
        )
        real = _checks.real_dtype(student_hidden)
        return FusedLinearSortedL1Output(*(value.to(real) for value in outputs))
    _checks.no_forward_mode(_OP, *sides["student"], *sides["teacher"])
    tensors = (*sides["student"], *(tensor.detach() for tensor in sides["teacher"]))
    student, teacher = _sides(tensors, ranks)
    _row_chunks.check(_OP, student, teacher, workspace_bytes, _scratch(student, teacher))
    if reduction == "none":
        loss = torch.ops.opd.fused_linear_sorted_l1_fwd(
            *tensors, *ranks, workspace_bytes, compact_tokens
        )
        return FusedLinearSortedL1Output(loss, loss.detach())
    wanted = [
        torch.is_grad_enabled() and source is not None and source.requires_grad
        for source in (*_row_chunks.sources(student), ranks.student_log_scales)
    ]
    loss, *_, row_losses = torch.ops.opd.fused_linear_sorted_l1_sum(
        *tensors, *ranks, workspace_bytes, wanted, compact_tokens
    )
    return FusedLinearSortedL1Output(loss, row_losses)


_NUM_TENSORS = 4
_END = _NUM_TENSORS + _ranks.NUM_ARGUMENTS
# where the differentiable tensors are among the arguments: hidden, head, bias and log-scales
_DIFFERENTIABLE = (0, 1, _NUM_TENSORS, _NUM_TENSORS + _ranks.LOG_SCALES)


def _split(arguments: Sequence) -> tuple[Side, Side, Ranks, list]:
    ranks = Ranks(*arguments[_NUM_TENSORS:_END])
    return *_sides(arguments[:_NUM_TENSORS], ranks), ranks, list(arguments[_END:])


def _sides(tensors: Sequence[Tensor], ranks: Ranks) -> tuple[Side, Side]:
    student_hidden, student_head, teacher_hidden, teacher_head = tensors
    return (
        Side(student_hidden, student_head, ranks.student),
        Side(teacher_hidden, teacher_head, ranks.teacher),
    )


def _scratch(student: Side, teacher: Side) -> _row_chunks.Scratch:
    return _ranks.scratch(student.hidden, student.law.vocab_size, teacher.law.vocab_size)


def cut(tensors: Sequence[Tensor], options: dict) -> _plan.Plan:
    """How a call with these tensors and keyword arguments is cut, all of whose rows count."""
    sizes = [
        _checks.vocab_prefix(
            _OP, options.get(f"{side}_vocab_size"), **{f"{side}_lm_head_weight": head.shape[0]}
        )
        for side, head in (("student", tensors[1]), ("teacher", tensors[3]))
    ]
    student, teacher = (
        Side(hidden, head, Law(None, None, [1.0, 0.0, 1.0], size))
        for hidden, head, size in zip(tensors[::2], tensors[1::2], sizes, strict=True)
    )
    with_grads = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors[:2]]
    budget = options.get("workspace_bytes", _checks.DEFAULT_WORKSPACE_BYTES)
    return _row_chunks.plan_of(
        _OP,
        tensors[0].shape[0],
        student,
        teacher,
        Options(budget, [*with_grads, False, False], None),
        _scratch(student, teacher),
    )


def _run(student: Side, teacher: Side, ranks: Ranks, options: Options):
    """(loss [T], gradients of the student, gradient of the log-scales)."""
    _ranks.check_values(_OP, ranks)

    def rows(chunk: Chunk) -> tuple[Tensor, Sequence[Tensor]]:
        arguments = (
            chunk.student_logits,
            chunk.teacher_logits,
            *ranks.rows(chunk.rows, chunk.weights),
        )
        if not chunk.with_grad:
            return torch.ops.opd.sorted_l1_fwd(*arguments), ()
        loss, grad_log_scales = torch.ops.opd.sorted_l1_grad_(*arguments)
        return loss, (grad_log_scales,)

    loss, sums, (grad_log_scales,) = _row_chunks.run(
        _OP, student, teacher, rows, ranks.token_weights, options, _scratch(student, teacher)
    )
    return loss, (*sums, grad_log_scales)


def _empty_gradients(student: Side, with_grads: Sequence[bool]) -> tuple[Tensor, ...]:
    loss = student.hidden.new_empty(
        student.hidden.shape[0] if with_grads[3] else 0, dtype=_checks.real_dtype(student.hidden)
    )
    return *_row_chunks.empty_sums(student, with_grads), loss


def _sum(*arguments):
    student, teacher, ranks, rest = _split(arguments)
    loss, gradients = _run(student, teacher, ranks, Options(*rest))
    # float64: a sum over 100k rows in float32 would be the least accurate step of the op
    return loss.sum(dtype=torch.float64).to(loss.dtype), *gradients, loss


def _sum_fake(*arguments):
    student, _, _, rest = _split(arguments)
    real = _checks.real_dtype(student.hidden)
    return (
        student.hidden.new_empty((), dtype=real),
        *_empty_gradients(student, Options(*rest).with_grads),
        student.hidden.new_empty(student.hidden.shape[0], dtype=real),
    )


def _with_grads(inputs) -> list[bool]:
    return Options(*inputs[_END:]).with_grads


def _fwd(*arguments):
    student, teacher, ranks, (workspace_bytes, compact_tokens) = _split(arguments)
    return _run(student, teacher, ranks, Options(workspace_bytes, [False] * 4, compact_tokens))[0]


def _fwd_fake(*arguments):
    hidden = arguments[0]
    return hidden.new_empty(hidden.shape[0], dtype=_checks.real_dtype(hidden))


def _sources(student: Side, ranks: Ranks) -> tuple[Tensor | None, ...]:
    return *_row_chunks.sources(student), ranks.student_log_scales


def _bwd(grad_loss, *arguments):
    student, teacher, ranks, rest = _split(arguments)
    options = Options(*rest)
    weights = _formed.upstream_weights(grad_loss, ranks.token_weights)
    _, gradients = _run(student, teacher, ranks._replace(token_weights=weights), options)
    return _formed.in_dtypes(gradients, _sources(student, ranks), options.with_grads)


def _bwd_fake(_, *arguments):
    student, _, ranks, rest = _split(arguments)
    wanted = Options(*rest).with_grads
    gradients = _empty_gradients(student, wanted)
    return _formed.in_dtypes(gradients, _sources(student, ranks), wanted, Tensor.to)


register(
    "fused_linear_sorted_l1_sum",
    fake=_sum_fake,
    setup_context=_formed.sum_setup_context(_DIFFERENTIABLE, _with_grads),
    backward=_formed.sum_backward(_DIFFERENTIABLE),
    python=_sum,
)
register(
    "fused_linear_sorted_l1_fwd",
    fake=_fwd_fake,
    setup_context=lambda ctx, inputs, output: _formed.save_inputs(ctx, inputs),
    backward=_formed.backward_again(
        _OP, _DIFFERENTIABLE, lambda saved, wanted: [*saved[:-1], wanted, saved[-1]]
    ),
    python=_fwd,
)
register(
    "fused_linear_sorted_l1_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    python=_bwd,
)
