# SPDX-License-Identifier: Apache-2.0
"""divergence from logits, forward + backward: in passes over the logits, against a plain copy."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness, peers
from benchmarks.bench_fused_linear_divergence import PARAMS, with_backward

NUM_TOKENS, VOCAB_SIZE = 256, 32_000


def logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits that require grad, and a teacher's that are close to them."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator) * 3
    student = 0.7 * teacher + 0.5 * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", list(opk.divergences.DIVERGENCES))
def bench_divergence(benchmark, divergence, dtype):
    """Ours and eager, as multiples of the time of copying the student's logits once."""
    student, teacher = logits(dtype)
    target = torch.empty_like(student.detach())
    benchmark.group = f"divergence {dtype}"
    param = PARAMS.get(divergence, 0.0)
    ratios = harness.compare(
        benchmark,
        {
            "copy": lambda: target.copy_(student.detach()),
            harness.OURS: with_backward(
                lambda s, t: opk.divergence(s, t, divergence=divergence).sum(), (student, teacher)
            ),
            "eager": with_backward(
                lambda s, t: peers.eager_divergence(s, t, divergence, param), (student, teacher)
            ),
        },
        floor="copy",
        rounds=5,
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
