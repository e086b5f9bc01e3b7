# SPDX-License-Identifier: Apache-2.0
"""sum_t w[t] D(P_t, Q_t) on the tokens that two vocabularies share; no [T, V] is ever formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import (
    _checks,
    _dispatch,
    _formed,
    _laws,
    _linear,
    _overlap_cells,
    _plan,
    _row_chunks,
    reference,
)
from ._overlap_cells import MASSES, STATISTICS, TAILS, Cells
from ._registration import register
from ._row_chunks import Side
from .fused_linear_divergence import fused_linear_divergence
from .token_logprobs import Law, pack_law
from .topk_divergence import check_tail_divergence

_OP = _overlap_cells.OP


class FusedLinearOverlapDivergenceOutput(NamedTuple):
    """`loss`: scalar ("sum") or [T] ("none"), nats. `statistics`: name -> [T], no gradient."""

    loss: Tensor
    statistics: dict[str, Tensor]


def fused_linear_overlap_divergence(
    student_hidden: Tensor,
    student_lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    *,
    divergence: _laws.Loss = "reverse_kl",
    tail: str = "bucket",
    student_extra_logits: Tensor | None = None,
    teacher_extra_logits: Tensor | None = None,
    temperature: _laws.Temperature = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    statistics: Sequence[str] = (),
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
) -> FusedLinearOverlapDivergenceOutput:
    """Divergence of teacher and student on the tokens that their vocabularies share.

    loss = sum_t w[t] sum_j c_j[t] D_j(P'_t, Q'_t), laws on cells; with
    q_t = softmax(cap(student_logit_scale * (student_hidden[t] @ W_S.T + bias)) / temperature), p_t
    likewise, and pair m of shared tokens:
    tail="bucket":               Q' = (q[student_ids[m]] for each m, 1 - their sum), P' likewise;
    tail="renormalize_both":     Q' = q[student_ids[m]] / their sum, P' likewise;
    tail="renormalize_teacher":  Q' as with a bucket, P' = p[teacher_ids[m]] / their sum, and 0.

    Args:
        student_hidden: [T, Ds], float32 | bfloat16 | float16 (float64 on CPU).
        student_lm_head_weight: [Vs, Ds] of the same dtype.
        teacher_hidden: [T, Dt], teacher_lm_head_weight: [Vt, Dt]; no gradient. Any float dtype,
            but float64 with float64 alone.
        student_ids, teacher_ids: [M] int64, as `project_vocab` pairs them: no id twice. Checked on
            CPU; on a GPU it is the caller's contract. None for both: one vocabulary of Vs = Vt.
        divergence, temperature, token_weights: as `opd_kernels.divergence` takes them.
        tail: what stands for the tokens that are not shared.
        student_extra_logits, teacher_extra_logits: [T], of one more cell, such as a span of several
            tokens: a logit beside those of the shared tokens, before the temperature; -inf for a
            row without. The student's is differentiable. Both or none.
        reduction: "sum": a scalar, gradients formed in forward. "none": [T], for weights that are
            known only later; backward recomputes the logits.
        statistics: of `student_entropy`, `teacher_entropy`, `forward_kl`, `reverse_kl`,
            `top1_agreement` (of the cells), `student_mass` and `teacher_mass` (of the shared tokens
            among all tokens; not with renormalize_both, which does not form the others).
        student_bias: [Vs] of the head, differentiable; teacher_bias: [Vt], no gradient.
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: of the logits.
        student_vocab_size, teacher_vocab_size: the leading rows of each head that count.
        workspace_bytes: budget for logits and other temporaries; the gradients come on top, and
            with renormalize_both the shared rows of both heads, which are copied.
        compact_tokens: gather the tokens of non-zero weight before the first GEMM, which waits for
            the device once. False: nothing waits. None: unless a CUDA graph is captured.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one (`explain` says which).

    Returns:
        FusedLinearOverlapDivergenceOutput(loss, statistics): float32 (float64 for float64), nats.

    Raises:
        ValueError: shapes, ids (on CPU), ranges or a workspace that do not fit; a bucket that only
            one side has; a divergence that `tail` makes infinite.
        TypeError: a dtype or type that is not supported. UnsupportedBackendError.

    Notes:
        FLOPs 2T(3 Vs Ds + Vt Dt), with renormalize_both 2TM(3 Ds + Dt). The student's gradient
        reaches all of its tokens with the other tails: dZ of one that is not shared is its share of
        the rest times dZ of the rest's cell. A bucket is a lower bound of the f-divergence of the
        whole laws, were there a map of all tokens (data processing, Csiszar 1967).

    Source: D19 to D22 of docs/divergences.md on a common vocabulary; the extra cell: SimCT,
    arXiv:2605.07711.
    """
    sides = {
        "student": (student_hidden, student_lm_head_weight),
        "teacher": (teacher_hidden, teacher_lm_head_weight),
    }
    for side, (hidden, weight) in sides.items():
        hidden, weight = _checks.autocast_pair(hidden, weight)
        _checks.hidden_and_head(_OP, side, hidden, weight)
        _checks.length(_OP, f"{side}_hidden", hidden, student_hidden.shape[0], "student_hidden")
        sides[side] = (hidden, weight)
    (hidden, head), (other_hidden, other_head) = sides["student"], sides["teacher"]
    _checks.floating(_OP, student_hidden=hidden, teacher_hidden=other_hidden)
    ids = _ids(student_ids, teacher_ids, hidden.device)
    extras = _extras(hidden, student_extra_logits, teacher_extra_logits)
    _checks.same_device(
        _OP,
        student_hidden=hidden,
        student_lm_head_weight=head,
        teacher_hidden=other_hidden,
        teacher_lm_head_weight=other_head,
    )
    sizes = [
        _checks.vocab_prefix(_OP, size, **{f"{side}_lm_head_weight": sides[side][1].shape[0]})
        for side, size in (("student", student_vocab_size), ("teacher", teacher_vocab_size))
    ]
    _checks.one_of(_OP, "tail", tail, TAILS)
    _checks.one_of(_OP, "reduction", reduction, ("sum", "none"))
    _checks.optional_bool(_OP, "compact_tokens", compact_tokens)
    statistics = _statistic_names(statistics, tail)
    components = _laws.components_of(_OP, divergence)
    for _, component in components:
        check_tail_divergence(_OP, component, tail)
    _check_sizes(tail, ids[0], sizes)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(hidden), backend)
    if chosen == "reference":
        loss, named = reference.fused_linear_overlap_divergence(
            student_hidden,
            student_lm_head_weight,
            teacher_hidden,
            teacher_lm_head_weight,
            *ids,
            divergence=divergence,
            tail=tail,
            student_extra_logits=student_extra_logits,
            teacher_extra_logits=teacher_extra_logits,
            temperature=temperature,
            token_weights=token_weights,
            reduction=reduction,
            statistics=statistics,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
        )
        real = _checks.real_dtype(hidden)
        named = {name: row.to(real) for name, row in named.items()}
        return FusedLinearOverlapDivergenceOutput(loss.to(real), named)
    _checks.no_forward_mode(_OP, hidden, head, other_hidden, other_head)
    biases = [student_bias, teacher_bias]
    if tail == "renormalize_both" and ids[0] is not None:
        for name, side_ids, size in zip(Cells._fields[:2], ids, sizes, strict=True):
            _checks.distinct_ids(_OP, side_ids, size, name)
        # the tokens that are not shared have neither a share in the loss nor a gradient: no GEMM
        heads = [head.index_select(0, ids[0]), other_head.index_select(0, ids[1])]
        for i, side in enumerate(("student", "teacher")):
            if biases[i] is not None:
                rows = _laws.rows_of(_OP, sides[side][0])
                biases[i] = _checks.bias(rows, f"{side}_bias", biases[i], sizes[i])[ids[i]]
        head, other_head = heads
        sizes, ids = [len(ids[0])] * 2, (None, None)
    if ids[0] is None and extras[0] is None:
        loss, named = fused_linear_divergence(
            hidden,
            head,
            other_hidden,
            other_head,
            divergence=divergence,
            temperature=temperature,
            token_weights=token_weights,
            reduction=reduction,
            statistics=[name for name in statistics if name not in MASSES],
            student_bias=biases[0],
            teacher_bias=biases[1],
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            vocab_size=sizes[0],
            workspace_bytes=workspace_bytes,
            compact_tokens=compact_tokens,
            backend=chosen,
        )
        for name in MASSES:
            if name in statistics:
                named[name] = loss.new_ones(hidden.shape[0])
                if token_weights is not None:
                    named[name] = named[name].masked_fill(token_weights == 0, 0.0)
        return FusedLinearOverlapDivergenceOutput(loss, {n: named[n] for n in statistics})
    rows = _laws.rows_of(_OP, hidden)
    temperatures = _checks.temperatures(_OP, temperature)
    laws = [
        pack_law(
            rows, sizes[i], temperature=temperatures[i], softcap=cap, logit_scale=scale
        )._replace(
            bias=None
            if biases[i] is None
            else _checks.bias(rows, f"{side}_bias", biases[i], sizes[i])
        )
        for i, (side, cap, scale) in enumerate(
            (
                ("student", student_softcap, student_logit_scale),
                ("teacher", teacher_softcap, teacher_logit_scale),
            )
        )
    ]
    cells = Cells(
        *ids,
        *extras,
        _checks.token_weights(_OP, token_weights, rows.num_tokens, rows.device, rows.real),
        _laws.coefficients(rows, [coefficient for coefficient, _ in components]),
        [component.id for _, component in components],
        [value for _, component in components for value in component.kernel_params],
        TAILS.index(tail),
    )
    student = Side(hidden, head, laws[0])
    teacher = Side(other_hidden.detach(), other_head.detach(), laws[1])
    scratch = _overlap_cells.scratch(cells, *laws, rows.real)
    _row_chunks.check(_OP, student, teacher, workspace_bytes, scratch)
    arguments = (*student[:2], *teacher[:2], *cells, *laws[0], *laws[1], workspace_bytes)
    options = (bool(statistics), compact_tokens, chosen)
    if reduction == "none":
        loss, named = torch.ops.opd.fused_linear_overlap_divergence_fwd(*arguments, *options)
    else:
        differentiable = (hidden, head, laws[0].bias, extras[0])
        wanted = [
            torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            for tensor in differentiable
        ]
        loss, *_, named = torch.ops.opd.fused_linear_overlap_divergence_sum(
            *arguments, wanted, *options
        )
    returned = {name: named[STATISTICS.index(name)] for name in statistics}
    return FusedLinearOverlapDivergenceOutput(loss, returned)


# -- checks --------------------------------------------------------------------------------------


def _ids(
    student_ids: Tensor | None, teacher_ids: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if student_ids is None and teacher_ids is None:
        return None, None
    checked = []
    for name, ids in (("student_ids", student_ids), ("teacher_ids", teacher_ids)):
        _checks.tensor(_OP, name, ids, 1)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{_OP}: {name} must be int64 or int32, got {ids.dtype}.")
        if ids.device != device:
            raise ValueError(f"{_OP}: {name} must be on {device}, got {ids.device}.")
        checked.append(ids.to(torch.int64).contiguous())
    _checks.length(_OP, "teacher_ids", checked[1], checked[0].shape[0], "student_ids")
    if checked[0].shape[0] == 0:
        raise ValueError(f"{_OP}: student_ids must name at least one shared token, got none.")
    return checked[0], checked[1]


def _extras(
    hidden: Tensor, student: Tensor | None, teacher: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if (student is None) != (teacher is None):
        got = "teacher_extra_logits" if student is None else "student_extra_logits"
        raise ValueError(
            f"{_OP}: student_extra_logits and teacher_extra_logits must be given together, got "
            f"only {got}."
        )
    if student is None:
        return None, None
    for name, value in (("student_extra_logits", student), ("teacher_extra_logits", teacher)):
        _checks.tensor(_OP, name, value, 1)
        _checks.length(_OP, name, value, hidden.shape[0], "student_hidden")
        _checks.real_values(_OP, name, value)
        if value.device != hidden.device:
            raise ValueError(f"{_OP}: {name} must be on {hidden.device}, got {value.device}.")
    return student, teacher.detach()


def _statistic_names(names: Sequence[str], tail: str) -> tuple[str, ...]:
    names = _checks.names(_OP, "statistics", names)
    allowed = [name for name in STATISTICS if tail != "renormalize_both" or name not in MASSES]
    for name in names:
        _checks.one_of(_OP, "statistics", name, allowed)
    return names


def _check_sizes(tail: str, student_ids: Tensor | None, sizes: Sequence[int]) -> None:
    if student_ids is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{_OP}: student_ids and teacher_ids must be given for vocabularies of {sizes[0]} "
                f"and {sizes[1]} tokens, got None. One vocabulary whose heads are padded "
                "differently takes student_vocab_size and teacher_vocab_size."
            )
        return
    num_shared = student_ids.shape[0]
    num_rest = [size - num_shared for size in sizes]
    for side, rest in zip(("student", "teacher"), num_rest, strict=True):
        if rest < 0:
            raise ValueError(
                f"{_OP}: {side}_ids must hold every id once, got {num_shared} of a vocabulary of "
                f"{num_shared + rest}."
            )
    if tail == "bucket" and (num_rest[0] == 0) != (num_rest[1] == 0):
        side = ("student", "teacher")[num_rest.index(0)]
        raise ValueError(
            f"{_OP}: tail must not be 'bucket' where every token of the {side} is shared and the "
            "other side has more: one bucket is empty and the divergence may be infinite. Use "
            "tail='renormalize_both'."
        )


def _planned(tensors: Sequence[Tensor], options: dict) -> tuple[list[Tensor], list[int]]:
    """(ids of the cells, none for every token; the vocabulary of each side's GEMMs)"""
    sizes = [
        _checks.vocab_prefix(
            _OP, options.get(f"{side}_vocab_size"), **{f"{side}_lm_head_weight": head.shape[0]}
        )
        for side, head in (("student", tensors[1]), ("teacher", tensors[3]))
    ]
    ids = [tensor for tensor in tensors[4:6] if tensor is not None]
    if options.get("tail") == "renormalize_both" and ids:
        return [], [ids[0].shape[0]] * 2
    return ids, sizes


def as_one_vocabulary(tensors: Sequence[Tensor], options: dict) -> tuple[list[Tensor], dict] | None:
    """Tensors and options for `fused_linear_divergence`, if it is what such a call comes to."""
    ids, sizes = _planned(tensors, options)
    if ids or options.get("student_extra_logits") is not None:
        return None
    kept = {
        name: value
        for name, value in options.items()
        if name in ("divergence", "workspace_bytes", "compact_tokens", "reduction")
    }
    return [tensors[0], tensors[1][: sizes[0]], tensors[2], tensors[3][: sizes[1]]], kept


def cut(tensors: Sequence[Tensor], options: dict) -> _plan.Plan:
    """How a call with these tensors and keyword arguments is cut, all of whose rows count."""
    ids, sizes = _planned(tensors, options)
    laws = [
        Law(None, None, [1.0, options.get(f"{side}_softcap") or 0.0, 1.0], size)
        for side, size in zip(("student", "teacher"), sizes, strict=True)
    ]
    student, teacher = (
        Side(hidden, head, law)
        for hidden, head, law in zip(tensors[:4:2], tensors[1:4:2], laws, strict=True)
    )
    cells = Cells(*(ids or (None, None)), *(None,) * 4, [], [], 0)
    with_grads = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors[:2]]
    budget = options.get("workspace_bytes", _checks.DEFAULT_WORKSPACE_BYTES)
    real = _checks.real_dtype(student.hidden)
    return _row_chunks.plan_of(
        _OP,
        student.hidden.shape[0],
        student,
        teacher,
        _row_chunks.Options(budget, [*with_grads, False], None),
        _overlap_cells.scratch(cells, *laws, real),
    )


