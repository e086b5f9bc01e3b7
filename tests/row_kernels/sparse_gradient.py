# SPDX-License-Identifier: Apache-2.0
"""The sparse_gradient kernels of a GPU backend: the results of the CPU's."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks import laws
from benchmarks.shapes import Shape
from tests.cases import INF, NAN
from tests.checks import leaf

TOLERANCE = 1e-4
CPU = torch.ops.opd


def gradient_of(num_tokens: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of all sizes, columns that none needs, and a row of weight 0 that holds NaN."""
    generator = torch.Generator().manual_seed(num_tokens)
    exponent = torch.rand(num_tokens, vocab_size, generator=generator) * 8
    exponent[:, ::3] += 4
    sign = torch.randn(num_tokens, vocab_size, generator=generator).sign()
    weights = torch.linspace(-1.0, 2.0, num_tokens)
    weights[num_tokens // 2] = 0.0
    gradient = sign * 10**-exponent * weights.unsqueeze(1)
    gradient[num_tokens // 2] = NAN
    return gradient, weights


def through(ops, gradient, weights, row_gap: int):
    """(kept, packed, target, dropped) of the three ops in a row."""
    num_tokens, vocab_size = gradient.shape
    wide = torch.full((num_tokens, vocab_size + row_gap), NAN)
    wide[:, :vocab_size] = gradient
    gradient = wide[:, :vocab_size]
    kept = ops.sparse_gradient_mark(gradient, weights, TOLERANCE)
    columns = kept.nonzero().squeeze(1)
    packed = gradient.new_empty(num_tokens, len(columns))
    dropped = ops.sparse_gradient_pack_(packed, gradient, weights, columns, kept)
    target = torch.zeros(vocab_size, num_tokens + 3)
    ops.sparse_gradient_add_(target[:, :num_tokens], columns, packed.t().contiguous())
    return kept, packed, target, dropped


@pytest.mark.parametrize("row_gap", [0, 5])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "vocab_size"), [(1, 1), (3, 17), (9, 700), (17, 1031), (2, 5000)]
)
def test_sparse_gradient_is_that_of_the_cpu(gpu, num_tokens, vocab_size, weighted, row_gap):
    gradient, weights = gradient_of(num_tokens, vocab_size)
    if not weighted:
        gradient, weights = gradient.nan_to_num(0.0), None
    expected = through(CPU, gradient, weights, row_gap)
    actual = through(gpu.ops, gradient, weights, row_gap)
    for cpu, own in zip(expected[:3], actual[:3], strict=True):
        assert torch.equal(own, cpu)
    torch.testing.assert_close(actual[3], expected[3], rtol=2e-7, atol=0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_sparse_gradient_needs_every_value_that_is_not_finite(gpu, value):
    gradient = torch.full((3, 40), 1e-9)
    gradient[1, 7] = value
    for weight in (1.0, 1e30, INF, NAN):
        weights = torch.tensor([1.0, weight, 1.0])
        assert gpu.ops.sparse_gradient_mark(gradient, weights, 1e-3)[7] == 1
    weights = torch.tensor([1.0, 0.0, 1.0])
    assert gpu.ops.sparse_gradient_mark(gradient, weights, 1e-3).sum() == 0


def test_sparse_gradient_opcheck(gpu):
    gradient, weights = gradient_of(4, 30)
    kept = gpu.ops.sparse_gradient_mark(gradient, weights, TOLERANCE)
    columns = kept.nonzero().squeeze(1)
    packed = gradient.new_empty(4, len(columns))
    torch.library.opcheck(gpu.ops.sparse_gradient_mark, (gradient, weights, TOLERANCE))
    torch.library.opcheck(gpu.ops.sparse_gradient_pack_, (packed, gradient, weights, columns, kept))
    arguments = (torch.zeros(30, 6), columns, torch.randn(len(columns), 6))
    torch.library.opcheck(gpu.ops.sparse_gradient_add_, arguments)


def test_gradient_tolerance_is_that_of_the_cpu(gpu):
    hidden, head, *teacher = laws.peaked(Shape(8, 900, 32, 48))
    weights = torch.linspace(-0.5, 1.0, 8)
    weights[3] = 0.0
    found = []
    for backend in ("cpu", gpu.name):
        given = leaf(hidden), leaf(head)
        out = opk.fused_linear_divergence(
            *given, *teacher, token_weights=weights, gradient_tolerance=1e-2, backend=backend
        )
        out.loss.backward()
        found.append([*(x.grad for x in given), out.statistics["gradient_dropped_l1"]])
    assert found[0][2].max() > 0
    for cpu, own in zip(*found, strict=True):
        assert torch.equal(own == 0, cpu == 0)
        torch.testing.assert_close(own, cpu, rtol=1e-4, atol=1e-6)
