# SPDX-License-Identifier: Apache-2.0
"""The loops of fused_linear_divergence: LM-head GEMMs and row kernels over chunks.

Path A has whole rows of logits for a chunk of tokens: one row kernel per part of the chunk, for
which the other models' logits exist, dZ in place. Path B has a slice of the vocabulary at a time
and forms its logits again for each phase. A vocabulary-parallel call has its own shard's columns of
a chunk, whole, and combines the state between phases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _buffers, _dispatch, _gemms, _laws, _linear, _parallel, _plan, sparse_gradient
from ._checks import real_dtype, token_ids_in_range, values_in_range
from .divergence import CLOSE_LSE, FINISH, LSE, OPEN, ROW_SUMS, TERMS

OP = "fused_linear_divergence"


class Inputs(NamedTuple):
    """The tensors of OPD_HIDDEN in csrc/torch/ops.cpp; the low-rank pair carries its scale in A."""

    student_hidden: Tensor
    student_lm_head_weight: Tensor
    teacher_hidden: Tensor
    teacher_lm_head_weight: Tensor
    reference_hidden: Tensor | None
    reference_lm_head_weight: Tensor | None
    student_lora_a: Tensor | None
    student_lora_b: Tensor | None

    def heads(self) -> list[Tensor]:
        """Student's, teacher's and, if there is one, the reference's."""
        heads = (
            self.student_lm_head_weight,
            self.teacher_lm_head_weight,
            self.reference_lm_head_weight,
        )
        return [head for head in heads if head is not None]


class Gradients(NamedTuple):
    """Float32 (float64) sums over the chunks; what nobody asked for has no elements."""

    student_hidden: Tensor
    student_lm_head_weight: Tensor
    student_bias: Tensor
    student_lora_a: Tensor
    student_lora_b: Tensor


class Options(NamedTuple):
    """What does not change the result beyond its rounding, but for gradient_tolerance."""

    workspace_bytes: int
    with_grads: list[bool]
    with_statistics: bool
    process_group: str
    gradient_tolerance: float
    compact_tokens: bool | None
    backend: str


class Sum(NamedTuple):
    """The caller's float32 (float64) [V_head, D]: `factor` times the head's gradient is added."""

    grad: Tensor
    factor: float


def empty_gradients(inputs: Inputs, laws: _laws.Laws, with_grads: list[bool]) -> Gradients:
    """Fake or real outputs of the right shapes, uninitialised."""
    real = real_dtype(inputs.student_hidden)
    sources = (
        inputs.student_hidden,
        inputs.student_lm_head_weight,
        laws.student_bias,
        inputs.student_lora_a,
        inputs.student_lora_b,
    )
    return Gradients(
        *(
            inputs.student_hidden.new_empty(source.shape if wanted else 0, dtype=real)
            for source, wanted in zip(sources, with_grads, strict=True)
        )
    )


def run(
    inputs: Inputs, laws: _laws.Laws, options: Options, head_sum: Sum | None = None
) -> tuple[Tensor, Gradients, Tensor]:
    """(loss [T], gradients, statistics).

    Everything is float32 (float64): gradients are rounded to the inputs' dtype once, after the
    upstream gradient has been applied. With `head_sum`, the head's is added there.
    """
    _check_ids(laws, options)
    return _Run(inputs, laws, options, head_sum).run()


def plan_of(
    num_tokens: int, vocab_size: int, inputs: Inputs, laws: _laws.Laws, options: Options
) -> _plan.Plan:
    """How a call with so many tokens that count is cut."""
    whole_rows = _laws.needs_whole_rows(laws.divergences)
    group = _parallel.resolve(options.process_group)
    if group is not None:
        whole_rows = _parallel.WHOLE_ROWS
    plan = _plan.plan(
        OP,
        num_tokens,
        _parallel.planned_size(options.process_group, vocab_size),
        inputs.heads(),
        options.workspace_bytes,
        whole_rows=whole_rows,
        # ranks exchange a chunk's state at once, and columns are packed where all of a chunk's
        # teacher logits were
        in_parts=not options.process_group and not options.gradient_tolerance,
        low_rank=0 if inputs.student_lora_a is None else inputs.student_lora_a.shape[0],
        packs_columns=bool(options.gradient_tolerance),
        frozen_head=any(options.with_grads) and not options.with_grads[1],
        # ranks must cut alike
        trained=options.with_grads[1] or bool(options.process_group),
    )
    if group is None:
        return plan
    columns = group.num_columns
    return dataclasses.replace(plan, vocab_size=columns, slice_columns=columns)


