# SPDX-License-Identifier: Apache-2.0
"""fused_linear_divergence, forward + backward, against its four GEMMs, eager, compile, peers."""

from __future__ import annotations

import functools

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness, peers
from benchmarks.shapes import CPU, CPU_SHAPES, Shape

PARAMS = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}


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


def gemms(shape: Shape, dtype: torch.dtype, *, into_existing: bool = False):
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


def eager(divergence: str):
    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight):
        return peers.eager_divergence(
            student_hidden @ student_weight.t(),
            teacher_hidden @ teacher_weight.t(),
            divergence,
            PARAMS.get(divergence, 0.0),
        )

    return loss


@pytest.mark.parametrize("divergence", list(opk.divergences.DIVERGENCES))
def bench_all_divergences(benchmark, divergence):
    """Every divergence at the issue's shape: at most 1.15x of the four GEMMs alone."""
    tensors = inputs(CPU)
    benchmark.group = f"fused_linear_divergence float32 {CPU}"
    ratios = harness.compare(
        benchmark,
        {
            "gemms": gemms(CPU, torch.float32),
            "gemms into existing buffers": gemms(CPU, torch.float32, into_existing=True),
            harness.OURS: with_backward(ours(divergence), tensors),
        },
        floor="gemms",
        rounds=15,
    )
    assert ratios[harness.OURS] <= 1.15, ratios


def bench_jsd_against_peers(benchmark):
    """JSD(0.5) at the issue's shape: ours, eager, torch.compile, Liger and TRL where installed."""
    tensors = inputs(CPU)
    token_ids = torch.zeros(CPU.num_tokens, dtype=torch.long)
    variants = {
        "gemms": gemms(CPU, torch.float32),
        harness.OURS: with_backward(ours("jsd"), tensors),
        "eager": with_backward(eager("jsd"), tensors),
        "torch.compile": with_backward(torch.compile(eager("jsd")), tensors),
    }
    liger = peers.liger_fused_linear_jsd(0.5, chunk=512, compiled=True)
    if liger is not None:
        variants["liger compiled"] = with_backward(lambda *t: liger(*t, token_ids), tensors)
    trl = peers.trl_chunked_jsd(0.5)
    if trl is not None:
        variants["trl"] = with_backward(trl, tensors)
    benchmark.group = f"jsd against peers float32 {CPU}"
    ratios = harness.compare(benchmark, variants, floor="gemms", rounds=5)
    slowest_peer = min(
        ratio for name, ratio in ratios.items() if name not in ("gemms", harness.OURS)
    )
    assert ratios[harness.OURS] < slowest_peer, ratios


@pytest.mark.parametrize("shape", CPU_SHAPES[1:], ids=str)
def bench_other_shapes(benchmark, shape):
    """A 152k vocabulary, and GPT-2's, which is no multiple of a vector."""
    benchmark.group = f"jsd float32 {shape}"
    harness.compare(
        benchmark,
        {
            "gemms": gemms(shape, torch.float32),
            harness.OURS: with_backward(ours("jsd"), inputs(shape)),
            "eager": with_backward(eager("jsd"), inputs(shape)),
        },
        floor="gemms",
        rounds=3,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def bench_16_bit_inputs(benchmark, dtype):
    """16-bit inputs: the floor is the float32 GEMMs, which is what a CPU should run them as."""
    benchmark.group = f"jsd {dtype} {CPU}"
    harness.compare(
        benchmark,
        {
            "gemms": gemms(CPU, dtype),
            harness.OURS: with_backward(ours("jsd"), inputs(CPU, dtype)),
        },
        floor="gemms",
        rounds=3,
    )


@pytest.mark.parametrize("workspace_mib", [32, 64, 128])
def bench_small_workspaces(benchmark, workspace_mib):
    """What a small workspace costs in time."""
    benchmark.group = f"jsd float32 {CPU}, workspace"
    options = {"workspace_bytes": workspace_mib << 20}
    harness.compare(
        benchmark,
        {
            "gemms": gemms(CPU, torch.float32),
            harness.OURS: with_backward(ours("jsd", **options), inputs(CPU)),
        },
        floor="gemms",
        rounds=3,
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
    benchmark.group = f"peak memory of jsd float32 {CPU}"
    setup = PEAK_SETUP.format(workspace_bytes=workspace_bytes)
    peak = benchmark.pedantic(
        harness.peak_extra_bytes, args=(setup, "run()"), rounds=1, iterations=1
    )
    allowed = (workspace_bytes + gradients) * 1.05
    benchmark.extra_info.update(
        peak_extra_bytes=peak, workspace_bytes=workspace_bytes, gradient_bytes=gradients
    )
    assert peak <= allowed, f"peak {peak / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f} MiB"
