# SPDX-License-Identifier: Apache-2.0
"""ULD: the sorted probabilities of two vocabularies side by side."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection
from opd.objectives.crossing import chunks_of


class Uld(ObjectiveSection):
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
    needs_teacher: ClassVar[bool] = True
    asks: ClassVar[str] = "hidden"
    needs_behaviour_logprobs: ClassVar[bool] = False

    kind: Literal["uld"] = "uld"
    pairing: Literal["chunks", "positions"] = "chunks"
    cross_entropy_weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    teacher_temperature: float | None = Field(None, gt=0)

    def ask(self, teacher: Any, batch: Batch) -> None:
        """What does not wait for the student, on the teacher's time."""
        teacher.hidden()

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with the distance of each pair of laws."""
        assert teacher is not None
        if self.pairing == "chunks":
            chunks = chunks_of(batch, num_step_tokens)
            rows, count = (chunks.student_first, chunks.teacher_first), chunks.num_step_chunks
        else:
            rows, count = paired_positions(batch), max(1, num_step_tokens)
        hidden = student.hidden()
        out = opk.fused_linear_sorted_l1(
            hidden[rows[0]],
            student.head.weight,
            teacher.hidden()[rows[1]],
            teacher.head.weight,
            **student.head.options("student"),
            **teacher.head.options("teacher"),
            temperature=(self.temperature, self.teacher_temperature or self.temperature),
            token_weights=torch.full(rows[0].shape, 1.0 / count, device=hidden.device),
            student_vocab_size=student.vocab_size,
            teacher_vocab_size=teacher.vocab_size,
            workspace_bytes=student.workspace_bytes,
            compact_tokens=False,
        )
        loss, statistics = out.loss, {"sorted_l1": count * out.row_losses}
        if self.cross_entropy_weight:
            chosen = student.token_logprobs(batch.token_ids)
            loss = loss - self.cross_entropy_weight * chosen.logprobs.sum() / max(
                1, num_step_tokens
            )
            statistics["entropy"] = chosen.entropy.detach()
        return Signal(loss=loss, statistics=statistics)


def paired_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """(student's rows, teacher's rows) of token i of each text in both tokenizations, [M] each."""
    device = batch.token_ids.device
    if batch.translation is None:
        rows = torch.arange(batch.num_tokens, device=device)
        return rows, rows
    ends = [side.segment_ends.cpu() for side in (batch, batch.translation.batch)]
    starts = [torch.cat([end.new_zeros(1), end[:-1]]) for end in ends]
    lengths = torch.minimum(*(end - start for end, start in zip(ends, starts, strict=True)))
    text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    # place of each pair in its text
    place = torch.arange(len(text)) - (lengths.cumsum(0) - lengths)[text]
    student, teacher = ((start[text] + place).to(device) for start in starts)
    return student, teacher
