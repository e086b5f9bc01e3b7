# SPDX-License-Identifier: Apache-2.0
"""Inputs and comparisons that the tests of verification share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("rejection", "block", "topk", "threshold", "greedy")


class Drafts(NamedTuple):
    """A student's drafts [B, G], the logits they are drawn from, the teacher's, and uniforms."""

    ids: Tensor
    student: Tensor
    teacher: Tensor
    uniforms: Tensor

    def options(self, mode: str, **options) -> dict:
        """Keyword arguments of a mode, with history for the one that has some."""
        if mode == "threshold":
            history = self.teacher.new_full((len(self.ids), 3), 0.4, dtype=torch.float32)
            history[::2, 0] = math.nan
            options = {"threshold": 1.02, "history": history, **options}
        return {"uniforms": self.uniforms, "mode": mode, **options}


def drafts_of(
    num_sequences: int,
    num_drafts: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float64,
    *,
    noise: float = 0.5,
    seed: int = 0,
) -> Drafts:
    """Models of which one is the other and noise; half of the drafts are the teacher's best."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    teacher = (3 * normal(num_sequences, num_drafts + 1, vocab_size)).to(dtype)
    student = teacher[:, :-1].float() + noise * normal(num_sequences, num_drafts, vocab_size)
    student = student.to(dtype)
    drawn = student.double().softmax(-1).view(-1, vocab_size)
    ids = teacher[:, :-1].argmax(-1)
    if num_sequences * num_drafts > 0:
        ids = torch.where(
            torch.rand(ids.shape, generator=generator) < 0.5,
            ids,
            drawn.multinomial(1, generator=generator).view(ids.shape),
        )
    uniforms = torch.rand(num_sequences, num_drafts + 1, generator=generator, dtype=torch.float64)
    return Drafts(ids, student, teacher, uniforms)


def same(got, truth, *, rtol: float = 0.0, atol: float = 0.0, what: str = "") -> None:
    """The same tokens, and the same numbers as near as that; None is as good as NaN."""
    for name, one, two in zip(got._fields, got, truth, strict=True):
        label = f"{what} {name}"
        if one is None:
            assert two is None or bool(two.isnan().all()), label
        elif one.dtype.is_floating_point:
            torch.testing.assert_close(
                one.double(), two.double(), rtol=rtol, atol=atol, equal_nan=True, msg=label
            )
        else:
            assert torch.equal(one, two), label
