# SPDX-License-Identifier: Apache-2.0
"""MiniLLM: the reverse KL of whole completions, one step of it exactly, the rest by the samples."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection
from opd.objectives.crossing import with_cross_entropy
from opd.objectives.full_vocab import STATISTICS
from opd.objectives.sampled_token import discounted_sums
from opd.sparse_law import SparseLaw


class Minillm(ObjectiveSection):
    """loss = (1 / N) sum_t w_t [KL(Q_t || P_t) - A_t log Q_t(y_t)], w_t and A_t without gradient.

    Q_t is the student's law and P_t the teacher's where token y_t of a completion of n tokens
    stands, N the trained tokens of the step;

    w_t = Q_t(y_t) / mu_t(y_t), mu the law that the token was drawn from, after temperature, top-k
    and top-p: the importance weight truncated to the token itself, 1 where the student alone wrote
    and nothing was cut;
    A_t = sum_{k > t} kl_discount_factor**(k - t) r_k / (n - t), the rewards of the tokens behind,
    r_k = kl_coef (log P_k(y_k) - log Q_k(y_k)), of the student that trains. The second term's
    gradient means something, its value does not. With discount 1, length_normalization false,
    cliprange null and the student's own completions the mean of the gradient is that of
    KL(Q(y) || P(y)) of whole completions; with discount 0 and w_t = 1 it is `full_vocab` with
    `reverse_kl`.

    Attributes:
        single_step_decomposition: False: no first term, and A_t has r_t too, divided by n - t + 1.
            The same on average, unless length_normalization is on, at a higher variance; the
            teacher is asked for log-probabilities of the sampled tokens alone.
        length_normalization: A_t is a mean over the tokens behind; False: a sum, which favours
            short completions.
        kl_discount_factor: in [0, 1]; the authors' code runs with 0.95, the paper has none.
        kl_coef: scale of the rewards; 1 / reward_scaling of the authors' code, which is 2 there.
        cliprange: PPO's: no second term where w_t > 1 + cliprange and A_t > 0, or w_t < 1 -
            cliprange and A_t < 0. Null: never, and so with top-k or top-p, which lower all w_t.
        cliprange_reward: rewards are clipped to +-this; 100 in the authors' code. Null: not.
        cross_entropy_weight: times the student's mean negative log-likelihood of the completions,
            in the place of the paper's loss on a pretraining corpus. Of `teacher_mixed` rollouts
            its gradient is, on average, alpha times that of the forward KL.
        temperature: divides both models' logits, and must be the rollouts'.

    Source: MiniLLM, arXiv:2306.08543, section 2.2. The authors' code gives the first term no w_t,
    counts r_t in A_t as well, and whitens A_t over a micro-batch; TRL's starts from discount 0 and
    divides by the sum of discounts. Here nothing is whitened: a step's loss would follow its split.
    """

    needs_teacher: ClassVar[bool] = True
    needs_behaviour_logprobs: ClassVar[bool] = True

    kind: Literal["minillm"] = "minillm"
    single_step_decomposition: bool = True
    length_normalization: bool = True
    kl_discount_factor: float = Field(1.0, ge=0, le=1)
    kl_coef: float = Field(1.0, gt=0)
    cliprange: float | None = Field(0.2, gt=0)
    cliprange_reward: float | None = Field(None, gt=0)
    cross_entropy_weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)

    @property
    def asks(self) -> str:
        """What the teacher must be able to say."""
        return "hidden" if self.single_step_decomposition else "token_logprobs"

    def ask(self, teacher: Any, batch: Batch) -> None:
        """What does not wait for the student, on the teacher's time."""
        teacher.prefetch(token_ids=batch.token_ids, temperature=self.temperature)

    def __call__(
        self, student: Law, teacher: Law | SparseLaw | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's loss, with both KLs, the ratios and what was clipped."""
        assert teacher is not None
        assert batch.behaviour_logprobs is not None
        # first, or it would be kept without a graph
        hidden = student.hidden()
        with torch.no_grad() if self.single_step_decomposition else nullcontext():
            chosen = student.token_logprobs(batch.token_ids, temperature=self.temperature)
        with torch.no_grad():
            taught = teacher.token_logprobs(batch.token_ids, temperature=self.temperature)
            own = chosen.logprobs.detach()
            k1 = own - taught.logprobs
            ratios = torch.exp(own - batch.behaviour_logprobs)
            advantages = self._advantages(-k1, batch.segment_ends)
            is_clipped = self._is_clipped(ratios, advantages)
            advantages = advantages.masked_fill(is_clipped, 0.0)
        weights = ratios / num_step_tokens
        statistics = {"reverse_kl_k1": k1, "importance_ratio": ratios}
        if self.cliprange is not None:
            statistics["clip_ratio"] = is_clipped.float()
        if self.single_step_decomposition:
            # both terms share the weight, and so one pass over the vocabulary
            out = opk.fused_linear_divergence(
                hidden,
                student.head.weight,
                teacher.hidden(),
                teacher.head.weight,
                **student.head.options("student"),
                **teacher.head.options("teacher"),
                divergence=((1.0, "reverse_kl"), (advantages, "cross_entropy")),
                labels=batch.token_ids,
                temperature=self.temperature,
                token_weights=weights,
                statistics=STATISTICS,
                vocab_size=student.vocab_size,
                workspace_bytes=student.workspace_bytes,
            )
            loss, found = out.loss, dict(out.statistics)
            statistics |= {"entropy": found.pop("student_entropy"), **found}
        else:
            loss = -(weights * advantages * chosen.logprobs).sum()
            statistics["entropy"] = chosen.entropy.detach()
            if taught.entropy is not None:
                statistics["teacher_entropy"] = taught.entropy
        return with_cross_entropy(
            Signal(loss=loss, statistics=statistics),
            self.cross_entropy_weight,
            student,
            batch,
            num_step_tokens,
        )

    def _advantages(self, log_ratios: Tensor, segment_ends: Tensor) -> Tensor:
        """A_t from log P(y_t) - log Q(y_t), [T]."""
        rewards = self.kl_coef * log_ratios
        if self.cliprange_reward is not None:
            rewards = rewards.clamp(-self.cliprange_reward, self.cliprange_reward)
        first = int(self.single_step_decomposition)
        returns = discounted_sums(rewards, segment_ends, self.kl_discount_factor, first_step=first)
        if not self.length_normalization:
            return returns
        counts = discounted_sums(torch.ones_like(rewards), segment_ends, 1.0, first_step=first)
        return returns / counts.clamp_min(1.0)

    def _is_clipped(self, ratios: Tensor, advantages: Tensor) -> Tensor:
        """[T] bool, where PPO's smaller surrogate is the constant one."""
        if self.cliprange is None:
            return torch.zeros_like(ratios, dtype=torch.bool)
        is_over = (ratios > 1 + self.cliprange) & (advantages > 0)
        return is_over | ((ratios < 1 - self.cliprange) & (advantages < 0))
