# SPDX-License-Identifier: Apache-2.0
"""A divergence on the tokens that two vocabularies share."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import OfHiddenStates, teacher_divergence
from opd.objectives.crossing import (
    OnSharedTokens,
    chunks_of,
    overlap_divergence,
    with_cross_entropy,
)


class Overlap(OfHiddenStates, OnSharedTokens):
    """loss = (1 / C) sum over aligned chunks of D(cells of p_teacher, cells of p_student),

    both laws those of the chunk's first token, each read where its own model is at the end of the
    same bytes. The cells are the tokens with the same bytes in both vocabularies and, with a
    bucket, one more for all others; C: the aligned chunks of the step.

    plus cross_entropy_weight times the student's mean negative log-likelihood of the text. With one
    tokenizer and weight 0 it is `full_vocab`.

    Attributes:
        divergence: a name out of `opd_kernels.divergences.DIVERGENCES`.
        params: its parameters by name, as in {beta: 0.3} of `jsd`.
        tail: what stands for the tokens that are not shared: `bucket`, `renormalize_both` or
            `renormalize_teacher`, see docs/divergences.md.
        temperature: divides both models' logits. No implicit temperature**2 factor.
        cross_entropy_weight: the rows behind the first of a chunk are in no other loss; trained
            without one on few texts, a student forgets how its own tokens go on.

    Source: D19 to D22 of docs/divergences.md on the common vocabulary. The law of a chunk's first
    token sees no other token of the chunk: what the teacher thinks of those behind is not taught.
    """

    crosses_tokenizers: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True

    kind: Literal["overlap"] = "overlap"
    divergence: str = "reverse_kl"
    params: dict[str, float | bool | tuple[str, str]] = Field(default_factory=dict)
    tail: Literal["bucket", "renormalize_both", "renormalize_teacher"] = "bucket"
    temperature: float = Field(1.0, gt=0)
    cross_entropy_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check_divergence(self) -> Self:
        # what the op refuses, before anything is loaded
        nothing = [torch.zeros(1, 2), torch.zeros(3, 2)] * 2
        ids = torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            opk.fused_linear_overlap_divergence(
                *nothing,
                student_ids=ids,
                teacher_ids=ids,
                divergence=self._divergence,
                tail=self.tail,
            )
        return self

    @cached_property
    def _divergence(self) -> Any:
        return teacher_divergence(self.divergence, self.params)

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with both KLs and the masses of the cells."""
        assert teacher is not None and self._shared is not None
        chunks = chunks_of(batch, num_step_tokens)
        names = ["forward_kl", "reverse_kl", "top1_agreement"]
        if self.tail != "renormalize_both":
            names += ["student_mass", "teacher_mass"]
        out = overlap_divergence(
            self._shared,
            student,
            teacher,
            chunks,
            divergence=self._divergence,
            tail=self.tail,
            temperature=self.temperature,
            statistics=names,
        )
        statistics = {f"{name}_overlap": row for name, row in out.statistics.items()}
        for name in names[3:]:
            statistics[name] = statistics.pop(f"{name}_overlap")
        signal = Signal(loss=out.loss, statistics=statistics)
        weight = self.cross_entropy_weight
        return with_cross_entropy(signal, weight, student, batch, num_step_tokens)
