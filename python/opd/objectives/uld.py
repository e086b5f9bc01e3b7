# SPDX-License-Identifier: Apache-2.0
"""ULD: the sorted probabilities of two vocabularies side by side."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection, OfHiddenStates
from opd.objectives.crossing import pairs_of, with_cross_entropy


class Uld(OfHiddenStates, ObjectiveSection):
    """loss = (1 / C) sum over aligned chunks of sum_i |P_(i) - Q_(i)|, both laws sorted descending,

    the shorter followed by zeros; P and Q predict the first token of the chunk on their sides. Plus
    cross_entropy_weight times the student's mean negative log-likelihood of the text.

    It compares shapes of laws and not what they are about: which token has which probability does
    not count. With one tokenizer it is the mean of sum_i |P_(i) - Q_(i)| over tokens.

    Attributes:
        pairing: `chunks`, as above. `positions`, as the paper has it: token i of the student's text
            beside token i of the teacher's, up to the shorter of the two, whatever they are; the
            sum is divided by the student's tokens of the step.
        cross_entropy_weight: the paper's loss is 1.5 times the distance plus the cross entropy.
        temperature: divides both models' logits; `teacher_temperature` the teacher's instead.

    Source: ULD, arXiv:2402.12030. Its code divides by the positions of each text and then by the
    texts; here every chunk (or token) of the step counts the same.
    """

    crosses_tokenizers: ClassVar[bool] = True

    kind: Literal["uld"] = "uld"
    pairing: Literal["chunks", "positions"] = "chunks"
    cross_entropy_weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    teacher_temperature: float | None = Field(None, gt=0)

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with the distance of each pair of laws."""
        assert teacher is not None
        pairs = pairs_of(batch, self.pairing, num_step_tokens)
        out = opk.fused_linear_sorted_l1(
            student.hidden()[pairs.student],
            student.head.weight,
            teacher.hidden()[pairs.teacher],
            teacher.head.weight,
            **student.head.options("student"),
            **teacher.head.options("teacher"),
            temperature=(self.temperature, self.teacher_temperature or self.temperature),
            token_weights=pairs.weights(),
            student_vocab_size=student.vocab_size,
            teacher_vocab_size=teacher.vocab_size,
            workspace_bytes=student.workspace_bytes,
            compact_tokens=False,
        )
        signal = Signal(loss=out.loss, statistics={"sorted_l1": pairs.count * out.row_losses})
        weight = self.cross_entropy_weight
        return with_cross_entropy(signal, weight, student, batch, num_step_tokens)
