# SPDX-License-Identifier: Apache-2.0
"""divergence from logits, forward + backward: in passes over the logits, against a plain copy."""

from __future__ import annotations

import functools

import pytest
import torch

import opd_kernels as opk
from benchmarks import eager, harness
from benchmarks.bench_fused_linear_divergence import with_backward

NUM_TOKENS, VOCAB_SIZE = 256, 32_000
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
CASES = [(name, FLOAT32) for name in opk.divergences.DIVERGENCES]
CASES += [(name, BFLOAT16) for name in ("forward_kl", "reverse_kl", "jsd")]


@functools.cache
def logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits that require grad, and a teacher's that are close to them."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator) * 3
    student = 0.7 * teacher + 0.5 * torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def losses(name: str) -> tuple:
    """Ours and eager, of student's and teacher's logits."""
    if name == "cross_entropy":
        labels = torch.arange(NUM_TOKENS) * 61 % VOCAB_SIZE
        return (
            lambda s, t: opk.divergence(s, t, divergence=name, labels=labels).sum(),
            lambda s, t: eager.cross_entropy(s, labels),
        )
    params = dict(opk.divergences.parse(name).params)
    return (
        lambda s, t: opk.divergence(s, t, divergence=name).sum(),
        lambda s, t: eager.divergence(s, t, name, **params),
    )


@pytest.mark.parametrize(("divergence", "dtype"), CASES, ids=str)
def bench_divergence(benchmark, divergence, dtype):
    """Ours and eager, as multiples of the time of copying the student's logits once."""
    tensors = logits(dtype)
    source, target = tensors[0].detach(), torch.empty_like(tensors[0].detach())
    ours, eager_loss = losses(divergence)
    benchmark.group = f"divergence {dtype}"
    benchmark.extra_info["row"] = divergence
    ratios = harness.compare(
        benchmark,
        {
            "copy": lambda: target.copy_(source),
            harness.OURS: with_backward(ours, tensors),
            "eager": with_backward(eager_loss, tensors),
        },
        floor="copy",
        rounds=7,
        budget_s=1.5,
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
