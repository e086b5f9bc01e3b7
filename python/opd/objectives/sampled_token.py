# SPDX-License-Identifier: Apache-2.0
"""A policy gradient on the reverse KL, from the teacher's log-probability of the sampled token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection
from opd.sparse_law import SparseLaw


class SampledToken(ObjectiveSection):
    """loss = -(1 / N) sum_t ratio_t * A_t, gradient through ratio_t only.

    A_t = -kl_coef * (log q(y_t) - log p_teacher(y_t)), optionally with a discounted sum of the
    later ones; ratio_t = p_student(y_t) / mu(y_t); mu is the law that the token was drawn from,
    with its temperature, top-k and top-p; q is mu where the student alone wrote, and p_student,
    without gradient, where a teacher wrote with it. With q = p_student the mean of the gradient
    over mu is that of the reverse KL, on the states visited.

    Attributes:
        kl_coef: scale of the advantage.
        kl_discount_factor: A_t becomes sum_{k >= t} discount**(k - t) A_k within a completion.
        temperature: divides the student's and the teacher's logits in ratio_t and A_t. Equal to
            the rollouts' temperature, a fresh sample has ratio_t = 1.

    Source: K. Lu and Thinking Machines Lab, On-Policy Distillation, 2025.
    """

    needs_teacher: ClassVar[bool] = True
    asks: ClassVar[str] = "token_logprobs"
    needs_behaviour_logprobs: ClassVar[bool] = True

    kind: Literal["sampled_token"] = "sampled_token"
    kl_coef: float = Field(1.0, gt=0)
    kl_discount_factor: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)

    def ask(self, teacher: Any, batch: Batch) -> None:
        """What does not wait for the student, on the teacher's time."""
        teacher.prefetch(token_ids=batch.token_ids, temperature=self.temperature)

    def __call__(
        self, student: Law, teacher: Law | SparseLaw | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean surrogate loss, with k1 and the ratios."""
        assert teacher is not None
        assert batch.behaviour_logprobs is not None
        chosen = student.token_logprobs(batch.token_ids, temperature=self.temperature)
        with torch.no_grad():
            taught = teacher.token_logprobs(batch.token_ids, temperature=self.temperature)
            is_mixed = batch.token_origin is not None
            own = chosen.logprobs.detach() if is_mixed else batch.behaviour_logprobs
            k1 = own - taught.logprobs
            advantages = discounted_sums(
                -self.kl_coef * k1, batch.segment_ends, self.kl_discount_factor
            )
        ratios = torch.exp(chosen.logprobs - batch.behaviour_logprobs)
        loss = -(ratios * advantages).sum() / num_step_tokens
        statistics = {
            "reverse_kl_k1": k1,
            "importance_ratio": ratios.detach(),
            "entropy": chosen.entropy.detach(),
        }
        if taught.entropy is not None:
            statistics["teacher_entropy"] = taught.entropy
        return Signal(loss=loss, statistics=statistics)


def discounted_sums(
    values: Tensor, segment_ends: Tensor, discount: float, *, first_step: int = 0
) -> Tensor:
    """out[t] = sum_{k >= first_step} discount**k values[t + k], within a segment. [T] -> [T]."""
    offsets = torch.cat([segment_ends.new_zeros(1), segment_ends]).to(values.device)
    return opk.segment_scan(values, offsets, discount=discount, first_step=first_step)
