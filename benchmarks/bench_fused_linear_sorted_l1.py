# SPDX-License-Identifier: Apache-2.0
"""fused_linear_sorted_l1, forward + backward, against eager torch on whole logits; its memory."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks import bench_sorted_l1, harness
from benchmarks.bench_fused_linear_divergence import gemms_of, inputs, with_backward
from benchmarks.shapes import Shape

SHAPE = Shape(96, 32_000, 256, 512)
TEACHER_SIZE = 48_000
MIB = 1 << 20
WORKSPACE = 32 * MIB
_PROGRAM = f"""
import torch
from benchmarks import bench_fused_linear_sorted_l1 as bench
def run(rows):
    tensors = bench.tensors(rows)
    def call():
        return bench.{{}}(*tensors).backward()
    return call
run(2)()
call = run({SHAPE.num_tokens})
result = peak_of(call)
"""


def tensors(num_tokens: int = SHAPE.num_tokens) -> tuple[Tensor, ...]:
    """Hidden states and heads, the teacher's vocabulary half as large again."""
    shape = SHAPE._replace(num_tokens=num_tokens)
    wide = shape._replace(vocab_size=TEACHER_SIZE)
    return *inputs(shape)[:2], *inputs(wide)[2:]


def ours(*arguments: Tensor) -> Tensor:
    """The op, in a small workspace."""
    return opk.fused_linear_sorted_l1(*arguments, workspace_bytes=WORKSPACE).loss


def eager(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """The same of whole logits."""
    return bench_sorted_l1.eager(hidden @ head.T, teacher_hidden @ teacher_head.T)


def bench_fused_linear_sorted_l1(benchmark):
    """The floor is the four GEMMs; the rest of the time is the sorting's."""
    arguments = tensors()
    torch.testing.assert_close(ours(*arguments), eager(*arguments), rtol=1e-4, atol=0)
    benchmark.group = f"fused_linear_sorted_l1 float32 {SHAPE} Vt{TEACHER_SIZE}"
    leaves = arguments[:2]
    turns = harness.take_turns(
        benchmark,
        {
            "gemms": gemms_of((*leaves, arguments[2], arguments[3][: SHAPE.vocab_size])),
            harness.OURS: with_backward(lambda *x: ours(*x, *arguments[2:]), leaves),
            "eager": with_backward(lambda *x: eager(*x, *arguments[2:]), leaves),
        },
        rounds=5,
        budget_s=20,
    )
    harness.record(benchmark, turns, "gemms")
    harness.goal(
        benchmark,
        "fused_linear_sorted_l1: eager torch's time over ours",
        turns.ratio("eager", harness.OURS),
        at_least=1.0,
        medians=turns.ratio("eager", harness.OURS, statistics.median),
    )
    harness.assert_goals(benchmark)


def bench_peak_memory(benchmark):
    """What forward and backward add to the resident bytes: workspace, dW and little else."""
    peaks = benchmark.pedantic(
        lambda: {name: harness.run_measured(_PROGRAM.format(name)) for name in ("ours", "eager")},
        rounds=1,
        iterations=1,
    )
    gradients = 4 * SHAPE.student_hidden_size * (SHAPE.vocab_size + SHAPE.num_tokens)
    benchmark.group = "fused_linear_sorted_l1 peak memory"
    case = f"{SHAPE} Vt{TEACHER_SIZE}, workspace {WORKSPACE // MIB} MiB"
    benchmark.extra_info["peak_extra_bytes"] = {
        harness.OURS: {case: peaks["ours"]},
        "eager": {case: peaks["eager"]},
    }
    allowed = WORKSPACE + 2 * gradients + 16 * MIB
    assert peaks["ours"] <= allowed < peaks["eager"], (peaks, allowed)
