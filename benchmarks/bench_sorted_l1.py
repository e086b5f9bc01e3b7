# SPDX-License-Identifier: Apache-2.0
"""sorted_l1 from logits, forward + backward, against eager torch and the library's sort alone."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks import harness
from benchmarks.bench_fused_linear_divergence import with_backward

SHAPES = {"32k": (64, 32_000, 32_000), "152k": (24, 151_936, 128_256)}


@functools.cache
def logits(num_tokens: int, student_size: int, teacher_size: int) -> tuple[Tensor, Tensor]:
    """Of standard deviation 3; the student's a leaf."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(num_tokens, size, generator=generator) * 3
        for size in (student_size, teacher_size)
    )
    return student.requires_grad_(), teacher


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """Softmax, sort, pad, subtract."""
    laws = [x.softmax(1).sort(dim=1, descending=True).values for x in (student, teacher)]
    width = max(law.shape[1] for law in laws)
    q, p = (torch.nn.functional.pad(law, (0, width - law.shape[1])) for law in laws)
    return (p - q).abs().sum()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def bench_sorted_l1(benchmark, shape):
    """The floor is the library's sort of both sides, without what comes before and after."""
    student, teacher = logits(*shape)
    laws = [x.detach().softmax(1) for x in (student, teacher)]
    benchmark.group = f"sorted_l1 float32 T{shape[0]}-Vs{shape[1]}-Vt{shape[2]}"
    expected = eager(student.detach().double(), teacher.double())
    torch.testing.assert_close(
        opk.sorted_l1(student, teacher).sum().double(), expected, rtol=1e-5, atol=0
    )
    turns = harness.take_turns(
        benchmark,
        {
            "two sorts": lambda: [law.sort(dim=1, descending=True) for law in laws],
            harness.OURS: with_backward(lambda z: opk.sorted_l1(z, teacher).sum(), (student,)),
            "forward alone": lambda: opk.sorted_l1(student.detach(), teacher),
            "eager": with_backward(lambda z: eager(z, teacher), (student,)),
        },
        rounds=5,
        budget_s=20,
    )
    harness.record(benchmark, turns, "two sorts")
    harness.goal(
        benchmark,
        f"sorted_l1, Vs = {shape[1]:,}: forward and backward over the library's two sorts",
        turns.ratio(harness.OURS, "two sorts"),
        at_most=1.0,
    )
    harness.assert_goals(benchmark)