# -- the op --------------------------------------------------------------------------------------

_CELLS = 4
_LAWS = _CELLS + len(Cells._fields)
_NUM_LAW = len(Law._fields)
_END = _LAWS + 2 * _NUM_LAW
# hidden, head, student's bias, extra logits
_DIFFERENTIABLE = (0, 1, _LAWS, _CELLS + Cells._fields.index("student_extra_logits"))


def _split(arguments: Sequence) -> tuple[Side, Side, Cells, list]:
    student, teacher = (
        Law(*arguments[begin : begin + _NUM_LAW]) for begin in (_LAWS, _LAWS + _NUM_LAW)
    )
    return (
        Side(*arguments[:2], student),
        Side(*arguments[2:_CELLS], teacher),
        Cells(*arguments[_CELLS:_LAWS]),
        list(arguments[_END:]),
    )


def _empty_statistics(student: Side, with_statistics: bool) -> Tensor:
    hidden = student.hidden
    shape = (len(STATISTICS), hidden.shape[0] if with_statistics else 0)
    return hidden.new_zeros(shape, dtype=_checks.real_dtype(hidden))


def _run(
    student: Side, teacher: Side, cells: Cells, workspace_bytes: int, with_grads, *options
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """(loss [T], gradients, statistics)."""
    with_statistics, compact_tokens, backend = options
    statistics = _empty_statistics(student, with_statistics)
    info = torch.finfo(torch.float32)
    bounds = (info.tiny, info.max, "positive and finite")
    for side, law in (("student", student.law), ("teacher", teacher.law)):
        if law.temperatures is not None:
            _checks.values_in_range(
                _OP, f"{side} temperature", law.temperatures, cells.token_weights, *bounds
            )
    student, teacher = (
        side._replace(law=_overlap_cells.counted(side.law, cells.token_weights))
        for side in (student, teacher)
    )
    laws = (student.law, teacher.law)
    has_extra = cells.student_extra_logits is not None
    loss, sums, extra = _row_chunks.run(
        _OP,
        student,
        teacher,
        _overlap_cells.Rows(cells, laws, backend, statistics),
        cells.token_weights,
        _row_chunks.Options(workspace_bytes, with_grads[: 3 + has_extra], compact_tokens),
        _overlap_cells.scratch(cells, *laws, _checks.real_dtype(student.hidden)),
    )
    none = student.hidden.new_empty(0, dtype=loss.dtype)
    return loss, (*sums, *(extra or (none,))), statistics


def _sources(student: Side, cells: Cells) -> tuple[Tensor | None, ...]:
    return (*_row_chunks.sources(student), cells.student_extra_logits)


def _empty_gradients(student: Side, cells: Cells, with_grads: Sequence[bool]) -> list[Tensor]:
    real = _checks.real_dtype(student.hidden)
    return [
        student.hidden.new_empty(source.shape if wanted else 0, dtype=real)
        for source, wanted in zip(_sources(student, cells), with_grads, strict=True)
    ]


def _sum(*arguments):
    student, teacher, cells, rest = _split(arguments)
    loss, gradients, statistics = _run(student, teacher, cells, *rest)
    # float64: a sum over 100k tokens in float32 would be the least accurate step of the op
    return loss.sum(dtype=torch.float64).to(loss.dtype), *gradients, statistics


def _sum_fake(*arguments):
    student, _, cells, (_, with_grads, with_statistics, *_) = _split(arguments)
    return (
        student.hidden.new_empty((), dtype=_checks.real_dtype(student.hidden)),
        *_empty_gradients(student, cells, with_grads),
        _empty_statistics(student, with_statistics),
    )


def _fwd(*arguments):
    student, teacher, cells, (workspace_bytes, *options) = _split(arguments)
    wanted = [False] * len(_DIFFERENTIABLE)
    loss, _, statistics = _run(student, teacher, cells, workspace_bytes, wanted, *options)
    return loss, statistics


def _fwd_fake(*arguments):
    student, _, _, (_, with_statistics, *_) = _split(arguments)
    loss = student.hidden.new_empty(
        student.hidden.shape[0], dtype=_checks.real_dtype(student.hidden)
    )
    return loss, _empty_statistics(student, with_statistics)


def _fwd_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _formed.save_inputs(ctx, inputs)


def _bwd(grad_loss, *arguments):
    student, teacher, cells, (workspace_bytes, with_grads, *rest) = _split(arguments)
    weights = _formed.upstream_weights(grad_loss, cells.token_weights)
    weighted = cells._replace(token_weights=weights)
    _, gradients, _ = _run(student, teacher, weighted, workspace_bytes, with_grads, False, *rest)
    return _formed.in_dtypes(gradients, _sources(student, cells), with_grads)


def _bwd_fake(_, *arguments):
    student, _, cells, (_, with_grads, *_) = _split(arguments)
    gradients = _empty_gradients(student, cells, with_grads)
    return _formed.in_dtypes(gradients, _sources(student, cells), with_grads, Tensor.to)


register(
    "fused_linear_overlap_divergence_sum",
    fake=_sum_fake,
    setup_context=_formed.sum_setup_context(_DIFFERENTIABLE, lambda inputs: _split(inputs)[3][1]),
    backward=_formed.sum_backward(_DIFFERENTIABLE),
    python=_sum,
)
register(
    "fused_linear_overlap_divergence_fwd",
    fake=_fwd_fake,
    setup_context=_fwd_setup_context,
    backward=_formed.backward_again(
        _OP, _DIFFERENTIABLE, lambda saved, wanted: [*saved[:-3], wanted, *saved[-2:]]
    ),
    python=_fwd,
)
register(
    "fused_linear_overlap_divergence_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    python=_bwd,
)
