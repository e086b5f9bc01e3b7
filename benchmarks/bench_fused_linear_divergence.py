# SPDX-License-Identifier: Apache-2.0
"""fused_linear_divergence, forward + backward, against its four GEMMs."""

from __future__ import annotations

import functools
import statistics

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness, peers
from benchmarks.shapes import CPU, CPU_AWKWARD, Shape

# time over that of the bare GEMMs
GOAL = 1.10


@functools.cache
def inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """student_hidden, its head, teacher_hidden, its head; logits of standard deviation about 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)

    student, teacher = shape.student_hidden_size, shape.teacher_hidden_size
    return (
        normal(shape.num_tokens, student, 1.0).requires_grad_(),
        normal(shape.vocab_size, student, 2.0 / student**0.5).requires_grad_(),
        normal(shape.num_tokens, teacher, 1.0),
        normal(shape.vocab_size, teacher, 2.0 / teacher**0.5),
    )


def gemms(shape: Shape, dtype: torch.dtype = torch.float32, *, into_existing: bool = False):
    """The four float32 GEMMs that the loss cannot do without.

    As four plain torch.mm calls, each of which returns its result in fresh memory; or into buffers
    that exist already, which no training step has: dW at least is new in each.
    """
    return gemms_of(inputs(shape, dtype), into_existing=into_existing)


def gemms_of(tensors: tuple[torch.Tensor, ...], *, into_existing: bool = False):
    """The same of tensors that are at hand."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = (
        tensor.detach().float() for tensor in tensors
    )
    logits = torch.empty(student_hidden.shape[0], student_weight.shape[0])
    teacher_logits = torch.empty_like(logits)
    grad_hidden = torch.empty_like(student_hidden)
    grad_weight = torch.empty_like(student_weight)

    def existing() -> None:
        torch.mm(student_hidden, student_weight.t(), out=logits)
        torch.mm(teacher_hidden, teacher_weight.t(), out=teacher_logits)
        torch.mm(logits, student_weight, out=grad_hidden)
        torch.mm(logits.t(), student_hidden, out=grad_weight)

    def fresh() -> tuple[torch.Tensor, ...]:
        student = torch.mm(student_hidden, student_weight.t())
        teacher = torch.mm(teacher_hidden, teacher_weight.t())
        return teacher, torch.mm(student, student_weight), torch.mm(student.t(), student_hidden)

    return existing if into_existing else fresh


def with_backward(loss, tensors):
    """loss(*tensors).backward() from fresh gradients."""

    def run() -> None:
        for tensor in tensors:
            tensor.grad = None
        loss(*tensors).backward()

    return run


def ours(divergence: str, **options):
    return lambda *tensors: (
        opk.fused_linear_divergence(*tensors, divergence=divergence, **options).loss
    )


def labels_of(divergence: str, shape: Shape) -> dict[str, torch.Tensor]:
    """The label of each token, for the divergence that needs one."""
    if divergence != "cross_entropy":
        return {}
    return {"labels": torch.arange(shape.num_tokens) * 61 % shape.vocab_size}


def bench_every_divergence(benchmark):
    """Every divergence at the issue's shape, in turns with the four GEMMs alone."""
    tensors = inputs(CPU)
    variants = {
        "gemms": gemms(CPU),
        "gemms into existing buffers": gemms(CPU, into_existing=True),
    }
    for name in opk.divergences.DIVERGENCES:
        variants[name] = with_backward(ours(name, **labels_of(name, CPU)), tensors)
    benchmark.group = f"every divergence float32 {CPU}"
    turns = harness.take_turns(benchmark, variants, rounds=8, budget_s=55, lead="reverse_kl")
    ratios = harness.record(benchmark, turns, "gemms")
    ratios = {name: ratios[name] for name in opk.divergences.DIVERGENCES}
    worst = max(ratios, key=ratios.get)
    above = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio > GOAL]
    harness.goal(
        benchmark,
        f"every divergence, float32, V = {CPU.vocab_size:,}: time over the bare GEMMs, the worst",
        ratios[worst],
        at_most=GOAL,
        medians=turns.ratio(worst, "gemms", statistics.median),
        note=f"above: {', '.join(above)}" if above else f"worst: {worst}",
    )
    harness.assert_goals(benchmark)


def bench_awkward_vocabulary(benchmark):
    """GPT-2's vocabulary is no multiple of a vector."""
    benchmark.group = f"other inputs {CPU_AWKWARD}"
    benchmark.extra_info["row"] = "float32"
    harness.compare(
        benchmark,
        {
            "gemms": gemms(CPU_AWKWARD),
            harness.OURS: with_backward(ours("jsd"), inputs(CPU_AWKWARD)),
            "eager": with_backward(peers.eager_loss("jsd", beta=0.5), inputs(CPU_AWKWARD)),
        },
        floor="gemms",
        rounds=7,
        budget_s=8,
    )


def bench_float16_inputs(benchmark):
    """16-bit inputs: the floor is the float32 GEMMs, which is what a CPU should run them as."""
    benchmark.group = f"other inputs {CPU}"
    benchmark.extra_info["row"] = "float16"
    harness.compare(
        benchmark,
        {
            "gemms": gemms(CPU, torch.float16),
            harness.OURS: with_backward(ours("jsd"), inputs(CPU, torch.float16)),
        },
        floor="gemms",
        rounds=5,
        budget_s=8,
    )


@pytest.mark.parametrize("workspace_mib", [32, 64, 128])
def bench_small_workspaces(benchmark, workspace_mib):
    """What a small workspace costs in time."""
    benchmark.group = f"workspace float32 {CPU}"
    benchmark.extra_info["row"] = f"{workspace_mib} MiB"
    options = {"workspace_bytes": workspace_mib << 20}
    harness.compare(
        benchmark,
        {
            "gemms": gemms(CPU),
            harness.OURS: with_backward(ours("jsd", **options), inputs(CPU)),
        },
        floor="gemms",
        rounds=5,
        budget_s=8,
    )


PEAK_SETUP = """
import torch, opd_kernels as opk
from benchmarks.bench_fused_linear_divergence import inputs, ours, with_backward
from benchmarks.shapes import CPU, Shape
warm = inputs(CPU._replace(num_tokens=32, vocab_size=2048))
with_backward(ours("jsd"), warm)()
tensors = inputs(CPU)
run = with_backward(ours("jsd", workspace_bytes={workspace_bytes}), tensors)
"""


@pytest.mark.parametrize("workspace_mib", [32, 64, 128, 256])
def bench_peak_memory(benchmark, workspace_mib):
    """Peak extra resident memory of forward + backward: workspace + gradients + 5% at most."""
    workspace_bytes = workspace_mib << 20
    gradients = 4 * CPU.student_hidden_size * (CPU.num_tokens + CPU.vocab_size)
    benchmark.group = f"workspace memory float32 {CPU}"
    setup = PEAK_SETUP.format(workspace_bytes=workspace_bytes)
    peak = benchmark.pedantic(
        harness.peak_extra_bytes, args=(setup, "run()"), rounds=1, iterations=1
    )
    allowed = (workspace_bytes + gradients) * 1.05
    benchmark.extra_info.update(
        peak_extra_bytes=peak, workspace_bytes=workspace_bytes, gradient_bytes=gradients
    )
    assert peak <= allowed, f"peak {peak / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f} MiB"
