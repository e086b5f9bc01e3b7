# SPDX-License-Identifier: Apache-2.0
"""gradient_tolerance on peaked laws, against the four dense GEMMs of the exact loss."""

from __future__ import annotations

import functools

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness, laws
from benchmarks.bench_fused_linear_divergence import gemms_of, ours, with_backward
from benchmarks.shapes import CPU, CPU_LARGE_VOCAB, Shape

TOLERANCE = 1e-4
SHAPES = (CPU, CPU_LARGE_VOCAB._replace(num_tokens=256))


@functools.cache
def inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Peaked laws; the student's tensors require grad."""
    hidden, head, *teacher = laws.peaked(shape, dtype)
    return (hidden.requires_grad_(), head.requires_grad_(), *teacher)


def _compare(benchmark, shape: Shape, divergence: str, dtype: torch.dtype, rounds: int) -> dict:
    tensors = inputs(shape, dtype)
    tolerant = ours(divergence, gradient_tolerance=TOLERANCE)
    out = opk.fused_linear_divergence(*tensors, divergence=divergence, gradient_tolerance=TOLERANCE)
    dropped = out.statistics["gradient_dropped_l1"]
    benchmark.extra_info["gradient_dropped_l1"] = float(dropped.mean())
    benchmark.group = f"gradient_tolerance {TOLERANCE:g} {dtype} {shape}"
    return harness.compare(
        benchmark,
        {
            "gemms": gemms_of(tensors),
            harness.OURS: with_backward(tolerant, tensors),
            "exact": with_backward(ours(divergence), tensors),
        },
        floor="gemms",
        rounds=rounds,
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sparse_gradient(benchmark, shape, divergence):
    """The issue's goal: 0.7x of the dense GEMMs; at most 1x is asserted."""
    ratios = _compare(benchmark, shape, divergence, torch.float32, rounds=7)
    assert ratios[harness.OURS] < min(1.0, ratios["exact"]), ratios


def bench_sparse_gradient_of_16_bit_inputs(benchmark):
    """Only the rows of the head that count are widened for dX."""
    _compare(benchmark, CPU, "reverse_kl", torch.bfloat16, rounds=3)


@pytest.mark.parametrize("share", [0.03, 0.2, 0.4, 0.5, 0.6, 0.8])
def bench_share_of_columns(benchmark, share):
    """dX and dW on a share of the columns against all of them: where sparse stops to pay."""
    num_tokens, vocab_size, size, _ = CPU
    generator = torch.Generator().manual_seed(0)
    columns = torch.randperm(vocab_size, generator=generator)[: round(share * vocab_size)]
    gradient = torch.full((num_tokens, vocab_size), 1e-9)
    gradient[0, columns] = 1.0
    hidden, head = torch.randn(num_tokens, size), torch.randn(vocab_size, size)
    buffer, grad_weight = torch.empty_like(gradient), torch.zeros_like(head)

    def sparse() -> None:
        packed, _ = opk.sparse_gradient.pack(
            torch.ops.opd, gradient, None, TOLERANCE, buffer, head, 0, largest_share=1.0
        )
        opk.sparse_gradient.grad_hidden(packed, head)
        opk.sparse_gradient.add_grad_weight(torch.ops.opd, grad_weight, packed, hidden)

    def dense() -> None:
        torch.mm(gradient, head)
        torch.mm(gradient.t(), hidden, out=grad_weight)

    benchmark.group = f"dX and dW on a share of the columns {CPU}"
    variants = {"dense": dense, harness.OURS: sparse}
    harness.compare(benchmark, variants, floor="dense", rounds=5)
