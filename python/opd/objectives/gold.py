# SPDX-License-Identifier: Apache-2.0
"""GOLD: laws of merged tokens, compared by id where the vocabularies agree, sorted elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import OfHiddenStates
from opd.objectives.crossing import Chunks, OnSharedTokens, chunks_of, with_cross_entropy


class Gold(OfHiddenStates, OnSharedTokens):
    """loss = (1 / C) sum over aligned chunks of D(p, q), of laws that are times a probability:

    merge "observed": q = Q(. | before the chunk) * probability of the chunk's later tokens, each
    where it is predicted. merge "bayesian": q = Q(. | all but its last token) * probability of
    those before the last. p likewise of the teacher. D = sum_i |p_(i) - q_(i)|, sorted; or, if
    hybrid, D = w JSD_beta(p, q on the shared tokens) + (1 - w) sum_i |p_(i) - q_(i)| on the others.

    The gradient reaches the student's rows through both factors. With one tokenizer all chunks are
    one token and all tokens are shared: hybrid is the mean of JSD_beta, and the other form ULD.

    Attributes:
        merge: how several tokens of one side become one law.
        hybrid: whether shared tokens, those with the same bytes or role, are compared directly.
        beta: the teacher's weight in the mixture of the JSD, in (0, 1).
        shared_weight, rest_weight: in the place of w and 1 - w; both or none. w is the share of the
            teacher's tokens that the student has.
        cross_entropy_weight: times the student's mean negative log-likelihood of the text.
        temperature: divides both models' logits; `teacher_temperature` the teacher's instead.

    Source: GOLD in TRL, trl.experimental.gold, on ULD, arXiv:2402.12030. TRL takes the rows of
    `observed` one position late: the row of a token, which predicts the one after it; here the row
    that predicts it, as TRL's `bayesian` does. TRL matches tokens by their strings, not their
    bytes, and its factors have a floor of 1e-8, below which there is no gradient.
    """

    crosses_tokenizers: ClassVar[bool] = True

    kind: Literal["gold"] = "gold"
    merge: Literal["observed", "bayesian"] = "observed"
    hybrid: bool = False
    beta: float = Field(0.5, gt=0, lt=1)
    shared_weight: float | None = Field(None, ge=0)
    rest_weight: float | None = Field(None, ge=0)
    cross_entropy_weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    teacher_temperature: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        given = [self.shared_weight is not None, self.rest_weight is not None]
        if any(given) and not (all(given) and self.hybrid):
            raise ValueError(
                "shared_weight and rest_weight must be given together and with hybrid: true, got "
                f"{self.shared_weight}, {self.rest_weight} and hybrid: {self.hybrid}"
            )
        return self

    @property
    def reads_shared(self) -> bool:
        """Whether its options ask for what is shared: sorted laws do not."""
        return self.hybrid

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with the distance of each chunk."""
        assert teacher is not None
        chunks = chunks_of(batch, num_step_tokens)
        temperatures = self.temperature, self.teacher_temperature or self.temperature
        rows, scales = self._merged(
            student, batch.token_ids, chunks.student_offsets, chunks, temperatures[0]
        )
        with torch.no_grad():
            teacher_rows, teacher_scales = self._merged(
                teacher,
                chunks.teacher_batch.token_ids,
                chunks.teacher_offsets,
                chunks,
                temperatures[1],
            )
        out = opk.fused_linear_sorted_l1(
            student.hidden()[rows],
            student.head.weight,
            teacher.hidden()[teacher_rows],
            teacher.head.weight,
            **student.head.options("student"),
            **teacher.head.options("teacher"),
            **self._comparison(student, teacher),
            temperature=temperatures,
            student_log_scales=scales,
            teacher_log_scales=teacher_scales,
            token_weights=chunks.weights(),
            workspace_bytes=student.workspace_bytes,
            compact_tokens=False,
        )
        signal = Signal(
            loss=out.loss,
            statistics={
                "gold": chunks.num_step_chunks * out.row_losses,
                "span_ratio": chunks.is_span.float(),
            },
        )
        weight = self.cross_entropy_weight
        return with_cross_entropy(signal, weight, student, batch, num_step_tokens)

    def _merged(
        self, law: Law, token_ids: Tensor, offsets: Tensor, chunks: Chunks, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(rows [A] whose laws stand for the aligned chunks, log of what they are times [A])."""
        index = opk.chunk_index(offsets)
        rows = (index.first if self.merge == "observed" else index.last)[chunks.index]
        logprobs = law.token_logprobs(token_ids, temperature=temperature).logprobs
        # a chunk of one token is times exactly 1
        is_row = torch.zeros_like(token_ids, dtype=torch.bool).index_fill(0, rows, True)
        others = torch.where(is_row, 0.0, logprobs)
        return rows, opk.chunk_logprobs(others, offsets)[chunks.index]

    def _comparison(self, student: Law, teacher: Law) -> dict[str, Any]:
        """Keyword arguments: which ids are pairs, and what they count."""
        if not self.hybrid:
            return {
                "student_vocab_size": student.vocab_size,
                "teacher_vocab_size": teacher.vocab_size,
            }
        assert self._shared is not None
        shared = self._shared.operands(student, teacher)
        pairs = shared.pop("student_ids"), shared.pop("teacher_ids")
        teacher_size = shared["teacher_vocab_size"]
        if pairs[0] is None:
            pairs = (torch.arange(teacher_size, device=student.head.weight.device),) * 2
        weight = len(pairs[1]) / teacher_size if self.shared_weight is None else self.shared_weight
        rest = 1.0 - weight if self.rest_weight is None else self.rest_weight
        return shared | {
            "pairs": pairs,
            "pair_weight": weight,
            "rest_weight": rest,
            "beta": self.beta,
        }
