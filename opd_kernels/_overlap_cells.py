# SPDX-License-Identifier: Apache-2.0
"""Two laws of different vocabularies as rows of cells: the shared tokens, and one cell each for all
other tokens of a side and for a logit that is given.

What fused_linear_overlap_divergence gives to the engine of `_row_chunks`: cells out of both sides'
logits, our divergence of them, and the gradient of the cells spread over the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _gemms, _laws
from ._row_chunks import Chunk, Scratch
from .token_logprobs import Law

OP = "fused_linear_overlap_divergence"
BUCKET, RENORMALIZE_BOTH, RENORMALIZE_TEACHER = range(3)
TAILS = ("bucket", "renormalize_both", "renormalize_teacher")
# of the cells, but for the masses, which are those of the shared tokens
STATISTICS = (
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "student_mass",
    "teacher_mass",
)
MASSES = STATISTICS[5:]
_OF_ROWS = [_laws.STATISTICS.index(name) for name in STATISTICS[:5]]


class Cells(NamedTuple):
    """What the loss is made of; see OPD_CELLS in csrc/torch/ops.cpp.

    student_ids, teacher_ids: [M] int64, or None for every token in its order.
    """

    student_ids: Tensor | None
    teacher_ids: Tensor | None
    student_extra_logits: Tensor | None
    teacher_extra_logits: Tensor | None
    token_weights: Tensor | None
    coefficients: Tensor | None
    divergences: list[int]
    params: list[float]
    tail: int

    def laws(self, rows: slice | Tensor, weights: Tensor | None, num_cells: int) -> _laws.Laws:
        """The arguments of OPD_LAWS for the row kernel on the cells of some of the tokens."""
        coefficients = self.coefficients
        return _laws.Laws(
            *(None,) * 5,
            weights,
            None if coefficients is None else coefficients[:, rows].contiguous(),
            *(None,) * 5,
            self.divergences,
            self.params,
            [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0],
            0,
            False,
            num_cells,
        )


def num_shared(cells: Cells, vocab_size: int) -> int:
    """M."""
    return vocab_size if cells.student_ids is None else cells.student_ids.shape[0]


def counted(law: Law, weights: Tensor | None) -> Law:
    """The law with a temperature of 1 where a row has weight 0, whatever it was given there.

    The row kernel's gradient of such a row is 0, and 0 times 1 / temperature is to be as well.
    """
    if law.temperatures is None or weights is None:
        return law
    return law._replace(temperatures=law.temperatures.masked_fill(weights == 0, 1.0))


def scratch(cells: Cells, student: Law, teacher: Law, real: torch.dtype) -> Scratch:
    """What `Rows` allocates: cells of both sides, the other tokens, and slopes of a softcap."""
    shared = num_shared(cells, student.vocab_size)
    numbers = 2 * (shared + 2) + student.vocab_size + teacher.vocab_size - 2 * shared
    numbers += (student.vocab_size + teacher.vocab_size) * (student.numbers[1] != 0)
    # shared and other tokens of both sides, and what sorts them
    ids = 8 * (3 * student.vocab_size + 3 * teacher.vocab_size)
    return Scratch(per_row=real.itemsize * numbers + 64, per_call=ids)


def others(op: str, name: str, ids: Tensor | None, vocab_size: int) -> Tensor | None:
    """[V - M] int64, the tokens that are not among the ids, ascending; None for none.

    Raises:
        ValueError: ids beyond the vocabulary or twice; on a GPU that is the caller's contract.
    """
    if ids is None or (ids.is_cuda and ids.shape[0] == vocab_size):
        return None
    _checks.token_ids_in_range(op, ids, vocab_size, name)
    is_shared = ids.new_zeros(vocab_size, dtype=torch.uint8).index_fill_(0, ids, 1)
    # as many as there are without waiting for their number
    rest = torch.sort(is_shared, stable=True).indices[: vocab_size - ids.shape[0]]
    if not ids.is_cuda and int(is_shared.sum()) != ids.shape[0]:
        raise ValueError(f"{op}: {name} must hold every id once, got some more often.")
    return rest if rest.shape[0] else None


class _Side:
    """The cells of one side of a chunk, and the way back to its logits."""

    def __init__(
        self,
        cells: Tensor,
        logits: Tensor,
        law: Law,
        ids: tuple[Tensor | None, Tensor | None],
        extra: Tensor | None,
        with_rest: bool,
    ) -> None:
        """Fills `cells`: the shared ones, then the rest's with `with_rest`, then the given one."""
        self.logits, self.law = logits, law
        self.shared_ids, self.rest_ids = ids
        width = cells.shape[1] - with_rest - (extra is not None)
        self.width, self.with_rest, self.with_extra = width, with_rest, extra is not None
        _select(logits, self.shared_ids, cells[:, :width])
        self.slope = _bend_(cells[:, :width], law, self.shared_ids)
        self.rest_slope = None
        if with_rest and self.rest_ids is None:
            cells[:, width] = -torch.inf
        elif with_rest:
            rest = logits.new_empty(logits.shape[0], self.rest_ids.shape[0])
            _select(logits, self.rest_ids, rest)
            self.rest_slope = _bend_(rest, law, self.rest_ids)
            largest = rest.amax(1, keepdim=True)
            # of a rest that is -inf whole nothing is left to divide
            largest.masked_fill_(largest == -torch.inf, 0.0)
            rest.sub_(largest).exp_()
            total = rest.sum(1, keepdim=True)
            cells[:, width] = (largest + total.log()).squeeze(1)
            self.rest, self.total = rest, total
        if extra is not None:
            self.extra_slope = 1.0 / _temperature(law)
            cells[:, -1] = extra * self.extra_slope

    def spread(self, grad_cells: Tensor) -> Tensor | None:
        """Leaves dZ in the logits and returns the gradient of the extra logits."""
        shared = grad_cells[:, : self.width]
        shared.mul_(self.slope)
        if self.shared_ids is None:
            self.logits.copy_(shared)
        else:
            self.logits.scatter_(1, _in_every_row(self.shared_ids, shared), shared)
        if self.rest_ids is not None and self.with_rest:
            share = grad_cells[:, self.width, None] / self.total
            # without mass there is nothing to move, and 0 / 0
            share.masked_fill_(self.total == 0, 0.0)
            self.rest.mul_(share).mul_(self.rest_slope)
            self.logits.scatter_(1, _in_every_row(self.rest_ids, self.rest), self.rest)
        return grad_cells[:, -1] * self.extra_slope if self.with_extra else None


