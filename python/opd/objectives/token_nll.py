# SPDX-License-Identifier: Apache-2.0
"""The negative log-likelihood of given tokens: supervised fine-tuning, and SeqKD on a teacher's."""

from __future__ import annotations

from typing import ClassVar, Literal

from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection


class TokenNll(ObjectiveSection):
    """loss = -(1 / N) sum_t log p_student(y_t|s_t), N the trained tokens of the step, in nats.

    Source: SeqKD, arXiv:1606.07947, when the tokens are the teacher's.
    """

    needs_teacher: ClassVar[bool] = False
    asks: ClassVar[str] = ""
    needs_behaviour_logprobs: ClassVar[bool] = False

    kind: Literal["token_nll"] = "token_nll"

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean negative log-likelihood."""
        chosen = student.token_logprobs(batch.token_ids)
        loss = -chosen.logprobs.sum() / num_step_tokens
        return Signal(loss=loss, statistics={"entropy": chosen.entropy.detach()})
