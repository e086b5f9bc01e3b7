# SPDX-License-Identifier: Apache-2.0
"""A divergence between what is known of the teacher's law, a few tokens a position, and the
student's."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection, teacher_divergence
from opd.sparse_law import SparseLaw

_STATISTICS = (
    "student_mass",
    "teacher_mass",
    "student_entropy",
    "forward_kl",
    "reverse_kl",
)


class Topk(ObjectiveSection):
    """loss = (1 / N) sum_t D(cells of p_teacher(.|s_t), cells of p_student(.|s_t)).

    The cells are `teacher_top_k` tokens and, with the tail `bucket`, one more for all others; the
    student's gradient reaches its whole vocabulary either way. N: the trained tokens of the step.

    Attributes:
        divergence: a name out of `opd_kernels.divergences.DIVERGENCES`.
        params: its parameters by name, as in {beta: 0.3} of `jsd`.
        teacher_top_k: tokens per position.
        support: whose best tokens: `teacher`; `student`, scored by the teacher, which must be able
            to score given tokens; `union` of both.
        tail: what stands for the other tokens, see docs/divergences.md: `bucket`,
            `renormalize_both`, `renormalize_teacher` or `drop`.
        temperature: divides both models' logits; other than 1 only with a teacher that has its
            whole law at hand.

    Source: D19 to D22 of the catalogue in docs/divergences.md; arXiv:2603.25562, arXiv:2604.13016.
    """

    needs_teacher: ClassVar[bool] = True
    needs_behaviour_logprobs: ClassVar[bool] = False

    kind: Literal["topk"] = "topk"
    divergence: str = "forward_kl"
    params: dict[str, float | bool | tuple[str, str]] = Field(default_factory=dict)
    teacher_top_k: int = Field(64, ge=1, le=4096)
    support: Literal["teacher", "student", "union"] = "teacher"
    tail: Literal["bucket", "renormalize_both", "renormalize_teacher", "drop"] = "bucket"
    temperature: float = Field(1.0, gt=0)

    @property
    def asks(self) -> str:
        """What the teacher must be able to say."""
        return "topk" if self.support == "teacher" else "given_tokens"

    @model_validator(mode="after")
    def _check_divergence(self) -> Self:
        if self.tail == "drop" and self._divergence.name != "forward_kl":
            raise ValueError(
                f"tail: must not be 'drop' with divergence {self._divergence.name!r}, whose sum "
                "over the support is least when the student's mass has left it; use 'bucket' or "
                "'renormalize_both'"
            )
        # what the op refuses, before anything is loaded
        with torch.no_grad():
            opk.topk_divergence(
                torch.zeros(1, 3),
                torch.zeros(1, 1, dtype=torch.int64),
                torch.full((1, 1), -1.0),
                divergence=self._divergence,
                tail=self.tail,
            )
        return self

    @cached_property
    def _divergence(self) -> Any:
        return teacher_divergence(self.divergence, self.params)

    def ask(self, teacher: Law | SparseLaw, batch: Batch) -> None:
        """What does not wait for the student, on the teacher's time."""
        num_topk = 0 if self.support == "student" else self.teacher_top_k
        teacher.prefetch(num_topk=num_topk, temperature=self.temperature)

    def __call__(
        self, student: Law, teacher: Law | SparseLaw | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with masses, entropies and KLs on the cells."""
        assert teacher is not None
        hidden = student.hidden()
        ids, logprobs, tail_logprob = self._cells(student, teacher)
        out = opk.fused_linear_topk_divergence(
            hidden,
            student.head.weight,
            ids,
            logprobs,
            tail_logprob=tail_logprob,
            divergence=self._divergence,
            support=self.support,
            tail=self.tail,
            temperature=self.temperature,
            **student.head.options("student"),
            token_weights=torch.full(
                (batch.num_tokens,), 1.0 / num_step_tokens, device=hidden.device
            ),
            statistics=_STATISTICS,
            vocab_size=student.vocab_size,
            workspace_bytes=student.workspace_bytes,
        )
        statistics = dict(out.statistics)
        # of the cells: lower bounds of what full_vocab has under the plain names
        for name, of_cells in (
            ("student_entropy", "entropy"),
            ("forward_kl", "forward_kl_topk"),
            ("reverse_kl", "reverse_kl_topk"),
        ):
            statistics[of_cells] = statistics.pop(name)
        return Signal(loss=out.loss, statistics=statistics)

    def _cells(
        self, student: Law, teacher: Law | SparseLaw
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids [T, K], the teacher's log-probabilities of them, and of all others or None."""
        if self.support == "teacher":
            known = teacher.topk(self.teacher_top_k, temperature=self.temperature)
            return known.ids, known.logprobs, known.tail_logprob
        own = student.topk(self.teacher_top_k, temperature=self.temperature).ids
        ids = own
        if self.support == "union":
            theirs = teacher.topk(self.teacher_top_k, temperature=self.temperature).ids
            ids = opk.topk_support(own, theirs, "union")
        known = teacher.topk(1, token_ids=ids, temperature=self.temperature)
        # the mass of the others follows from these
        return ids, known.token_logprobs, None
