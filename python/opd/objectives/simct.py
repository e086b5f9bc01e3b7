# SPDX-License-Identifier: Apache-2.0
"""SimCT: shared tokens and the text's own spans as one vocabulary of both models."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import OfHiddenStates
from opd.objectives.crossing import (
    Chunks,
    OnSharedTokens,
    chunks_of,
    label_logits,
    overlap_divergence,
    with_cross_entropy,
)


class Simct(OfHiddenStates, OnSharedTokens):
    """loss = (1 / C) sum over aligned chunks of KL(Q' || P'), Q' = softmax(z' / temperature),

    z' = (the student's logits of the shared tokens where the chunk's first token is predicted, and,
    for a chunk of several tokens on a side, one entry for the chunk), P' likewise of the teacher.
    The entry is the mean, over the chunk's tokens, of each token's own logit where it is predicted.

    Plus cross_entropy_weight times the student's mean negative log-likelihood of the text. With one
    tokenizer every chunk is one token and all tokens are shared: the reverse KL, at weight 0.

    Attributes:
        span: `logit`, as above, which the paper has: logits of different positions, whose zeros
            mean nothing, so that adding a constant to all logits of one position, which no law
            sees, changes the loss. `logprob`: the mean of the tokens' log-probabilities, plus the
            log-sum-exp of the first position; such constants drop out. It costs one more GEMM with
            each head, and two more in backward.
        temperature: divides all entries of z'.
        cross_entropy_weight: tokens that are not shared are in no entry, and of the rows behind the
            first of a chunk only a logit is; trained without one on few texts, a student forgets
            how its own tokens go on.

    Source: SimCT, arXiv:2605.07711. Its code cuts spans only behind tokens that are the same on
    both sides; the chunks here are the finest that both tokenizations have. It divides by tokens,
    here the sum is divided by the chunks of the step, C.
    """

    crosses_tokenizers: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True

    kind: Literal["simct"] = "simct"
    span: Literal["logit", "logprob"] = "logit"
    temperature: float = Field(0.6, gt=0)
    cross_entropy_weight: float = Field(0.0, ge=0)

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with both KLs of the virtual vocabulary."""
        assert teacher is not None and self._shared is not None
        chunks = chunks_of(batch, num_step_tokens)
        spans: dict[str, Tensor] = {}
        if batch.translation is not None:
            spans["student_extra_logits"] = self._span(
                student, batch, chunks, chunks.student_offsets, chunks.student_first
            )
            with torch.no_grad():
                spans["teacher_extra_logits"] = self._span(
                    teacher,
                    chunks.teacher_batch,
                    chunks,
                    chunks.teacher_offsets,
                    chunks.teacher_first,
                )
        out = overlap_divergence(
            self._shared,
            student,
            teacher,
            chunks,
            **spans,
            divergence="reverse_kl",
            tail="renormalize_both",
            temperature=self.temperature,
            statistics=("forward_kl", "reverse_kl", "top1_agreement"),
        )
        statistics = {f"{name}_overlap": row for name, row in out.statistics.items()}
        statistics["span_ratio"] = chunks.is_span.float()
        signal = Signal(loss=out.loss, statistics=statistics)
        weight = self.cross_entropy_weight
        return with_cross_entropy(signal, weight, student, batch, num_step_tokens)

    def _span(
        self, law: Law, batch: Batch, chunks: Chunks, offsets: Tensor, first: Tensor
    ) -> Tensor:
        """[A], the entry of each aligned chunk, -inf for those of one token on both sides."""
        if self.span == "logit":
            values = label_logits(law, batch.token_ids)
            entries = opk.segment_reduce(values, offsets, reduction="mean")[chunks.index]
        else:
            found = law.token_logprobs(batch.token_ids, temperature=self.temperature)
            means = opk.segment_reduce(found.logprobs, offsets, reduction="mean")[chunks.index]
            # both are of logits that the temperature has divided already
            entries = self.temperature * (means + found.lse[first])
        return torch.where(chunks.is_span, entries, -torch.inf)
