# SPDX-License-Identifier: Apache-2.0
"""A divergence between the teacher's and the student's whole next-token laws."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection, OfHiddenStates, teacher_divergence

STATISTICS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl", "top1_agreement")


class FullVocab(OfHiddenStates, ObjectiveSection):
    """loss = (1 / N) sum_t D(p_teacher(.|s_t), p_student(.|s_t)), N the tokens of the step.

    Attributes:
        divergence: a name out of `opd_kernels.divergences.DIVERGENCES`.
        beta: of `jsd`: the weight on the teacher in the mixture, in (0, 1).
        alpha: of the skewed KLs: the weight of the other law in the mixture, in (0, 1); of `alpha`,
            `renyi` and `alpha_beta`: the exponent.
        params: every other parameter of the divergence by name, as in {weight: 0.3} of `jeffreys`.
        temperature: divides both models' logits. No implicit temperature**2 factor.
        teacher_temperature: divides the teacher's logits instead, when given.
        gradient_tolerance: a gradient of the loss by a logit, per token, that may be dropped where
            no token of the chunk has a larger one. Null: none. Peaked laws train faster with 1e-4;
            the metric `gradient_dropped_l1` says what a token lost on average.

    Source: GKD, arXiv:2306.13649; DistiLLM, arXiv:2402.03898.
    """

    kind: Literal["full_vocab"] = "full_vocab"
    divergence: str = "reverse_kl"
    beta: float | None = None
    alpha: float | None = None
    params: dict[str, float | bool | tuple[str, str]] = Field(default_factory=dict)
    temperature: float = Field(1.0, gt=0)
    teacher_temperature: float | None = Field(None, gt=0)
    gradient_tolerance: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check_divergence(self) -> Self:
        _ = self._divergence
        return self

    @cached_property
    def _divergence(self) -> Any:
        given = {"beta": self.beta, "alpha": self.alpha}
        params = {name: value for name, value in given.items() if value is not None}
        if twice := sorted(params.keys() & self.params.keys()):
            raise ValueError(
                f"params: {', '.join(twice)} must be given once, not beside it as well"
            )
        return teacher_divergence(self.divergence, params | self.params)

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean divergence, with both KLs and entropies."""
        assert teacher is not None
        hidden = student.hidden()
        out = opk.fused_linear_divergence(
            hidden,
            student.head.weight,
            teacher.hidden(),
            teacher.head.weight,
            **student.head.options("student"),
            **teacher.head.options("teacher"),
            divergence=self._divergence,
            temperature=(self.temperature, self.teacher_temperature or self.temperature),
            token_weights=torch.full(
                (batch.num_tokens,), 1.0 / num_step_tokens, device=hidden.device
            ),
            statistics=STATISTICS,
            vocab_size=student.vocab_size,
            workspace_bytes=student.workspace_bytes,
            gradient_tolerance=self.gradient_tolerance,
        )
        statistics = dict(out.statistics)
        statistics["entropy"] = statistics.pop("student_entropy")
        return Signal(loss=out.loss, statistics=statistics)
