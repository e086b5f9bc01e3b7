# SPDX-License-Identifier: Apache-2.0
"""Hidden states and heads whose laws look like a language model's: peaked, over a Zipf-like union.

Every token has a few candidates, drawn from the unigram law; the rest of the vocabulary keeps that
law, far below. Most tokens are nearly sure of one candidate. The teacher is the student plus noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape

ZIPF_EXPONENT = 1.05
NUM_CANDIDATES = 8
# of the unigram law that they are drawn from: drawing without repetition flattens it
SHARPENING = 1.12
PEAKED_SHARE = 0.81
# of the logits of everything but the candidates, in nats
NOISE = 1.2
# between the logits of student and teacher
TEACHER_NOISE = 0.5
# how far the candidates stand above the unigram law, and the surest one above the others, in nats
CANDIDATE_LIFT = 9.0
PEAKED_LIFT = (5.0, 7.0)
FLAT_LIFT = (1.0, 3.0)


class Laws(NamedTuple):
    """As `fused_linear_divergence` takes them: rows are tokens [T, D] and vocabulary [V, D]."""

    student_hidden: Tensor
    student_lm_head_weight: Tensor
    teacher_hidden: Tensor
    teacher_lm_head_weight: Tensor


def peaked(
    shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Laws:
    """Logits z[t, v] = log prior_v + lift of t's candidates + noise, through heads of rank D.

    A head row is (log prior, random features); a hidden state is (1, a sum of the candidates'
    features + noise). The teacher has the student's features and others of its own, from which
    its noise comes: its hidden size must be the larger one.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    num_tokens, vocab_size, size, teacher_size = shape
    own = teacher_size - size
    if own < 1:
        raise ValueError(
            f"peaked: the teacher's hidden size must be above {size}, got {own + size}"
        )
    prior = -ZIPF_EXPONENT * torch.arange(1, vocab_size + 1, device=device).log()
    order = torch.randperm(vocab_size, generator=generator, device=device)
    prior = (prior - prior.logsumexp(0))[order]
    # rows of unit length, so that a lift of 1 along a row adds 1 to its own logit
    features = torch.nn.functional.normalize(normal(vocab_size, size - 1), dim=1)
    candidates = torch.stack(
        [
            torch.multinomial((SHARPENING * prior).exp(), NUM_CANDIDATES, generator=generator)
            for _ in range(num_tokens)
        ]
    )
    # superposed candidates are noise to every other row; what that leaves to NOISE is added
    rows = features[candidates]
    lifts = (_lifts(num_tokens, generator) - prior[candidates]).unsqueeze(1)
    present = lifts.norm(dim=2) / size**0.5
    noise = (NOISE**2 - present**2).clamp_min(0.0).sqrt() * normal(num_tokens, size - 1)
    # the candidates' logits are their lifts, exactly
    wanted = lifts - noise.unsqueeze(1) @ rows.mT
    mixed = (torch.linalg.solve(rows @ rows.mT, wanted.mT) * rows).sum(1)
    student_hidden = torch.cat([torch.ones(num_tokens, 1, device=device), mixed + noise], 1)
    student_head = torch.cat([prior.unsqueeze(1), features], 1)
    teacher_noise = TEACHER_NOISE * normal(num_tokens, own)
    teacher_features = torch.nn.functional.normalize(normal(vocab_size, own), dim=1)
    return Laws(
        student_hidden.to(dtype),
        student_head.to(dtype),
        torch.cat([student_hidden, teacher_noise], 1).to(dtype),
        torch.cat([student_head, teacher_features], 1).to(dtype),
    )


def _lifts(num_tokens: int, generator: torch.Generator) -> Tensor:
    """[T, candidates]: logits of the candidates relative to no prior at all."""
    where = {"generator": generator, "device": generator.device}
    lifts = torch.randn(num_tokens, NUM_CANDIDATES, **where) + CANDIDATE_LIFT
    is_peaked = torch.randperm(num_tokens, **where) < PEAKED_SHARE * num_tokens
    share = torch.rand(num_tokens, **where)
    low, high = (
        torch.where(is_peaked, peaked, flat)
        for peaked, flat in zip(PEAKED_LIFT, FLAT_LIFT, strict=True)
    )
    lifts[:, 0] = CANDIDATE_LIFT + low + (high - low) * share
    return lifts