def _check_ids(laws: _laws.Laws, options: Options) -> None:
    group = _parallel.resolve(options.process_group)
    total = laws.vocab_size if group is None else group.total_columns
    for name, ids in (("labels", laws.labels), ("topk_ids", laws.topk_ids)):
        if ids is not None:
            token_ids_in_range(OP, ids, total, name, padding=True)
    if laws.token_ids is not None:
        ids = laws.token_ids
        if laws.token_weights is not None:
            # of a token that does not count, no id is read
            ids = torch.where(laws.token_weights == 0, torch.zeros_like(ids), ids)
        token_ids_in_range(OP, ids, total)
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    positive = (tiny, largest, "positive and finite")
    for name, values, bounds in (
        ("student temperature", laws.student_temperatures, positive),
        ("teacher temperature", laws.teacher_temperatures, positive),
        ("teacher_weight of the mixture", laws.mixture_weights, (0.0, 1.0, "in [0, 1]")),
    ):
        if values is not None:
            values_in_range(OP, name, values, laws.token_weights, *bounds)


class _Chunk(NamedTuple):
    """Tokens [begin, end) of the active ones: the student's hidden states, and their laws."""

    begin: int
    end: int
    hidden: Tensor
    # student_hidden @ A.T of the low-rank pair
    low_rank: Tensor | None
    laws: _laws.Laws