class Rows:
    """The callback of the engine.

    Args:
        cells: of the call.
        laws: the student's and the teacher's.
        backend: whose row kernel.
        statistics: [len(STATISTICS), T], filled row by row, or [.., 0].
    """

    def __init__(
        self, cells: Cells, laws: tuple[Law, Law], backend: str, statistics: Tensor
    ) -> None:
        self.cells, self.statistics = cells, statistics
        self.kernels = _dispatch.row_ops(backend)
        self.ids = [
            (ids, others(OP, name, ids, law.vocab_size))
            for name, ids, law in zip(Cells._fields[:2], cells[:2], laws, strict=True)
        ]
        has_rest = any(rest is not None for _, rest in self.ids)
        self.with_rest = has_rest and cells.tail != RENORMALIZE_BOTH
        self.num_shared = num_shared(cells, laws[0].vocab_size)

    def __call__(self, chunk: Chunk) -> tuple[Tensor, Sequence[Tensor]]:
        """(loss [C], gradient of the student's extra logits), dZ in place."""
        kept, width = self.cells, self.num_shared + self.with_rest
        width += kept.student_extra_logits is not None
        tables, sides = [], []
        for logits, law, ids, extra in (
            (chunk.student_logits, chunk.student_law, self.ids[0], kept.student_extra_logits),
            (chunk.teacher_logits, chunk.teacher_law, self.ids[1], kept.teacher_extra_logits),
        ):
            table = logits.new_empty(logits.shape[0], width)
            given = None if extra is None else extra[chunk.rows].detach().to(table.dtype)
            sides.append(_Side(table, logits, law, ids, given, self.with_rest))
            tables.append(table)
        student, teacher = tables
        wants = self.statistics.shape[1] > 0
        masses = self._masses(tables) if wants else []
        if kept.tail == RENORMALIZE_TEACHER and self.with_rest:
            teacher[:, self.num_shared] = -torch.inf
        # the teacher's tables of other tokens are not needed again
        del sides[1]
        laws = kept.laws(chunk.rows, chunk.weights, width)
        if chunk.with_grad:
            loss, rows = self.kernels.divergence_fwd_grad_(
                student, teacher, None, *laws, wants, _gemms.AS_LOGITS
            )
        else:
            loss, _, rows = self.kernels.divergence_fwd(student, teacher, None, *laws, wants)
        if wants:
            self._put_statistics(chunk, rows, masses)
        if not chunk.with_grad:
            return loss, ()
        extra = sides[0].spread(student)
        return loss, () if extra is None else (extra,)

    def _masses(self, tables: list[Tensor]) -> list[Tensor]:
        """Of the shared tokens among all tokens, by side; without a rest all."""
        if not self.with_rest:
            return [table.new_ones(table.shape[0]) for table in tables]
        return [
            torch.sigmoid(table[:, : self.num_shared].logsumexp(1) - table[:, self.num_shared])
            for table in tables
        ]

    def _put_statistics(self, chunk: Chunk, rows: Tensor, masses: list[Tensor]) -> None:
        values = torch.stack([*rows[_OF_ROWS], *masses])
        if chunk.weights is not None:
            values = values.masked_fill(chunk.weights == 0, 0.0)
        self.statistics[:, chunk.rows] = values


def _select(logits: Tensor, ids: Tensor | None, out: Tensor) -> None:
    if ids is None:
        out.copy_(logits)
    else:
        # two to four times as quick as an index of columns, on a CPU
        torch.gather(logits, 1, _in_every_row(ids, logits), out=out)


def _in_every_row(ids: Tensor, logits: Tensor) -> Tensor:
    return ids.expand(logits.shape[0], -1)


def _temperature(law: Law) -> float | Tensor:
    """A number, or [C]."""
    return law.numbers[2] if law.temperatures is None else law.temperatures


def _bend_(values: Tensor, law: Law, ids: Tensor | None) -> float | Tensor:
    """values [C, n] := cap(scale * (values + bias)) / temperature; returns the derivative."""
    scale, cap, _ = law.numbers
    temperature = _temperature(law)
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(1)
    if law.bias is not None:
        bias = law.bias.detach()[: law.vocab_size]
        values.add_(bias if ids is None else bias[ids])
    if scale != 1.0:
        values.mul_(scale)
    slope: float | Tensor = scale / temperature
    if cap != 0.0:
        values.div_(cap).tanh_()
        slope = (1.0 - values.square()).mul_(slope)
        values.mul_(cap)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        values.div_(temperature)
    return slope
