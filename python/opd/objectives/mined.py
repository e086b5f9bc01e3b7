# SPDX-License-Identifier: Apache-2.0
"""MinED: the teacher's best tokens as the student's nearest ones by edit distance."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal, law_size
from opd.objectives.crossing import Chunks, OnSharedTokens, chunks_of
from opd.sparse_law import SparseLaw


class Mined(OnSharedTokens):
    """loss = (1 / N) sum_t (1 - ce_weight) KL(P'_t || Q_t) - ce_weight log Q_t(y_t),

    Q the student's law, y the text's tokens, N the trained tokens of the step. Where an aligned
    chunk is one token on both sides, P' is the teacher's law on its `teacher_top_k` best tokens,
    each moved to the student's token with the same bytes, else to that with the fewest byte edits
    (the lowest id of several; of tokens that meet, the likeliest counts), renormalized. Elsewhere
    P' is y_t.

    With one tokenizer, all tokens and ce_weight 0 it is the forward KL.

    Attributes:
        ce_weight: in [0, 1]. 0 for the student's own completions, whose tokens are no labels.
        teacher_top_k: K, tokens per position.
        vocab: `nearest`, as above; `exact`: only tokens with the same bytes are moved.
        unmatched: what is not one token on both sides: `label`, as above; `skip`: no loss there,
            nor a cross-entropy.
        temperature: divides both models' logits in the KL and in the cross-entropy.

    Source: FuseLLM, arXiv:2401.10491, whose code pairs tokens by dynamic time warping over their
    edit distances, and moves tokens as text, without the mark of a space; here chunks of the same
    bytes pair them, which is finer and exact, and edits are counted in bytes.
    """

    crosses_tokenizers: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    asks: ClassVar[str] = "topk"
    needs_behaviour_logprobs: ClassVar[bool] = False

    kind: Literal["mined"] = "mined"
    ce_weight: float = Field(0.9, ge=0, le=1)
    teacher_top_k: int = Field(10, ge=1, le=4096)
    vocab: Literal["nearest", "exact"] = "nearest"
    unmatched: Literal["label", "skip"] = "label"
    temperature: float = Field(1.0, gt=0)

    def ask(self, teacher: Any, batch: Batch) -> None:
        """What does not wait for the student, on the teacher's time."""
        teacher.prefetch(num_topk=self.teacher_top_k, temperature=self.temperature)

    def __call__(
        self, student: Law, teacher: Law | SparseLaw | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with how many tokens have a teacher's law."""
        assert teacher is not None and self._shared is not None
        hidden = student.hidden()
        with torch.no_grad():
            target = self._target(teacher, batch, chunks_of(batch, num_step_tokens))
        num_step_tokens = max(1, num_step_tokens)
        out = opk.fused_linear_topk_divergence(
            hidden,
            student.head.weight,
            target.ids,
            target.logprobs,
            divergence="forward_kl",
            tail="renormalize_teacher",
            temperature=self.temperature,
            token_weights=target.weights / num_step_tokens,
            statistics=("student_entropy", "forward_kl"),
            vocab_size=student.vocab_size,
            workspace_bytes=student.workspace_bytes,
            **student.head.options("student"),
        )
        # of a mixture of two targets the op gives the KL, less the entropy that its parts lack
        constant = (target.weights * target.entropy_gap).sum() / num_step_tokens
        statistics = {
            "entropy": out.statistics["student_entropy"],
            "matched_ratio": target.is_matched.float(),
            "target_kl": out.statistics["forward_kl"],
        }
        return Signal(loss=out.loss + constant.to(out.loss.dtype), statistics=statistics)

    def _target(self, teacher: Law | SparseLaw, batch: Batch, chunks: Chunks) -> _Target:
        labels = batch.token_ids.to(torch.int64)
        pairs = (~chunks.is_span).nonzero().squeeze(1)
        rows, teacher_rows = chunks.student_first[pairs], chunks.teacher_first[pairs]
        found = teacher.topk(self._width(teacher), temperature=self.temperature)
        # the likeliest come first, so that of tokens that meet the first is the one that counts
        moved = self._shared.nearest(found.ids[teacher_rows], exact=self.vocab == "exact")
        moved = opk.topk_support(None, moved, "teacher")
        logprobs = found.logprobs[teacher_rows].double()
        logprobs = logprobs.masked_fill(moved < 0, -torch.inf)
        mass = logprobs.logsumexp(1, keepdim=True)
        has_law = (mass > -torch.inf).squeeze(1)
        law = (logprobs - mass).exp().masked_fill(~has_law.unsqueeze(1), 0.0)
        label_mass = torch.ones_like(law[:, 0]).masked_fill(has_law, self.ce_weight)
        # one column for the label, which takes over its own entry of the law
        is_label = moved == labels[rows].unsqueeze(1)
        law_mass = law * (1.0 - label_mass).unsqueeze(1)
        label_mass = label_mass + law_mass.masked_fill(~is_label, 0.0).sum(1)
        moved = moved.masked_fill(is_label | (law_mass == 0), -1)
        law_mass = law_mass.masked_fill(moved < 0, 0.0)
        mixed = torch.cat([label_mass.unsqueeze(1), law_mass], 1)

        num_tokens, width = len(labels), moved.shape[1]
        ids = torch.full((num_tokens, width + 1), -1, device=labels.device)
        ids[:, 0] = labels
        ids[rows, 1:] = moved
        ids[rows, 0] = labels[rows].masked_fill(label_mass == 0, -1)
        masses = torch.zeros(ids.shape, dtype=torch.float64, device=labels.device)
        masses[:, 0] = 1.0
        masses[rows] = mixed
        gap = torch.zeros_like(masses[:, 0])
        gap[rows] = _entropy(mixed) - (1.0 - self.ce_weight) * _entropy(law)
        is_matched = torch.zeros(num_tokens, dtype=torch.bool, device=labels.device)
        is_matched[rows] = has_law
        weights = torch.ones(num_tokens, device=labels.device)
        if self.unmatched == "skip":
            weights = is_matched.float()
        return _Target(ids, masses.log(), gap, weights, is_matched)

    def _width(self, teacher: Law | SparseLaw) -> int:
        """K, or as many tokens as there are."""
        if not isinstance(teacher, Law):
            return self.teacher_top_k
        return min(self.teacher_top_k, law_size(teacher))


class _Target(NamedTuple):
    """[T, K + 1] ids and log-probabilities; [T] the entropy of a mixture less that of its law, the
    weight, and whether the teacher has a law there."""

    ids: Tensor
    logprobs: Tensor
    entropy_gap: Tensor
    weights: Tensor
    is_matched: Tensor


def _entropy(masses: Tensor) -> Tensor:
    return -torch.special.xlogy(masses, masses).sum(1)
