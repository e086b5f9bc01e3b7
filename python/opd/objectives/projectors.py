# SPDX-License-Identifier: Apache-2.0
"""Linear maps between the hidden spaces of two models, and the attention between their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from opd.batch import Head


class Attended(NamedTuple):
    """`to_student`: [T, Ds], `to_teacher`: [T', Dt]. `has_teacher` [T] and `has_student` [T']:
    False where a sequence has no token on the other side, and the row is 0."""

    to_student: Tensor
    to_teacher: Tensor
    has_teacher: Tensor
    has_student: Tensor


def linear(num_in: int, num_out: int, *, bias: bool, seed: int) -> nn.Linear:
    """torch's initial values from a seed, the global generator left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(num_in, num_out, bias=bias)


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """hidden [T, D] weight [D', D]^T + bias in the weight's precision, then in `dtype`."""
    return functional.linear(hidden.to(weight.dtype), weight, bias).to(dtype or weight.dtype)


class LogitMap:
    """M [D, D'] with W M h = V h in the least squares: M = W^+ V = (W^T W)^+ W^T V.

    W [M, D] and V [M, D'] are rows of two heads that stand for the same tokens, so that h read
    through V and M h read through W have the same logits where D >= D' or the rows allow it.
    A logit_scale belongs to its head; a bias and a softcap are left out, they are of the logits.

    Args:
        onto: W's head, which must not change: its pseudo-inverse is kept, as [D, D].
        onto_rows: [M] of it; None: the leading ones.
        workspace_bytes: rows are read in pieces of this size.

    Source: DSKD-v2, arXiv:2504.11426.
    """

    def __init__(self, onto: Head, onto_rows: Tensor | None, *, workspace_bytes: int) -> None:
        self._onto, self._rows, self._workspace_bytes = onto, onto_rows, workspace_bytes
        gram = self._product(onto, onto_rows, torch.float64)
        # of the Gram matrix: a singular value decomposition of [M, D] takes minutes at M = 150,000
        self._inverse = torch.linalg.pinv(gram, hermitian=True)

    def of(self, head: Head, rows: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
        """M for V of another head, [D, D'] float64; no gradient.

        Args:
            head: V's.
            rows: [M], the same tokens in it.
            dtype: of the product W^T V; its rounding is not squared, unlike that of W^T W.
        """
        scale = head.logit_scale / self._onto.logit_scale
        return scale * (self._inverse @ self._product(head, rows, dtype).double())

    @torch.no_grad()
    def _product(self, head: Head, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
        ours, theirs = self._onto.weight, head.weight
        out = ours.new_zeros(ours.shape[1], theirs.shape[1], dtype=dtype)
        for left, right in zip(
            self._pieces(ours, self._rows, theirs), self._pieces(theirs, rows, ours), strict=True
        ):
            out.addmm_(left.to(dtype).T, right.to(dtype))
        return out

    def _pieces(self, weight: Tensor, rows: Tensor | None, other: Tensor) -> Iterator[Tensor]:
        num_rows = min(len(weight), len(other)) if rows is None else len(rows)
        # both in the head's dtype and in float64
        row_bytes = 16 * (weight.shape[1] + other.shape[1])
        step = max(1, self._workspace_bytes // row_bytes)
        for begin in range(0, num_rows, step):
            here = slice(begin, min(begin + step, num_rows))
            yield weight[here] if rows is None else weight.index_select(0, rows[here])


def standardised(values: Tensor, ends: Tensor) -> Tensor:
    """values / std(values), over all of each sequence. [T, D] -> [T, D].

    Args:
        ends: [B] int64 on the CPU, where each sequence ends in T.
    """
    tiny = torch.finfo(values.dtype).tiny
    parts = values.split(_counts(ends).tolist())
    # the deviation of one value is no number
    return torch.cat([p / p.std().clamp_min(tiny) if p.numel() > 1 else p for p in parts])


def attend(
    query: Tensor,
    key: Tensor,
    teacher_values: Tensor,
    student_values: Tensor,
    student_ends: Tensor,
    teacher_ends: Tensor,
) -> Attended:
    """A = query key^T / sqrt(K) within each sequence; to_student = softmax_t'(A) teacher_values,
    to_teacher = softmax_t(A)^T student_values.

    Args:
        query: [T, K] of the student's tokens; key: [T', K] of the teacher's.
        teacher_values: [T', Ds]; student_values: [T, Dt].
        student_ends, teacher_ends: [B] int64 on the CPU, where each sequence ends in T and in T'.
    """
    device = query.device
    counts = [_counts(student_ends), _counts(teacher_ends)]
    ours, theirs = (count.tolist() for count in counts)
    to_student, to_teacher = [], []
    for q, k, taught, own in zip(
        query.split(ours),
        key.split(theirs),
        teacher_values.split(theirs),
        student_values.split(ours),
        strict=True,
    ):
        scores = q @ k.T / math.sqrt(q.shape[1])
        to_student.append(scores.softmax(1) @ taught)
        to_teacher.append(scores.T.softmax(1) @ own)
    return Attended(
        torch.cat(to_student),
        torch.cat(to_teacher),
        *(
            (other > 0).repeat_interleave(count).to(device)
            for count, other in (counts, counts[::-1])
        ),
    )


def _counts(ends: Tensor) -> Tensor:
    """[B] ends -> [B] lengths."""
    return torch.diff(ends, prepend=ends.new_zeros(1))
