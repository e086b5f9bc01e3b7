# SPDX-License-Identifier: Apache-2.0
"""Float32 gradients to 16 bits: the same values, and never both in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _rounding

SIZE = 3 * _rounding._ELEMENTS + 1234


@pytest.fixture
def values():
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [None, 0.37])
def test_rounds_once_as_torch_does(values, dtype, factor):
    product = values if factor is None else values * factor
    scalar = None if factor is None else torch.tensor(factor)
    assert _rounding.is_worth_it(values, dtype)
    assert torch.equal(_rounding.round_and_free(values.clone(), dtype, scalar), product.to(dtype))


def test_neighbours_in_memory_keep_what_they_hold(values):
    # the tensor starts and ends inside of pages that belong to others too
    whole = torch.ones(SIZE + 4096)
    inside = whole[101 : 101 + SIZE]
    inside.copy_(values)
    assert torch.equal(_rounding.round_and_free(inside, torch.bfloat16), values.bfloat16())
    assert bool((whole[:101] == 1).all()) and bool((whole[101 + SIZE :] == 1).all())
    # which is why a part of a storage is not taken
    assert not _rounding.is_worth_it(inside, torch.bfloat16)


def test_takes_only_what_is_its_own(values):
    assert not _rounding.is_worth_it(values.double(), torch.bfloat16)
    assert not _rounding.is_worth_it(values, torch.float32)
    assert not _rounding.is_worth_it(values[:1000].clone(), torch.bfloat16)
    assert not _rounding.is_worth_it(values.expand(2, -1), torch.bfloat16)
    assert not _rounding.is_worth_it(values.clone().share_memory_(), torch.bfloat16)
    assert not _rounding.is_worth_it(torch.nn.Parameter(values), torch.bfloat16)
    assert not _rounding.is_worth_it(values.to("meta"), torch.bfloat16)


def peak_of(function) -> int:
    """Resident bytes that the call adds at most, by the kernel's own high-water mark."""
    Path("/proc/self/clear_refs").write_text("5")

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    before = status("VmRSS")
    function()
    return status("VmHWM") - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux")
def test_pages_are_given_back():
    # tests fill new memory, all of it at once
    torch.use_deterministic_algorithms(False)
    # float32 values are there already: both would be half of them more
    values = torch.ones(16 << 20)
    results = []
    peak = peak_of(lambda: results.append(_rounding.round_and_free(values, torch.bfloat16)))
    assert peak < 0.1 * values.nbytes
    assert bool((results[0] == 1).all())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_losses_return_the_same_gradients_with_a_kept_graph(reduction):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    vocab_size, hidden_size = 1 << 15, 40
    hidden, head = normal(3, hidden_size).requires_grad_(), normal(vocab_size, hidden_size)
    head.requires_grad_()
    teacher = normal(3, 8), normal(vocab_size, 8)
    assert head.numel() > _rounding._ELEMENTS
    loss = opk.fused_linear_divergence(hidden, head, *teacher, reduction=reduction).loss.sum()
    # a kept graph's float32 sum must survive, twice
    kept = [torch.autograd.grad(0.3 * loss, (hidden, head), retain_graph=True) for _ in range(2)]
    last = torch.autograd.grad(0.3 * loss, (hidden, head))
    for got in (*kept[1:], last):
        assert all(torch.equal(a, b) for a, b in zip(got, kept[0], strict=True))
    assert bool(last[1].any(1).all())
