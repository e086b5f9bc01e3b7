# SPDX-License-Identifier: Apache-2.0
"""What a GPU rounds that a CPU does not: sums of tensor cores, and dZ of a 16-bit head.

Models of both, on a CPU; and the bound on products of 16 bits, of the device at hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import cases, goals
from benchmarks.gpu.device import Device
from benchmarks.gpu.part_peers import with_float32_reductions
from benchmarks.shapes import Shape
from tests.gpu.conftest import logits_of

# products that a Hopper adds to an accumulator at a time; an Ampere adds 8, a Volta 4
STEP = 16


def relative_bound(hidden_size: int) -> float:
    """Of |z - exact| over |exact| in the Frobenius norm, of z by tensor cores.

    Each step cuts a sum of 24 bits off: half a unit of its last bit on average, so 2^-24 of the sum
    at most. Each cut makes it smaller, so that they add up, at most as if every step had the last
    one's sum.
    """
    return hidden_size / STEP * 2.0**-24


def operands(num_tokens: int, vocab_size: int, hidden_size: int) -> tuple[Tensor, Tensor]:
    shape = Shape(num_tokens, vocab_size, hidden_size, hidden_size)
    return cases.inputs_of(Device("cpu"), shape, torch.bfloat16)[:2]


def cut(sums: Tensor) -> Tensor:
    """float64 numbers without what is below their first 24 bits."""
    return (sums.view(torch.int64) & -(1 << 29)).view(torch.float64)


def by_tensor_cores(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden @ head.T, 16 products at a time, each sum cut to 24 bits."""
    sums = torch.zeros(hidden.shape[0], head.shape[0], dtype=torch.float64)
    for columns, rows in zip(
        hidden.double().split(STEP, 1), head.double().split(STEP, 1), strict=True
    ):
        sums = cut(torch.addmm(sums, columns, rows.t()))
    return sums


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = student.log_softmax(1), teacher.log_softmax(1)
    return (q.exp() * (q - p)).sum(1)


def test_sums_that_are_cut_bias_the_loss_within_the_bound():
    found = {}
    for hidden_size in (512, 1024):
        hidden, head = operands(16, 1000, hidden_size)
        exact = hidden.double() @ head.double().t()
        rounded = (hidden.float() @ head.float().t()).double()
        sums = by_tensor_cores(hidden, head)
        error = (sums - exact).norm() / exact.norm()
        assert 4 * (rounded - exact).norm() < (sums - exact).norm()
        # most of it is one factor that all of them are short by
        short = ((exact - sums) * exact).sum() / exact.square().sum()
        assert short > error / 2
        bound = relative_bound(hidden_size)
        assert bound / 8 < error <= bound
        found[hidden_size] = exact, rounded, sums
    exact, rounded, sums = (reverse_kl(*pair) for pair in zip(*found.values(), strict=True))
    # flatter laws are nearer to each other: each token's loss is too small, none too large
    assert bool((sums < exact).all())
    assert (exact - sums).mean() > 20 * (exact - rounded).mean().abs()


def test_dz_of_16_bits_costs_what_the_goal_allows():
    """One more rounding to 16 bits, as large as that of the gradients: sqrt 2 of the error."""
    hidden, head = (tensor.double() for tensor in operands(64, 4000, 64))

    def halved(values: Tensor) -> Tensor:
        return values.bfloat16().double()

    logits = hidden @ head.t()
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (limit,) = (promise.limit for promise in goals.PROMISES if promise.goal == goals.WIDENED)
    for gap in (0.1, 2.0):
        student, teacher = logits.log_softmax(1), (logits + gap * noise).log_softmax(1)
        ratio = student - teacher
        mean = (student.exp() * ratio).sum(1, keepdim=True)
        grad_logits = student.exp() * (ratio - mean)
        for gradient in (lambda dz: dz @ head, lambda dz: dz.t() @ hidden):
            exact = gradient(grad_logits)
            once = (halved(exact) - exact).norm()
            twice = (halved(gradient(halved(grad_logits))) - exact).norm()
            assert 1.25 < twice / once < limit


def test_reductions_in_float32_are_asked_for_and_taken_back():
    flags, seen = torch.backends.cuda.matmul, []

    def run() -> None:
        seen.append(flags.allow_bf16_reduced_precision_reduction)
        raise KeyError

    before = flags.allow_bf16_reduced_precision_reduction
    with pytest.raises(KeyError):
        with_float32_reductions(run)()
    assert seen == [False] and flags.allow_bf16_reduced_precision_reduction == before


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_products_of_16_bits_are_sums_of_24(device, sizes, side, dtype):
    inputs = cases.inputs_of(device, sizes.fused._replace(num_tokens=sizes.slice_tokens), dtype)
    hidden, head = inputs[:2] if side == "student" else inputs[2:]
    exact = logits_of(device, hidden, head, torch.float64)
    error = (logits_of(device, hidden, head, torch.float32) - exact).abs_()
    bound = relative_bound(hidden.shape[1])
    # a CPU rounds to the nearest; a step of 16 is too few for its bound to have room for that
    bound += torch.finfo(torch.float32).eps if device.kind == "cpu" else 0.0
    assert error.norm() <= bound * exact.norm(), f"{error.norm() / exact.norm():.2e} > {bound:.2e}"
    # and nowhere more than if all terms had one sign and each cut took a whole unit
    terms = logits_of(device, hidden.abs(), head.abs(), torch.float64)
    assert bool((error <= 2 * bound * terms).all()), f"{(error / terms).max():.2e} of the terms"
