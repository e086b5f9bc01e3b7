# SPDX-License-Identifier: Apache-2.0
"""The Triton sparse_gradient kernels under the interpreter: the compiled ops' results."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks import laws
from benchmarks.shapes import Shape
from tests.cases import INF, NAN
from tests.checks import leaf

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # NaN in comparisons, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
TOLERANCE = 1e-4


def gradient_of(num_tokens: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    exponent = torch.rand(num_tokens, vocab_size, generator=generator) * 8
    exponent[:, ::3] += 4
    sign = torch.randn(num_tokens, vocab_size, generator=generator).sign()
    weights = torch.linspace(-1.0, 2.0, num_tokens)
    weights[num_tokens // 2] = 0.0
    gradient = sign * 10**-exponent * weights.unsqueeze(1)
    gradient[num_tokens // 2] = NAN
    return gradient, weights


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "vocab_size"), [(1, 1), (3, 17), (9, 700), (17, 1031), (2, 5000)]
)
def test_triton_sparse_gradient_is_the_compiled_one(num_tokens, vocab_size, weighted):
    gradient, weights = gradient_of(num_tokens, vocab_size)
    given = weights if weighted else None
    if not weighted:
        gradient = gradient.nan_to_num(0.0)
    found = []
    for ops in (torch.ops.opd, torch.ops.opd_triton):
        mark = ops.sparse_gradient_mark(gradient, given, TOLERANCE)
        columns = mark.nonzero().squeeze(1)
        packed = gradient.new_empty(num_tokens, len(columns))
        dropped = ops.sparse_gradient_pack_(packed, gradient, given, columns, mark)
        target = torch.zeros(vocab_size, num_tokens + 3)
        ops.sparse_gradient_add_(target[:, :num_tokens], columns, packed.t().contiguous())
        found.append((mark, packed, target, dropped))
    for compiled, triton in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(compiled, triton)
    torch.testing.assert_close(found[0][3], found[1][3], rtol=2e-7, atol=0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_triton_sparse_gradient_needs_every_value_that_is_not_finite(value):
    gradient = torch.full((3, 40), 1e-9)
    gradient[1, 7] = value
    mark = torch.ops.opd_triton.sparse_gradient_mark
    for weight in (1.0, 1e30, INF, NAN):
        assert mark(gradient, torch.tensor([1.0, weight, 1.0]), 1e-3)[7] == 1
    assert mark(gradient, torch.tensor([1.0, 0.0, 1.0]), 1e-3).sum() == 0


def test_triton_sparse_gradient_opcheck():
    gradient, weights = gradient_of(4, 30)
    ops = torch.ops.opd_triton
    mark = ops.sparse_gradient_mark(gradient, weights, TOLERANCE)
    columns = mark.nonzero().squeeze(1)
    packed = gradient.new_empty(4, len(columns))
    torch.library.opcheck(ops.sparse_gradient_mark, (gradient, weights, TOLERANCE))
    torch.library.opcheck(ops.sparse_gradient_pack_, (packed, gradient, weights, columns, mark))
    arguments = (torch.zeros(30, 6), columns, torch.randn(len(columns), 6))
    torch.library.opcheck(ops.sparse_gradient_add_, arguments)


def test_triton_gradient_tolerance_is_that_of_the_cpu():
    hidden, head, *teacher = laws.peaked(Shape(8, 900, 32, 48))
    weights = torch.linspace(-0.5, 1.0, 8)
    weights[3] = 0.0
    found = []
    for backend in ("cpu", "triton"):
        given = leaf(hidden), leaf(head)
        out = opk.fused_linear_divergence(
            *given, *teacher, token_weights=weights, gradient_tolerance=1e-2, backend=backend
        )
        out.loss.backward()
        found.append([*(x.grad for x in given), out.statistics["gradient_dropped_l1"]])
    assert found[0][2].max() > 0
    for cpu, triton in zip(*found, strict=True):
        assert torch.equal(triton == 0, cpu == 0)
        torch.testing.assert_close(triton, cpu, rtol=1e-4, atol=1e-6)
