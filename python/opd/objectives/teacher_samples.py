# SPDX-License-Identifier: Apache-2.0
"""The forward KL on tokens drawn from the teacher's law: a small target, right on average."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection
from opd.sparse_law import DrawnLaw


class TeacherSamples(ObjectiveSection):
    """loss = (1 / N) sum_t sum_v w_tv (log p_teacher(v|s_t) - log p_student(v|s_t)), v the tokens
    that `num_draws` draws from r = p_teacher^(1 / proposal_temperature) (normalised) hit,
    w = count / num_draws * p_teacher / r.

    E[w] = p_teacher for every token of the vocabulary, so the loss is on average the forward KL of
    the whole laws, and its gradient by the student's logits, sum_v w_v q - w, that KL's gradient
    q - p. A top-k target has no such property. The weights are not normalised: that would take it
    from them too. N: the trained tokens of the step.

    Attributes:
        num_draws: per position, 1 to 4096.
        proposal_temperature: above 1 draws more of the tail, with weights that vary more elsewhere;
            in [0.25, 4], beyond which a few dozen draws tell little of the law.
        temperature: divides both models' logits.

    Source: random-sampling knowledge distillation, arXiv:2503.16870.
    """

    needs_teacher: ClassVar[bool] = True
    asks: ClassVar[str] = "samples"
    needs_behaviour_logprobs: ClassVar[bool] = False

    kind: Literal["teacher_samples"] = "teacher_samples"
    num_draws: int = Field(50, ge=1, le=4096)
    proposal_temperature: float = 1.0
    temperature: float = Field(1.0, gt=0)

    @field_validator("proposal_temperature")
    @classmethod
    def _check_proposal(cls, value: float) -> float:
        return check_proposal(value)

    def ask(self, teacher: Law | DrawnLaw, batch: Batch) -> None:
        """What does not wait for the student, on the teacher's time."""
        teacher.prefetch(temperature=self.temperature)

    def __call__(
        self, student: Law, teacher: Law | DrawnLaw | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with both entropies and the student's mass."""
        assert teacher is not None
        drawn = teacher.samples(
            self.num_draws,
            proposal_temperature=self.proposal_temperature,
            temperature=self.temperature,
        )
        hidden = student.hidden()
        # -sum w log q has the gradient of `drop` on w over its sum, times that sum
        mass = drawn.weights.sum(1)
        # all weights of a position may underflow: with the weight 0 any law does, but no NaN
        target = torch.where(mass[:, None] > 0, drawn.weights / mass[:, None], 1.0).log()
        out = opk.fused_linear_topk_divergence(
            hidden,
            student.head.weight,
            drawn.ids,
            target.masked_fill(drawn.ids < 0, -torch.inf),
            divergence="forward_kl",
            support="given",
            tail="drop",
            temperature=self.temperature,
            **student.head.options("student"),
            token_weights=mass / num_step_tokens,
            statistics=("student_mass", "student_entropy"),
            vocab_size=student.vocab_size,
            workspace_bytes=student.workspace_bytes,
        )
        statistics: dict[str, Any] = {
            "student_mass": out.statistics["student_mass"],
            "entropy": out.statistics["student_entropy"],
        }
        # the loss so far is sum w (log w/mass - log q): what is known of the teacher takes the
        # place of the first logarithm
        known = -_sum_of_products(drawn.weights, target)
        if drawn.entropy is not None:
            known = known - drawn.entropy
            statistics["teacher_entropy"] = drawn.entropy
        return Signal(loss=out.loss + known.sum() / num_step_tokens, statistics=statistics)


def check_proposal(temperature: float) -> float:
    """The temperature itself, if draws at it tell of the law.

    Raises:
        ValueError: they do not.
    """
    if not 0.25 <= temperature <= 4:
        raise ValueError(
            "must be in [0.25, 4]: far below 1 the draws miss most of the law, and their "
            "weights sum to less than 1; far above 1 they are of tokens with weights near 0, "
            f"got {temperature:g}"
        )
    return temperature


def _sum_of_products(weights: Tensor, logs: Tensor) -> Tensor:
    """sum_v w_v l_v, 0 where w is."""
    return torch.where(weights > 0, weights * logs, 0.0).sum(1)
