# SPDX-License-Identifier: Apache-2.0
"""MultiLevelOT: the likeliest tokens of each text, in the text's own order, and its positions."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from opd.batch import Batch, Law, Signal, law_size
from opd.objectives.base import ObjectiveSection, OfHiddenStates
from opd.objectives.crossing import pairs_of, with_cross_entropy
from opd.objectives.standardized import column_sums, columns


class MultilevelOt(OfHiddenStates, ObjectiveSection):
    """loss = (1 / C) sum over texts of sum_t (sum_i |p_ti - q_ti| - w_log sum_i p'_ti log q'_ti)
    + w_sinkhorn sum_tu F_tu W_tu, over pairs of positions, C of them in the step.

    q_t = softmax(z_t / (std(z_t) + 1e-4) / temperature), p likewise of the teacher, std over the
    finite logits and 0 of one; i runs over the num_topk tokens of each side that the text's
    positions together give the most probability, in that order, one order for the whole text;
    p' = softmax(p_t), q' = softmax(q_t) of these numbers;
    W_tu = sum_i |softmax(p_t / 2)_i - softmax(q_u / 2)_i|, F = exp(-W / epsilon), its rows and its
    columns divided by their sums, num_iterations times.

    Attributes:
        pairing: `chunks`: positions where the first tokens of each aligned chunk are predicted.
            `positions`, the paper's: token i beside token i, up to the shorter text; C is then the
            student's tokens of the step.
        num_topk: tokens of a text that are compared, fewer if a vocabulary has fewer.
        log_weight, sinkhorn_weight: w_log, w_sinkhorn.
        epsilon, num_iterations: of the Sinkhorn normalisation.
        cross_entropy_weight: times the student's mean negative log-likelihood of the text.
        temperature: divides both models' standardised logits.

    With one tokenizer it is the same of one vocabulary. Memory of the Sinkhorn term: num_iterations
    times the square of a text's positions.

    Source: MultiLevelOT, arXiv:2412.14528. Its code orders tokens for a whole batch, has the two
    sides of the logarithmic term the other way round, and multiplies the Sinkhorn term of each text
    by 0.001 in the place of 1 / C.
    """

    crosses_tokenizers: ClassVar[bool] = True

    kind: Literal["multilevel_ot"] = "multilevel_ot"
    pairing: Literal["chunks", "positions"] = "chunks"
    num_topk: int = Field(50, ge=1)
    log_weight: float = Field(0.1, ge=0)
    sinkhorn_weight: float = Field(0.1, ge=0)
    epsilon: float = Field(0.1, gt=0)
    num_iterations: int = Field(20, ge=1)
    cross_entropy_weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with the terms of each pair of positions."""
        assert teacher is not None
        pairs = pairs_of(batch, self.pairing, num_step_tokens)
        num_topk = min(self.num_topk, law_size(student), law_size(teacher))
        q = self._table(student, pairs.student, pairs.text, num_topk)
        with torch.no_grad():
            p = self._table(teacher, pairs.teacher, pairs.text, num_topk).to(q.dtype)
        distance = (p - q).abs().sum(1)
        log_term = -(p.softmax(1) * q.log_softmax(1)).sum(1)
        total = distance.sum() + self.log_weight * log_term.sum()
        statistics = {"sorted_l1_topk": distance.detach(), "cross_entropy_topk": log_term.detach()}
        if self.sinkhorn_weight:
            total = total + self.sinkhorn_weight * self._transport(p, q, pairs.text)
        signal = Signal(loss=total / pairs.count, statistics=statistics)
        weight = self.cross_entropy_weight
        return with_cross_entropy(signal, weight, student, batch, num_step_tokens)

    def _table(self, law: Law, rows: Tensor, text: Tensor, num_topk: int) -> Tensor:
        """[M, num_topk] probabilities of each text's own likeliest tokens."""
        hidden = law.hidden()[rows]
        sums = column_sums(law, hidden, text, temperature=self.temperature)
        ids = sums.topk(num_topk, dim=1).indices[text.to(sums.device)]
        return columns(law, hidden, ids, temperature=self.temperature)

    def _transport(self, p: Tensor, q: Tensor, text: Tensor) -> Tensor:
        """Sum over texts of sum_tu F_tu W_tu."""
        lengths = torch.bincount(text).tolist()
        smooth = [(x / 2).softmax(1).split(lengths) for x in (p, q)]
        total = q.sum() * 0.0
        for left, right in zip(*smooth, strict=True):
            if len(left):
                total = total + self._sinkhorn(left, right)
        return total

    def _sinkhorn(self, left: Tensor, right: Tensor) -> Tensor:
        cost = torch.cdist(left, right, p=1)
        # in logarithms: a small epsilon takes every entry of a row below what a float holds
        plan = -cost / self.epsilon
        for _ in range(self.num_iterations):
            plan = plan.log_softmax(1)
            plan = plan.log_softmax(0)
        return (plan.exp() * cost).sum()
