# SPDX-License-Identifier: Apache-2.0
"""The loops of fused_linear_divergence: LM-head GEMMs and row kernels over chunks.

Path A has whole rows of logits for a chunk of tokens: one row kernel, dZ in place. Path B has a
slice of the vocabulary at a time and forms its logits again for each phase. A vocabulary-parallel
call has its own shard's columns of a chunk, whole, and combines the state between phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _dispatch, _laws, _linear, _parallel, sparse_gradient
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
    backend: str


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


def run(inputs: Inputs, laws: _laws.Laws, options: Options) -> tuple[Tensor, Gradients, Tensor]:
    """(loss [T], gradients, statistics).

    Everything is float32 (float64): gradients are rounded to the inputs' dtype once, after the
    upstream gradient has been applied.
    """
    _check_ids(laws, options)
    return _Run(inputs, laws, options).run()


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
    """Tokens [begin, end) of the active ones: hidden states by head, and their laws."""

    begin: int
    end: int
    hidden: list[Tensor]
    # student_hidden @ A.T of the low-rank pair
    low_rank: Tensor | None
    laws: _laws.Laws


class _Run:
    def __init__(self, inputs: Inputs, laws: _laws.Laws, options: Options) -> None:
        self.inputs, self.options = inputs, options
        self.rows = _dispatch.row_ops(options.backend)
        self.group = _parallel.resolve(options.process_group)
        # from here on the vocabulary is this rank's part of it
        self.first_column = 0 if self.group is None else self.group.first_column
        if self.group is not None:
            laws = laws._replace(vocab_size=self.group.num_columns)
        self.laws = laws
        student = inputs.student_hidden
        real = real_dtype(student)
        num_tokens = student.shape[0]
        self.token_idx = _linear.active_tokens(laws.token_weights)
        num_active = num_tokens if self.token_idx is None else self.token_idx.shape[0]
        whole_rows = _laws.needs_whole_rows(laws.divergences)
        if self.group is not None:
            whole_rows = _parallel.WHOLE_ROWS
        self.plan = _linear.plan(
            OP,
            num_active,
            laws.vocab_size,
            inputs.heads(),
            options.workspace_bytes,
            whole_rows=whole_rows,
        )
        self.with_grad = any(options.with_grads)
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
            self.low_rank = _linear.LowRank(
                inputs.student_lora_a.to(real), inputs.student_lora_b.to(real)
            )

    def run(self) -> tuple[Tensor, Gradients, Tensor]:
        shape = (len(self.inputs.heads()), self.plan.chunk_tokens, self.plan.slice_columns)
        with _linear.borrowed_buffer(self.inputs.student_hidden, *shape) as self.buffers:
            for begin, end in self.plan.chunks():
                # a function, so that its gathered rows are gone before the next chunk's exist
                self._run_chunk(begin, end)
        if self.group is not None:
            self.group.sum_gradients(
                self.gradients.student_hidden, self.gradients.student_lora_a, self.dropped
            )
        statistics = self.statistics
        if self.options.gradient_tolerance and self.options.with_statistics:
            statistics = torch.cat([statistics, self.dropped.unsqueeze(0)])
        return self.loss, self.gradients, statistics

    def _new_gradients(self, new: Callable, num_active: int) -> Gradients:
        inputs, laws, wanted = self.inputs, self.laws, self.options.with_grads
        empty = empty_gradients(inputs, laws, [False] * len(wanted))
        named = empty._asdict()
        real = self.loss.dtype
        if wanted[0]:
            named["student_hidden"] = new(inputs.student_hidden.shape, dtype=real)
        if wanted[1]:
            # a tolerance leaves most rows of dW unwritten
            sparse = bool(self.options.gradient_tolerance)
            named["student_lm_head_weight"] = _linear.new_grad_weight(
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
            loss, statistics = self._whole_rows(chunk)
        else:
            loss, statistics = self._phases(chunk)
        _linear.put(self.loss, self.token_idx, begin, end, loss)
        if self.options.with_statistics:
            _linear.put(self.statistics.t(), self.token_idx, begin, end, statistics.t())

    def _take(self, begin: int, end: int) -> _Chunk:
        inputs = self.inputs
        hidden = [
            _linear.take(values, self.token_idx, begin, end)
            for values in (inputs.student_hidden, inputs.teacher_hidden, inputs.reference_hidden)
            if values is not None
        ]
        rows = slice(begin, end) if self.token_idx is None else self.token_idx[begin:end]
        low_rank = None
        if self.low_rank is not None:
            low_rank = self.low_rank.project(hidden[0])
        return _Chunk(begin, end, hidden, low_rank, self.laws.rows(rows))

    def _logits(self, chunk: _Chunk, columns: slice) -> list[Tensor | None]:
        """[C, columns] of student, teacher and reference (or None), in the buffers."""
        num_tokens, width = chunk.end - chunk.begin, columns.stop - columns.start
        logits: list[Tensor | None] = []
        sides = ("student_logits", "teacher_logits", "reference_logits")
        heads = self.inputs.heads()
        for i, (name, head, hidden) in enumerate(zip(sides, heads, chunk.hidden, strict=False)):
            flat = self.buffers[i].view(-1)[: num_tokens * width]
            out = flat.view(num_tokens, width)
            with _linear.phase(hidden, OP, name):
                _linear.logits_into(out, hidden, head[columns], self.plan.head_slice_rows)
                if i == 0 and chunk.low_rank is not None:
                    self.low_rank.columns(columns).add_logits(out, chunk.low_rank)
            logits.append(out)
        return logits + [None] * (3 - len(logits))

    def _whole_rows(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        columns = slice(0, self.laws.vocab_size)
        logits = self._logits(chunk, columns)
        with _linear.phase(logits[0], OP, "rows"):
            if self.with_grad:
                loss, statistics = self.rows.divergence_fwd_grad_(
                    *logits, *chunk.laws, self.options.with_statistics
                )
            else:
                loss, _, statistics = self.rows.divergence_fwd(
                    *logits, *chunk.laws, self.options.with_statistics
                )
        if self.with_grad:
            self._backproject(chunk, logits[0], columns, logits[1], first=True)
        return loss, statistics

    def _phases(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        state = chunk.hidden[0].new_empty(
            chunk.end - chunk.begin, chunk.laws.state_size, dtype=torch.float64
        )
        slices = self.plan.slices()
        formed: list[Tensor | None] = []

        def each_slice() -> Iterator[tuple[slice, list[Tensor | None]]]:
            for columns in slices:
                if len(slices) > 1 or not formed:
                    formed[:] = self._logits(chunk, columns)
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
                self.group.combine(state, number, self.options.with_statistics)
            if number == LSE:
                phase(CLOSE_LSE, columns, logits)
        loss, statistics = phase(FINISH, columns, logits)
        if self.with_grad:
            ones = torch.ones_like(loss)
            for columns, logits in each_slice():
                with _linear.phase(logits[0], OP, "rows"):
                    self.rows.divergence_bwd_(
                        ones,
                        state,
                        *logits,
                        *chunk.laws.columns(columns),
                        self.first_column + columns.start,
                    )
                self._backproject(chunk, logits[0], columns, logits[1], first=columns.start == 0)
        return loss, statistics

    def _backproject(
        self, chunk: _Chunk, grad_logits: Tensor, columns: slice, buffer: Tensor, *, first: bool
    ) -> None:
        """Adds what dZ of these tokens and columns gives to each gradient; overwrites `buffer`."""
        wanted, gradients = self.options.with_grads, self.gradients
        head = self.inputs.student_lm_head_weight[columns]
        grad_weight = gradients.student_lm_head_weight[columns] if wanted[1] else None
        hidden, slice_rows = chunk.hidden[0], self.plan.head_slice_rows
        packed = None
        if self.options.gradient_tolerance and (wanted[0] or wanted[1]):
            with _linear.phase(hidden, OP, "pack"):
                packed, dropped = sparse_gradient.pack(
                    self.rows,
                    grad_logits,
                    chunk.laws.token_weights,
                    self.options.gradient_tolerance,
                    buffer,
                    head,
                    slice_rows,
                )
            self._add(self.dropped, chunk, dropped)
        grad_hidden = None
        if wanted[0]:
            with _linear.phase(hidden, OP, "grad_hidden"):
                if packed is None:
                    grad_hidden = _linear.grad_hidden(grad_logits, head, slice_rows)
                else:
                    grad_hidden = sparse_gradient.grad_hidden(packed, head)
        if grad_weight is not None:
            with _linear.phase(hidden, OP, "grad_weight"):
                if packed is None:
                    _linear.accumulate_grad_weight(
                        grad_weight, grad_logits, hidden, first=chunk.begin == 0
                    )
                else:
                    sparse_gradient.add_grad_weight(self.rows, grad_weight, packed, hidden)
        if wanted[2]:
            gradients.student_bias[columns] += grad_logits.sum(0)
        if chunk.low_rank is not None:
            grad_down = gradients.student_lora_a if wanted[3] else None
            grad_up = gradients.student_lora_b[columns] if wanted[4] else None
            self.low_rank.columns(columns).backproject(
                grad_logits, hidden, chunk.low_rank, (grad_hidden, grad_down, grad_up)
            )
        if wanted[0]:
            self._put_grad_hidden(chunk, grad_hidden, first)

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
