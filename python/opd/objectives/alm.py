# SPDX-License-Identifier: Apache-2.0
"""Approximate likelihood matching: both models are to find the same bytes as likely."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal
from opd.objectives.base import ObjectiveSection
from opd.objectives.crossing import chunks_of
from opd.sparse_law import SparseLaw

# log-probabilities closer to 0 are float32 rounding of logits
_CLOSEST = 1e-6


class Alm(ObjectiveSection):
    """loss = (1 / C) sum over aligned chunks of -[p log q + (1 - p) log(1 - q)],
    p = P_teacher(chunk)^(1 / T), q = P_student(chunk)^(1 / T).

    P(chunk) is the product of the probabilities of the chunk's own tokens, each given all before
    it; the chunk's bytes are the same on both sides. C: the aligned chunks of the step. It reads
    one probability a token and needs no token in common; of what else could have been said it sees
    only that it shares 1 - p.

    d loss / d log P_student(chunk) = (q - p) / (T (1 - q)). With one tokenizer every chunk is a
    token: the same loss of each token's probability.

    Attributes:
        divergence: `cross_entropy`, as above; `forward_kl`, less the teacher's entropy, with the
            same gradient; `reverse_kl`: q log(q / p) + (1 - q) log((1 - q) / (1 - p)).
        binarization_temperature: T. Null: the limit of T times a KL, in logs l of P(chunk)
            l_t - l_s - l_t log(l_t / l_s), or the same with the sides changed.

    Source: ALM, arXiv:2503.20083. Left out of its code (tokenkit): chunks merged by, or multiplied
    by, the probability that a word ends there, which needs the law behind a chunk's last token; the
    loss on hidden states; a subtracted 1e-6 (here only what is closer to 0 counts as that).
    """

    crosses_tokenizers: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    asks: ClassVar[str] = "token_logprobs"
    needs_behaviour_logprobs: ClassVar[bool] = False

    kind: Literal["alm"] = "alm"
    divergence: Literal["cross_entropy", "forward_kl", "reverse_kl"] = "cross_entropy"
    binarization_temperature: float | None = Field(100.0, gt=0)

    @model_validator(mode="after")
    def _check_limit(self) -> Self:
        if self.binarization_temperature is None and self.divergence == "cross_entropy":
            raise ValueError(
                "divergence: must be forward_kl or reverse_kl where binarization_temperature is "
                "null, got cross_entropy, which has no limit"
            )
        return self

    def ask(self, teacher: Any, batch: Batch) -> None:
        """What does not wait for the student, on the teacher's time."""
        asked = batch if batch.translation is None else batch.translation.batch
        teacher.prefetch(token_ids=asked.token_ids)

    def __call__(
        self, student: Law, teacher: Law | SparseLaw | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's mean, with the chunks' log-probabilities."""
        assert teacher is not None
        chunks = chunks_of(batch, num_step_tokens)
        chosen = student.token_logprobs(batch.token_ids)
        with torch.no_grad():
            taught = teacher.token_logprobs(chunks.teacher_batch.token_ids)
        ls = opk.chunk_logprobs(chosen.logprobs, chunks.student_offsets)[chunks.index]
        lt = opk.chunk_logprobs(taught.logprobs, chunks.teacher_offsets)[chunks.index]
        losses = binary_divergence(lt, ls, self.divergence, self.binarization_temperature)
        statistics = {
            "entropy": chosen.entropy.detach(),
            "chunk_logprob": ls.detach(),
            "teacher_chunk_logprob": lt,
            "reverse_kl_k1": ls.detach() - lt,
        }
        return Signal(loss=losses.sum() / chunks.num_step_chunks, statistics=statistics)


def binary_divergence(
    teacher_logprobs: Tensor, student_logprobs: Tensor, divergence: str, temperature: float | None
) -> Tensor:
    """Of the laws (p, 1 - p) and (q, 1 - q), p = exp(lt / T), q = exp(ls / T); see `Alm`.

    Args:
        teacher_logprobs, student_logprobs: lt, ls [C], at most 0, nats. Above -1e-6 they count as
            that, and the gradient is the one there.
        divergence: "cross_entropy" | "forward_kl" | "reverse_kl".
        temperature: T; None: the limit of T times the KL.

    Returns:
        [C], nats. 0 log 0 is 0. Infinite where one law excludes what the other, by which the
        logarithms are weighted, does not; never NaN. A gradient that the limit has infinite there
        is 1 or -1.
    """
    lt, ls = (_below_zero(values) for values in (teacher_logprobs, student_logprobs))
    if temperature is None:
        if divergence == "reverse_kl":
            lt, ls = ls, lt
        return _limit(lt, ls)
    lt, ls = lt / temperature, ls / temperature
    # logs of what is left for everything else
    rest_t, rest_s = log1mexp(lt), log1mexp(ls)
    if divergence == "reverse_kl":
        return _times(torch.exp(ls), ls - lt) - torch.expm1(ls) * (rest_s - rest_t)
    if divergence == "forward_kl":
        return _times(torch.exp(lt), lt - ls) - torch.expm1(lt) * (rest_t - rest_s)
    return torch.expm1(lt) * rest_s - _times(torch.exp(lt), ls)


def _times(weights: Tensor, logs: Tensor) -> Tensor:
    """weights * logs, 0 with a gradient of 0 where the weight is 0, whatever the logarithm."""
    return weights * torch.where(weights == 0, 0.0, logs)


def _limit(lt: Tensor, ls: Tensor) -> Tensor:
    """lt - ls - lt log(lt / ls); of two -inf 0, of one infinity."""
    is_infinite = torch.isinf(lt) | torch.isinf(ls)
    near, far = (torch.where(is_infinite, -1.0, values) for values in (lt, ls))
    apart = torch.where(is_infinite & (lt != ls), lt - ls, 0.0).abs()
    return near - far - near * torch.log(near / far) + apart


def log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, right at both ends, with its gradient."""
    is_close = values > -0.6931
    near = torch.log(-torch.expm1(torch.where(is_close, values, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(is_close, -1.0, values)))
    return torch.where(is_close, near, far)


def _below_zero(values: Tensor) -> Tensor:
    # the value is clamped, the gradient is not: a student that is too sure learns to be less so
    shift = (-_CLOSEST - values).detach()
    return torch.where(values > -_CLOSEST, values + shift, values)
