# SPDX-License-Identifier: Apache-2.0
"""The loop of fused losses whose rows need the whole laws of two models, of any two vocabularies.

Per chunk of rows: both models' logits, a callback that makes a loss per row of them and leaves the
gradient dZ where the student's logits were, then dX and dW. No [T, V] is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _buffers, _checks, _gemms, _linear, _plan
from .token_logprobs import Law

WHOLE_ROWS = "both laws of a row are needed whole"


class Side(NamedTuple):
    """One model: hidden [T, D], lm_head_weight [V, D], and how its logits become a law."""

    hidden: Tensor
    lm_head_weight: Tensor
    law: Law


class Options(NamedTuple):
    """What does not change the result beyond its rounding.

    with_grads: of the student's hidden states, head and bias, then of each per-row input.
    """

    workspace_bytes: int
    with_grads: list[bool]
    compact_tokens: bool | None


class Scratch(NamedTuple):
    """Bytes that a callback allocates: per row of a chunk, and whatever the chunk."""

    per_row: int = 0
    per_call: int = 0


class Chunk(NamedTuple):
    """What a callback is given.

    Attributes:
        rows: where the rows are in the tensors of the call.
        student_logits: [C, Vs] hidden @ head.T, before bias, scale, softcap and temperature; with
            `with_grad` the callback leaves dZ, the gradient with respect to them, in their place.
        teacher_logits: [C, Vt], the same of the teacher; may be overwritten.
        student_law, teacher_law: of these rows.
        weights: [C], or None for ones. The loss and all gradients are to be times them; a row of
            weight 0 has loss 0 and gradients 0, whatever it holds.
    """

    rows: slice | Tensor
    student_logits: Tensor
    teacher_logits: Tensor
    student_law: Law
    teacher_law: Law
    weights: Tensor | None
    with_grad: bool


# -> loss [C], and a gradient [C] of each per-row input (none without `with_grad`)
Rows = Callable[[Chunk], tuple[Tensor, Sequence[Tensor]]]


class Sums(NamedTuple):
    """Float32 (float64); what nobody asked for has no elements."""

    student_hidden: Tensor
    student_lm_head_weight: Tensor
    student_bias: Tensor


def sources(student: Side) -> tuple[Tensor, Tensor, Tensor | None]:
    """What has a gradient, in the order of `Sums`."""
    return student.hidden, student.lm_head_weight, student.law.bias


def empty_sums(student: Side, with_grads: Sequence[bool]) -> Sums:
    """Fake or real outputs of the right shapes, uninitialised."""
    real = _checks.real_dtype(student.hidden)
    return Sums(
        *(
            student.hidden.new_empty(source.shape if wanted else 0, dtype=real)
            for source, wanted in zip(sources(student), with_grads[:3], strict=True)
        )
    )


def check(op: str, student: Side, teacher: Side, workspace_bytes: int, scratch: Scratch) -> None:
    """Of `plan_of`, what can be refused before the op runs.

    Raises:
        ValueError: the workspace does not even hold one row.
    """
    _checks.byte_count(op, workspace_bytes)
    _plan.check(
        op,
        student.law.vocab_size,
        (student.lm_head_weight, teacher.lm_head_weight),
        workspace_bytes,
        whole_rows=WHOLE_ROWS,
        per_token=_more_per_row(student, teacher, scratch),
        per_call=scratch.per_call,
    )


def plan_of(
    op: str, num_rows: int, student: Side, teacher: Side, options: Options, scratch: Scratch
) -> _plan.Plan:
    """How a call with so many rows that count is cut."""
    trained = bool(options.with_grads[1])
    return _plan.plan(
        op,
        num_rows,
        student.law.vocab_size,
        (student.lm_head_weight, teacher.lm_head_weight),
        options.workspace_bytes,
        whole_rows=WHOLE_ROWS,
        in_parts=False,
        per_token=_more_per_row(student, teacher, scratch),
        per_call=scratch.per_call,
        frozen_head=any(options.with_grads) and not trained,
        trained=trained,
    )


def _teacher_width(student: Side, teacher: Side) -> int:
    """Columns of the buffer of the teacher's logits, in which a narrow dZ is rounded."""
    widths = [teacher.law.vocab_size]
    if _gemms.grad_dtype(student.lm_head_weight) != _gemms.AS_LOGITS:
        widths.append(-(-_stride(student, student.law.vocab_size) // 2))
    return max(widths)


def _more_per_row(student: Side, teacher: Side, scratch: Scratch) -> int:
    """Beside what a plan counts, for which both models have the student's vocabulary."""
    itemsize = _checks.real_dtype(student.hidden).itemsize
    widths = _teacher_width(student, teacher), student.law.vocab_size
    of_teacher, of_student = (_stride(student, width) for width in widths)
    return itemsize * (of_teacher - of_student) + scratch.per_row


def _stride(side: Side, columns: int) -> int:
    return _buffers.row_stride(side.hidden, columns)


def run(
    op: str,
    student: Side,
    teacher: Side,
    rows: Rows,
    token_weights: Tensor | None,
    options: Options,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Sums, tuple[Tensor, ...]]:
    """(loss [T], gradients of the student, gradients [T] of the per-row inputs).

    Everything is float32 (float64) and times the weights: gradients are rounded to the inputs'
    dtypes once, by the caller.

    Args:
        rows: called for each chunk, in order.
        token_weights: [T]; rows of weight 0 are left out before the first GEMM, see `compact`.
        scratch: what `rows` allocates.
    """
    return _Run(op, student, teacher, token_weights, options, scratch or Scratch()).run(rows)


class _Run:
    def __init__(
        self,
        op: str,
        student: Side,
        teacher: Side,
        token_weights: Tensor | None,
        options: Options,
        scratch: Scratch,
    ) -> None:
        self.op, self.student, self.teacher, self.options = op, student, teacher, options
        hidden, head = student.hidden, student.lm_head_weight
        self.token_idx = _linear.active_tokens(token_weights, options.compact_tokens)
        num_rows = hidden.shape[0]
        num_active = num_rows if self.token_idx is None else self.token_idx.shape[0]
        self.plan = plan_of(op, num_active, student, teacher, options, scratch)
        self.with_grad = any(options.with_grads)
        # rows of weight 0 take part, and their hidden states may hold anything
        self.has_masked = self.token_idx is None and token_weights is not None
        self.unit = _linear.gradient_unit(head, token_weights) if self.with_grad else None
        self.weights = _linear.in_units(token_weights, self.unit, num_rows)
        new = hidden.new_zeros if self.token_idx is not None else hidden.new_empty
        real = _checks.real_dtype(hidden)
        self.loss = new(num_rows, dtype=real)
        sums = empty_sums(student, [False] * 3)._asdict()
        with_hidden, with_head, with_bias, *with_rows = options.with_grads
        if with_hidden:
            sums["student_hidden"] = new(hidden.shape, dtype=real)
        if with_head:
            sums["student_lm_head_weight"] = _gemms.new_grad_weight(
                head, student.law.vocab_size, num_active
            )
        if with_bias:
            sums["student_bias"] = torch.zeros_like(student.law.bias, dtype=real)
        self.sums = Sums(**sums)
        self.row_grads = tuple(new(num_rows if wanted else 0, dtype=real) for wanted in with_rows)

    def run(self, rows: Rows) -> tuple[Tensor, Sums, tuple[Tensor, ...]]:
        plan, width = self.plan, _teacher_width(self.student, self.teacher)
        shapes = [(plan.chunk_tokens, self.student.law.vocab_size), (plan.chunk_tokens, width)]
        with _buffers.borrowed_buffers(self.student.hidden, shapes) as buffers:
            for begin, end in plan.chunks():
                # a function, so that its gathered rows are gone before the next chunk's exist
                self._run_chunk(rows, buffers, begin, end)
        if self.unit is not None:
            for value in (self.loss, *self.sums, *self.row_grads):
                value.mul_(self.unit)
        return self.loss, self.sums, self.row_grads

    def _run_chunk(self, rows: Rows, buffers: list[Tensor], begin: int, end: int) -> None:
        here = slice(begin, end) if self.token_idx is None else self.token_idx[begin:end]
        weights = None if self.weights is None else self.weights[here]
        masked = weights if self.has_masked else None
        logits, hidden = [], None
        for name, side, buffer in zip(
            ("student", "teacher"), (self.student, self.teacher), buffers, strict=True
        ):
            with _linear.phase(side.hidden, self.op, "take"):
                taken = _linear.take(side.hidden, self.token_idx, begin, end, masked)
            out = _buffers.rows_of(buffer, end - begin, side.law.vocab_size)
            with _linear.phase(taken, self.op, f"{name}_logits"):
                _gemms.logits_into(out, taken, side.lm_head_weight, self.plan.head_slice_rows)
            logits.append(out)
            # the teacher's are not needed again
            hidden = taken if hidden is None else hidden
            del taken
        chunk = Chunk(
            here,
            *logits,
            self.student.law.rows(here),
            self.teacher.law.rows(here),
            weights,
            self.with_grad,
        )
        with _linear.phase(hidden, self.op, "rows"):
            loss, row_grads = rows(chunk)
        _linear.put(self.loss, self.token_idx, begin, end, loss)
        if not self.with_grad:
            return
        for wanted, target, values in zip(
            self.options.with_grads[3:], self.row_grads, row_grads, strict=True
        ):
            if wanted:
                _linear.put(target, self.token_idx, begin, end, values)
        self._backproject(hidden, logits[0], buffers[1], begin, end)

    def _backproject(
        self, hidden: Tensor, grad_logits: Tensor, spare: Tensor, begin: int, end: int
    ) -> None:
        """Adds what dZ of these rows gives to each gradient; the teacher's logits are used up."""
        head, sums = self.student.lm_head_weight, self.sums
        with_hidden, with_head, with_bias, *_ = self.options.with_grads
        if with_bias:
            with _linear.phase(hidden, self.op, "grad_bias"):
                bias = sums.student_bias
                bias[: grad_logits.shape[1]] += grad_logits.sum(0, dtype=bias.dtype)
        operand = grad_logits
        if _gemms.grad_dtype(head) != _gemms.AS_LOGITS:
            # as wide as the head's GEMMs take it
            operand, spare = _buffers.rounded_in(spare, operand, head.dtype)
        if with_hidden:
            with _linear.phase(hidden, self.op, "grad_hidden"):
                grad_hidden = _gemms.grad_hidden(
                    operand, head, self.plan.head_slice_rows, self.plan.grad_hidden_splits, spare
                )
            _linear.put(sums.student_hidden, self.token_idx, begin, end, grad_hidden)
        if with_head:
            with _linear.phase(hidden, self.op, "grad_weight"):
                _gemms.accumulate_grad_weight(
                    sums.student_lm_head_weight, operand, hidden, begin == 0
                )


def law_logits(logits: Tensor, law: Law) -> Tensor:
    """cap(scale * (logits + bias)) / temperature, [C, V]."""
    scale, cap, temperature = law.numbers
    if law.bias is not None:
        logits = logits + law.bias[: law.vocab_size].detach()
    if scale != 1.0:
        logits = scale * logits
    if cap != 0.0:
        logits = cap * torch.tanh(logits / cap)
    if law.temperatures is not None:
        return logits / law.temperatures.unsqueeze(1)
    return logits if temperature == 1.0 else logits / temperature