class _Run:
    def __init__(
        self, inputs: Inputs, laws: _laws.Laws, options: Options, head_sum: Sum | None
    ) -> None:
        self.inputs, self.options, self.head_sum = inputs, options, head_sum
        self.rows = _dispatch.row_ops(options.backend)
        self.group = _parallel.resolve(options.process_group)
        # from here on the vocabulary is this rank's part of it
        self.first_column = 0 if self.group is None else self.group.first_column
        if self.group is not None:
            laws = laws._replace(vocab_size=self.group.num_columns)
        student, head = inputs.student_hidden, inputs.student_lm_head_weight
        real = real_dtype(student)
        num_tokens = student.shape[0]
        if options.gradient_tolerance and _linear.is_captured(student):
            raise RuntimeError(
                f"{OP}: gradient_tolerance must be None while a CUDA graph is captured, got "
                f"{options.gradient_tolerance}: its list of columns waits for the device."
            )
        self.token_idx = _linear.active_tokens(laws.token_weights, options.compact_tokens)
        num_active = num_tokens if self.token_idx is None else self.token_idx.shape[0]
        self.plan = plan_of(num_active, laws.vocab_size, inputs, laws, options)
        self.with_grad = any(options.with_grads)
        # columns are packed from float32 dZ, and few of them are left to be rounded
        self.grad_dtype = _gemms.AS_LOGITS
        if not options.gradient_tolerance:
            self.grad_dtype = _gemms.grad_dtype(head)
        self.unit = (
            _linear.gradient_unit(head, laws.token_weights, times=laws.coefficients)
            if self.with_grad
            else None
        )
        weights = _linear.in_units(laws.token_weights, self.unit, num_tokens)
        # tokens of weight 0 take part, and their hidden states may hold anything
        self.has_masked = self.token_idx is None and laws.token_weights is not None
        self.laws = laws._replace(token_weights=weights)
        new = student.new_zeros if self.token_idx is not None else student.new_empty
        self.loss = new(num_tokens, dtype=real)
        self.statistics = new(
            (_laws.NUM_STATISTICS, num_tokens if options.with_statistics else 0), dtype=real
        )
        self.dropped = student.new_zeros(
            num_tokens if options.gradient_tolerance else 0, dtype=real
        )
        self.gradients = self._new_gradients(new, num_active)
        self.low_rank = None
        if inputs.student_lora_a is not None:
            self.low_rank = _gemms.LowRank.of(
                inputs.student_lora_a, inputs.student_lora_b, head, self.grad_dtype
            )

    def run(self) -> tuple[Tensor, Gradients, Tensor]:
        head_sum = None if self.head_sum is None else self.head_sum.grad
        plan, num_others = self.plan, len(self.inputs.heads()) - 1
        shapes = [(plan.chunk_tokens, plan.slice_columns)]
        shapes += [(plan.teacher_tokens, plan.slice_columns)] * num_others
        with (
            _linear.summed_in_units(head_sum, self.unit),
            _buffers.borrowed_buffers(self.inputs.student_hidden, shapes) as self.buffers,
        ):
            for begin, end in plan.chunks():
                # a function, so that its gathered rows are gone before the next chunk's exist
                self._run_chunk(begin, end)
        gradients = self.gradients
        if self.unit is not None:
            for value in (self.loss, *gradients):
                value.mul_(self.unit)
        if self.group is not None:
            self.group.sum_gradients(
                gradients.student_hidden, gradients.student_lora_a, self.dropped
            )
        statistics = self.statistics
        if self.options.gradient_tolerance and self.options.with_statistics:
            statistics = torch.cat([statistics, self.dropped.unsqueeze(0)])
        return self.loss, gradients, statistics

    def _new_gradients(self, new: Callable, num_active: int) -> Gradients:
        inputs, laws, wanted = self.inputs, self.laws, self.options.with_grads
        empty = empty_gradients(inputs, laws, [False] * len(wanted))
        named = empty._asdict()
        real = self.loss.dtype
        if wanted[0]:
            named["student_hidden"] = new(inputs.student_hidden.shape, dtype=real)
        if wanted[1] and self.head_sum is None:
            # a tolerance leaves most rows of dW unwritten
            sparse = bool(self.options.gradient_tolerance)
            named["student_lm_head_weight"] = _gemms.new_grad_weight(
                inputs.student_lm_head_weight, laws.vocab_size, 0 if sparse else num_active
            )
        for name, source, wants in (
            ("student_bias", laws.student_bias, wanted[2]),
            ("student_lora_a", inputs.student_lora_a, wanted[3]),
            ("student_lora_b", inputs.student_lora_b, wanted[4]),
        ):
            if wants:
                named[name] = torch.zeros_like(source, dtype=real)
        return Gradients(**named)

    def _run_chunk(self, begin: int, end: int) -> None:
        chunk = self._take(begin, end)
        if self.plan.whole_rows and self.group is None:
            self._whole_rows(chunk)
        else:
            self._phases(chunk)

    def _put_values(self, begin: int, end: int, loss: Tensor, statistics: Tensor) -> None:
        _linear.put(self.loss, self.token_idx, begin, end, loss)
        if self.options.with_statistics:
            _linear.put(self.statistics.t(), self.token_idx, begin, end, statistics.t())

    def _take(self, begin: int, end: int) -> _Chunk:
        hidden = self.inputs.student_hidden
        with _linear.phase(hidden, OP, "take"):
            rows = slice(begin, end) if self.token_idx is None else self.token_idx[begin:end]
            laws = self.laws.rows(rows)
            weights = laws.token_weights if self.has_masked else None
            hidden = _linear.take(hidden, self.token_idx, begin, end, weights)
        low_rank = None
        if self.low_rank is not None:
            with _linear.phase(hidden, OP, "low_rank"):
                low_rank = self.low_rank.project(hidden)
        return _Chunk(begin, end, hidden, low_rank, laws)

    def _others(self, begin: int, end: int) -> list[Tensor]:
        """Hidden states of teacher and, if there is one, reference."""
        inputs = self.inputs
        with _linear.phase(inputs.teacher_hidden, OP, "take"):
            return [
                _linear.take(values, self.token_idx, begin, end)
                for values in (inputs.teacher_hidden, inputs.reference_hidden)
                if values is not None
            ]

    def _form(self, model: int, hidden: Tensor, columns: slice) -> Tensor:
        """Logits [C, columns] of student (0), teacher (1) or reference (2), in their buffer."""
        width = columns.stop - columns.start
        out = _buffers.rows_of(self.buffers[model], hidden.shape[0], width)
        name = ("student_logits", "teacher_logits", "reference_logits")[model]
        with _linear.phase(hidden, OP, name):
            head = self.inputs.heads()[model][columns]
            _gemms.logits_into(out, hidden, head, self.plan.head_slice_rows)
        return out

    def _student_logits(self, chunk: _Chunk, columns: slice) -> Tensor:
        out = self._form(0, chunk.hidden, columns)
        if chunk.low_rank is not None:
            with _linear.phase(out, OP, "low_rank"):
                self.low_rank.columns(columns).add_logits(out, chunk.low_rank)
        return out

    def _other_logits(self, others: list[Tensor], columns: slice) -> list[Tensor | None]:
        logits = [self._form(model, hidden, columns) for model, hidden in enumerate(others, 1)]
        return [*logits, None][:2]

    def _whole_rows(self, chunk: _Chunk) -> None:
        columns = slice(0, self.laws.vocab_size)
        student = self._student_logits(chunk, columns)
        for begin, end in self.plan.parts(chunk.end - chunk.begin):
            here = chunk.begin + begin, chunk.begin + end
            logits = [student[begin:end], *self._other_logits(self._others(*here), columns)]
            laws = chunk.laws.rows(slice(begin, end))
            with _linear.phase(student, OP, "rows"):
                if self.with_grad:
                    loss, statistics = self.rows.divergence_fwd_grad_(
                        *logits, *laws, self.options.with_statistics, self.grad_dtype
                    )
                else:
                    loss, _, statistics = self.rows.divergence_fwd(
                        *logits, *laws, self.options.with_statistics
                    )
            self._put_values(*here, loss, statistics)
            # or the hidden states of two parts would be alive
            del logits
        if self.with_grad:
            self._backproject(chunk, student, columns, first=True)

    def _phases(self, chunk: _Chunk) -> None:
        state = chunk.hidden.new_empty(
            chunk.end - chunk.begin, chunk.laws.state_size, dtype=torch.float64
        )
        slices, others = self.plan.slices(), self._others(chunk.begin, chunk.end)
        formed: list[Tensor | None] = []

        def each_slice() -> Iterator[tuple[slice, list[Tensor | None]]]:
            for columns in slices:
                if len(slices) > 1 or not formed:
                    student = self._student_logits(chunk, columns)
                    formed[:] = [student, *self._other_logits(others, columns)]
                yield columns, formed

        def phase(number: int, columns: slice, logits: list[Tensor | None]):
            with _linear.phase(logits[0], OP, "rows"):
                return self.rows.divergence_phase_(
                    state,
                    *logits,
                    *chunk.laws.columns(columns),
                    number,
                    self.first_column + columns.start,
                    self.options.with_statistics,
                )

        for number in (LSE, ROW_SUMS, TERMS):
            if number == ROW_SUMS and not _laws.has_row_sums(chunk.laws):
                continue
            for columns, logits in each_slice():
                if number == LSE and columns.start == 0:
                    phase(OPEN, columns, logits)
                phase(number, columns, logits)
            if self.group is not None:
                with _linear.phase(state, OP, "combine"):
                    self.group.combine(state, number, self.options.with_statistics)
            if number == LSE:
                phase(CLOSE_LSE, columns, logits)
        self._put_values(chunk.begin, chunk.end, *phase(FINISH, columns, logits))
        if self.with_grad:
            ones = chunk.hidden.new_ones(chunk.end - chunk.begin, dtype=self.loss.dtype)
            for columns, logits in each_slice():
                with _linear.phase(logits[0], OP, "rows"):
                    self.rows.divergence_bwd_(
                        ones,
                        state,
                        *logits,
                        *chunk.laws.columns(columns),
                        self.first_column + columns.start,
                        self.grad_dtype,
                    )
                self._backproject(chunk, logits[0], columns, first=columns.start == 0)

    def _backproject(self, chunk: _Chunk, logits: Tensor, columns: slice, *, first: bool) -> None:
        """Adds what dZ of these tokens and columns gives to each gradient.

        dZ is where the logits were; the teacher's have been used up and give their memory.
        """
        wanted, gradients = self.options.with_grads, self.gradients
        head = self.inputs.student_lm_head_weight[columns]
        hidden, spare = chunk.hidden, self.buffers[1]
        grad_logits = _gemms.gradient_of(logits, head, self.grad_dtype)
        packed = None
        if self.options.gradient_tolerance and (wanted[0] or wanted[1]):
            packed = self._pack(chunk, grad_logits, head)
        operand = grad_logits
        if packed is None:
            operand, spare = self._as_wide_as(head, grad_logits, spare)
        grad_hidden = None
        if wanted[0]:
            with _linear.phase(hidden, OP, "grad_hidden"):
                if packed is None:
                    grad_hidden = _gemms.grad_hidden(
                        operand,
                        head,
                        self.plan.head_slice_rows,
                        self.plan.grad_hidden_splits,
                        spare,
                    )
                else:
                    grad_hidden = sparse_gradient.grad_hidden(packed, head)
        if wanted[1]:
            with _linear.phase(hidden, OP, "grad_weight"):
                self._add_grad_weight(chunk, operand, columns, packed)
        if wanted[2]:
            with _linear.phase(hidden, OP, "grad_bias"):
                real = gradients.student_bias.dtype
                gradients.student_bias[columns] += grad_logits.sum(0, dtype=real)
        if chunk.low_rank is not None:
            grad_down = gradients.student_lora_a if wanted[3] else None
            grad_up = gradients.student_lora_b[columns] if wanted[4] else None
            with _linear.phase(hidden, OP, "grad_low_rank"):
                self.low_rank.columns(columns).backproject(
                    grad_logits, hidden, chunk.low_rank, (grad_hidden, grad_down, grad_up)
                )
        if wanted[0]:
            self._put_grad_hidden(chunk, grad_hidden, first)

    def _pack(
        self, chunk: _Chunk, grad_logits: Tensor, head: Tensor
    ) -> sparse_gradient.Packed | None:
        with _linear.phase(grad_logits, OP, "pack"):
            packed, dropped = sparse_gradient.pack(
                self.rows,
                grad_logits,
                chunk.laws.token_weights,
                self.options.gradient_tolerance,
                self.buffers[1][: grad_logits.numel()].view(grad_logits.shape),
                head,
                self.plan.head_slice_rows,
            )
        self._add(self.dropped, chunk, dropped)
        return packed

    def _as_wide_as(
        self, head: Tensor, grad_logits: Tensor, spare: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(dZ as the head's GEMMs take it, what is left of `spare`).

        On a GPU, float32 dZ of a 16-bit head, which no column could be left out of, is rounded in
        `spare`.
        """
        if grad_logits.dtype == head.dtype or not _gemms.on_gpu(head):
            return grad_logits, spare
        return _buffers.rounded_in(spare, grad_logits, head.dtype)

    def _add_grad_weight(
        self,
        chunk: _Chunk,
        grad_logits: Tensor,
        columns: slice,
        packed: sparse_gradient.Packed | None,
    ) -> None:
        target, factor, first = self.gradients.student_lm_head_weight, 1.0, chunk.begin == 0
        if self.head_sum is not None:
            (target, factor), first = self.head_sum, False
        target = target[columns]
        if packed is None:
            _gemms.accumulate_grad_weight(target, grad_logits, chunk.hidden, first, factor)
        else:
            sparse_gradient.add_grad_weight(self.rows, target, packed, chunk.hidden, factor)

    def _put_grad_hidden(self, chunk: _Chunk, grad_hidden: Tensor, first: bool) -> None:
        out = self.gradients.student_hidden
        if first:
            _linear.put(out, self.token_idx, chunk.begin, chunk.end, grad_hidden)
        else:
            self._add(out, chunk, grad_hidden)

    def _add(self, target: Tensor, chunk: _Chunk, rows: Tensor) -> None:
        if self.token_idx is None:
            target[chunk.begin : chunk.end] += rows
        else:
            # each token is in one chunk only, so no index repeats
            target[self.token_idx[chunk.begin : chunk.end]] += rows
