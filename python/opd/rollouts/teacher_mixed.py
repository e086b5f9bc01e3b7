# SPDX-License-Identifier: Apache-2.0
"""MiniLLM's teacher-mixed sampling: every token from a mixture of both models' laws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from opd.rollouts.hf import Sampling
from opd.rollouts.writer import draw, judge, make_writer, refuse_broken
from opd.rollouts.writing import STUDENT, TEACHER, Desk, PairRollouts, Writing


class TeacherMixedConfig(Sampling):
    """Each token is drawn from alpha * p + (1 - alpha) * q.

    p is the teacher's law, q the student's, both warped by the sampling keys. A coin decides who
    draws; the behaviour log-probability is the mixture's.

    Attributes:
        alpha: the teacher's share. 0 is on-policy, 1 the teacher's completions.

    Source: MiniLLM, arXiv:2306.08543, section 2.2; 0.2 as there.
    """

    needs_teacher: ClassVar[bool] = True
    needs_completions: ClassVar[bool] = False
    needs_evaluation: ClassVar[bool] = False
    tells_behaviour: ClassVar[bool] = True

    kind: Literal["teacher_mixed"] = "teacher_mixed"
    alpha: float = Field(0.2, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)

    def build(
        self, student: Any, teacher: Any, tokenizer: Any, *, seed: int, **_: Any
    ) -> TeacherMixedRollouts:
        """The engine."""
        return TeacherMixedRollouts(student, teacher, tokenizer, self, seed=seed)


class TeacherMixedRollouts(PairRollouts):
    """Both models read every token; one of them draws the next."""

    def __init__(
        self, student: Any, teacher: Any, tokenizer: Any, config: TeacherMixedConfig, *, seed: int
    ) -> None:
        law = {key: getattr(config, key) for key in ("temperature", "top_k", "top_p")}
        super().__init__(
            make_writer(student, **law),
            make_writer(teacher, **law),
            tokenizer,
            config,
            seed=seed,
        )
        self._alpha = config.alpha

    def write(self, writings: Sequence[Writing]) -> None:
        """A token for each completion at a time."""
        desk = Desk(
            writings,
            limit=self.sampling.max_completion_length,
            student=self.student,
            teacher=self.teacher,
        )
        while desk.writings:
            uniforms = desk.uniforms(2)
            by_teacher = uniforms[:, 0] < self._alpha
            hidden = {name: desk.read(name) for name in desk.readers}
            ids = torch.zeros(len(uniforms), dtype=torch.int64, device=desk.device)
            logprobs = {name: torch.zeros(len(ids), device=desk.device) for name in hidden}
            for name, other, rows in (
                ("student", "teacher", ~by_teacher),
                ("teacher", "student", by_teacher),
            ):
                at = rows.nonzero().flatten()
                if len(at):
                    ids[at], own = draw(getattr(self, name), hidden[name][at], uniforms[at, 1])
                    refuse_broken(bool((ids[at] < 0).any()), getattr(self, name))
                    theirs = judge(getattr(self, other), hidden[other][at], ids[at])
                    refuse_broken(bool(theirs.isnan().any()), getattr(self, other))
                    logprobs[name][at], logprobs[other][at] = own.float(), theirs.float()
            desk.put(ids)
            alive = []
            for writing, token, is_taught, *own in zip(
                desk.writings,
                ids.tolist(),
                by_teacher.tolist(),
                logprobs["student"].tolist(),
                logprobs["teacher"].tolist(),
                strict=True,
            ):
                writing.add(token, TEACHER if is_taught else STUDENT, *own)
                alive.append(not self.finish(writing))
            desk.go_on([1] * len(alive), alive)

    def behaviour(self, writing: Writing) -> Tensor:
        """log(alpha p + (1 - alpha) q)."""
        shares = torch.tensor([self._alpha, 1 - self._alpha]).log()
        laws = torch.tensor([writing.teacher_logprobs, writing.student_logprobs])
        return torch.logsumexp(shares[:, None] + laws, dim=0)
