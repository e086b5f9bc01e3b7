# SPDX-License-Identifier: Apache-2.0
"""The loops as a GPU runs them, on the CPU: its cuts at a hundredth of its sizes, its roundings."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import _gemms, _plan


def cut_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit GEMMs and dZ, parts of chunks, split dX."""
    monkeypatch.setattr(_gemms, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(_gemms, "_ALIGNMENTS", (8, 4))
    for name, value in (
        ("_TILE", 4),
        ("_FEWEST_TOKENS_GPU", 6),
        ("_FEWEST_TOKENS_FROZEN", 6),
        ("_ENOUGH_TOKENS", 8),
        ("_FEWEST_SPLIT_COLUMNS", 64),
        ("_LAUNCH_SECONDS", 0.0),
    ):
        monkeypatch.setattr(_plan, name, value)


def recorded_plans(monkeypatch: pytest.MonkeyPatch) -> list[_plan.Plan]:
    """The cuts that calls take from here on."""
    found = []
    plan = _plan.plan

    def recorded(*arguments, **options):
        found.append(plan(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(_plan, "plan", recorded)
    return found


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, dtype):
        ctx.dtype = dtype
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def with_rounded_gradient(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """These logits, whose gradient has the head's width, as its GEMMs have on a GPU. What sums dZ
    alone or against a few columns (bias, low-rank pair) shows that rounding."""
    return _RoundedGradient.apply(logits, dtype)
