# SPDX-License-Identifier: Apache-2.0
"""Packs of segments, scan options, eager float32 baselines and the checks of both backends."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

import opd_kernels as opk
from opd_kernels import reference
from tests.checks import leaf
from tests.tolerance import assert_within_eager

F32, F64 = torch.float32, torch.float64

# lengths of the segments; SHORT ones are for Triton's interpreter
SHORT = {
    "nothing": [],
    "one_empty": [0],
    "only_empty": [0, 0, 0],
    "one_token": [1],
    "ones": [1] * 9,
    "ragged": [3, 0, 0, 1, 20, 1, 11, 0],
    "whole_chunks": [8, 16, 24],
}
PACKS = {**SHORT, "many_ones": [1] * 700, "long": [1500, 0, 2, 700]}

SCANS = {
    "reward_to_go": {},
    "discounted": {"discount": 0.95},
    "strongly_discounted": {"discount": 0.125},
    "no_future": {"discount": 0.0},
    "one_step": {"num_steps": 1},
    "k_step": {"discount": 0.9, "num_steps": 5},
    "wide_window": {"discount": 0.99, "num_steps": 13},
    "undiscounted_window": {"num_steps": 8},
    "after_itself": {"discount": 0.9, "first_step": 1},
    "bootstrap": {"discount": 0.9, "first_step": 5, "num_steps": 1},
    "strided": {"discount": 0.9, "stride": 3},
    "long_stride": {"stride": 17},
    "strided_window": {"discount": 0.5, "first_step": 2, "num_steps": 3, "stride": 2},
    "prefix": {"direction": "prefix"},
    "exclusive_prefix": {"first_step": 1, "direction": "prefix"},
    "prefix_window": {"discount": 0.9, "num_steps": 4, "stride": 2, "direction": "prefix"},
    "beyond": {"first_step": 1 << 40, "num_steps": 1 << 40, "stride": 1 << 40},
}


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def pack(lengths: list[int], dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """(values, offsets), with a mean other than 0 so that sums grow."""
    return (torch.randn(sum(lengths)) + 0.5).to(dtype), offsets_of(lengths)


def slices(offsets: Tensor) -> list[slice]:
    bounds = offsets.tolist()
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def eager_scan(
    values: Tensor,
    offsets: Tensor,
    discount: float = 1.0,
    first_step: int = 0,
    num_steps: int | None = None,
    stride: int = 1,
    direction: str = "suffix",
) -> Tensor:
    """Each segment times its own banded matrix."""
    out = values.to(torch.promote_types(values.dtype, F32)) * 0
    for piece in slices(offsets):
        x = values[piece].to(out.dtype)
        place = torch.arange(x.shape[0])
        distance = place[None, :] - place[:, None]
        distance = distance if direction == "suffix" else -distance
        step = distance // stride
        live = (distance >= 0) & (distance % stride == 0) & (step >= first_step)
        if num_steps is not None:
            live &= step < first_step + num_steps
        # 0 ** 0 is 1
        factor = torch.where(live, torch.tensor(discount, dtype=x.dtype) ** step.clamp_min(0), 0)
        out = torch.cat([out[: piece.start], factor @ x, out[piece.stop :]])
    return out


def eager_reduce(
    values: Tensor, offsets: Tensor, reduction: str = "sum", token_weights: Tensor | None = None
) -> Tensor:
    """Segment by segment in the dtype that torch has."""
    pieces = []
    for piece in slices(offsets):
        x = values[piece].to(torch.promote_types(values.dtype, F32))
        w = torch.ones_like(x) if token_weights is None else token_weights[piece].to(x.dtype)
        if reduction in ("max", "min"):
            x = x[w != 0]
            pieces.append(
                getattr(x, f"a{reduction}")().reshape(1)
                if x.shape[0]
                else x.new_tensor([-torch.inf if reduction == "max" else torch.inf])
            )
        elif reduction == "mean":
            pieces.append(((w * x).sum() / w.sum().clamp_min(1e-30)).reshape(1))
        else:
            pieces.append((w * x).sum().reshape(1))
    return torch.cat(pieces) if pieces else values[:0]


def upstream_of(like: Tensor) -> Tensor:
    """A gradient that differs by element and passes through zero."""
    return torch.linspace(-1, 2, max(like.numel(), 1))[: like.numel()].to(like.dtype)


def check(
    function: str, eager, values: Tensor, offsets: Tensor, backend: str, what: str, **options
):
    """Values and gradient of a public function against the reference, by the tolerance rule."""
    inputs = [leaf(values), leaf(values), leaf(values, F64)]
    got = getattr(opk, function)(inputs[0], offsets, backend=backend, **options)
    baseline = eager(inputs[1], offsets, **options)
    truth = getattr(reference, function)(inputs[2], offsets, **options)
    assert got.dtype == torch.promote_types(values.dtype, F32), f"{what}: {got.dtype}"
    assert_within_eager(got, baseline, truth, f"{what} value")
    for out in (got, baseline, truth):
        if out.requires_grad:
            out.backward(upstream_of(out))
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    assert gradients[0].dtype == values.dtype
    assert_within_eager(*gradients, f"{what} gradient")


def check_group_statistics(values, offsets, backend: str, what: str, **options) -> None:
    """Every field against the reference; torch in float32 is the baseline."""
    got = opk.group_statistics(values, offsets, backend=backend, **options)
    truth = reference.group_statistics(values, offsets, **options)
    mask = options.get("mask")
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    means, stds, others = [], [], []
    for piece in slices(offsets):
        x, m = values[piece].float(), mask[piece]
        degrees = int(m.sum()) - options.get("correction", 1)
        means.append(x[m].mean() if m.any() else torch.zeros(()))
        std = x[m].std(correction=options.get("correction", 1)) if degrees > 0 else torch.zeros(())
        stds.append(std)
        for i in range(x.shape[0]):
            rest = x[m & (torch.arange(x.shape[0]) != i)]
            others.append(rest.mean() if rest.shape[0] else torch.zeros(()))
    assert torch.equal(got.count, truth.count), what
    assert got.count.dtype == torch.int64
    for name, column in (("mean", means), ("std", stds), ("leave_one_out_mean", others)):
        baseline = torch.stack(column) if column else torch.zeros(0)
        actual = getattr(got, name)
        assert not actual.requires_grad
        assert_within_eager(actual, baseline, getattr(truth, name), f"{what} {name}")
