# SPDX-License-Identifier: Apache-2.0
"""fused_linear_divergence, forward + backward, against every peer that runs on this machine.

Which peers those are, and how each is called: benchmarks/peers.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness, peers
from benchmarks.bench_fused_linear_divergence import gemms_of, inputs, ours, with_backward
from benchmarks.shapes import CPU, CPU_LARGE_VOCAB, Shape

KLS = ("jsd", "forward_kl", "reverse_kl")
# the best peer's time over ours, by vocabulary
GOALS = {CPU: 1.2, CPU_LARGE_VOCAB: 1.5}
TRL_GOAL = 3.0
# who is worth the time where not everyone is: uncompiled, the others are behind themselves
QUICKEST = ("torch.compile", "liger compiled", "trl")
SMALL_WORKSPACE_MIB = 32
SMALL = f"{harness.OURS}, workspace {SMALL_WORKSPACE_MIB} MiB"
# whose peak memory is compared: a name of its own for each, since each gets a process
MEMORY_CASES = {
    "float32, head trained": (torch.float32, True),
    "bfloat16, head trained": (torch.bfloat16, True),
    "bfloat16, head frozen": (torch.bfloat16, False),
}


def tensors_of(shape: Shape, dtype: torch.dtype, trained: bool) -> tuple[torch.Tensor, ...]:
    """`inputs`, the student's head with or without a gradient."""
    hidden, head, *teacher = inputs(shape, dtype)
    return (hidden, head if trained else head.detach(), *teacher)


def bare_gemms(tensors: tuple[torch.Tensor, ...]):
    """The float32 GEMMs that the loss cannot do without: three if the head is frozen."""
    if tensors[1].requires_grad:
        return gemms_of(tensors)
    student_hidden, student_weight, teacher_hidden, teacher_weight = (
        tensor.detach().float() for tensor in tensors
    )

    def run() -> tuple[torch.Tensor, ...]:
        student = torch.mm(student_hidden, student_weight.t())
        teacher = torch.mm(teacher_hidden, teacher_weight.t())
        return teacher, torch.mm(student, student_weight)

    return run


def contestants(name: str, dtype: torch.dtype) -> tuple[dict[str, peers.Loss], dict[str, str]]:
    """Loss by label, ours first; and why a peer that is installed is not among them."""
    found: dict[str, peers.Loss] = {harness.OURS: ours(name)}
    left_out: dict[str, str] = {}
    for label, peer in peers.peers_of(name, dtype).items():
        ratio = peers.slow_16_bit_gemms(dtype) if peer.rounds_logits else 0
        if ratio:
            left_out[label] = f"{dtype} GEMMs take {ratio:.0f} times as long as float32 ones here"
        else:
            found[label] = peer.loss
    return found, left_out


def compete(
    benchmark,
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    trained: bool,
    *,
    only: Sequence[str] = (),
    **turns_options,
) -> tuple[harness.Turns, list[str]]:
    """Ours and all peers, or `only` some, in turns; returns the times and who the peers were."""
    torch.compiler.reset()
    tensors = tensors_of(shape, dtype, trained)
    losses, left_out = contestants(name, dtype)
    if only:
        losses = {label: losses[label] for label in (harness.OURS, *only) if label in losses}
    variants = {"gemms": bare_gemms(tensors)}
    variants |= {label: with_backward(loss, tensors) for label, loss in losses.items()}
    turns = harness.take_turns(benchmark, variants, rounds=9, **turns_options)
    harness.record(benchmark, turns, "gemms")
    benchmark.extra_info["row"] = name
    if left_out:
        benchmark.extra_info["left_out"] = left_out
    return turns, [label for label in losses if label != harness.OURS]


@pytest.mark.parametrize("divergence", KLS)
@pytest.mark.parametrize("shape", GOALS, ids=str)
def bench_float32(benchmark, shape, divergence):
    """The KLs and JSD: how many times longer the best of the peers takes."""
    benchmark.group = f"peers float32 {shape}"
    only = () if shape is CPU or divergence == "jsd" else QUICKEST
    turns, others = compete(
        benchmark, divergence, shape, torch.float32, True, only=only, budget_s=26, slow_rounds=1
    )
    best = min(others, key=lambda label: turns.ratio(label, harness.OURS))
    harness.goal(
        benchmark,
        f"{divergence}, float32, V = {shape.vocab_size:,}: the best peer's time over ours",
        turns.ratio(best, harness.OURS),
        at_least=GOALS[shape],
        medians=turns.ratio(best, harness.OURS, statistics.median),
        note=f"best peer: {best}",
    )
    harness.assert_goals(benchmark)


def bench_float32_frozen_head(benchmark):
    """No dW is needed, so a peer that forms it loses by that much."""
    benchmark.group = f"peers float32 frozen head {CPU}"
    compete(benchmark, "reverse_kl", CPU, torch.float32, False, only=QUICKEST, budget_s=15)


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def bench_bfloat16(benchmark, trained, divergence):
    """bfloat16 inputs; the floor is still the float32 GEMMs. All peers in one case of the four."""
    head = "trained" if trained else "frozen"
    benchmark.group = f"peers bfloat16 {head} head {CPU}"
    only = () if trained and divergence == "jsd" else ("torch.compile", "trl")
    turns, others = compete(
        benchmark, divergence, CPU, torch.bfloat16, trained, only=only, budget_s=16, slow_rounds=2
    )
    there = "trl" in others
    harness.goal(
        benchmark,
        f"{divergence}, bfloat16, head {head}, V = {CPU.vocab_size:,}: TRL's time over ours",
        turns.ratio("trl", harness.OURS) if there else None,
        at_least=TRL_GOAL,
        medians=turns.ratio("trl", harness.OURS, statistics.median) if there else None,
    )
    harness.assert_goals(benchmark)


def memory_contestants(dtype: torch.dtype) -> dict[str, peers.Loss]:
    """Loss by label; ours also with less to work in than it takes by itself."""
    losses, _ = contestants("jsd", dtype)
    return {**losses, SMALL: ours("jsd", workspace_bytes=SMALL_WORKSPACE_MIB << 20)}


def peaks(peak_of, label: str) -> dict[str, int]:
    """Peak extra bytes of one contestant by memory case; runs in its own process.

    A first call fills what a library keeps: small, unless it is the compiler's at this very size.
    """
    measured = {}
    for case, (dtype, trained) in MEMORY_CASES.items():
        losses = memory_contestants(dtype)
        if label not in losses:
            continue
        tensors = tensors_of(CPU, dtype, trained)
        warm = tensors
        if "compile" not in label:
            warm = tensors_of(CPU._replace(num_tokens=32, vocab_size=2048), dtype, trained)
        with_backward(losses[label], warm)()
        for tensor in tensors:
            tensor.grad = None
        # what an earlier case has left for the next call is this call's memory too
        opk.release_workspace()
        measured[case] = peak_of(with_backward(losses[label], tensors))
    return measured


def bench_peak_memory_against_peers(benchmark):
    """JSD at the issue's shape, each contestant in a process of its own."""
    by_dtype = {dtype: memory_contestants(dtype) for dtype, _ in MEMORY_CASES.values()}
    labels = list(dict.fromkeys(label for losses in by_dtype.values() for label in losses))
    measured: dict[str, dict[str, int]] = {}

    def measure() -> None:
        for label in labels:
            measured[label] = harness.run_measured(
                "from benchmarks import bench_against_peers\n"
                f"result = bench_against_peers.peaks(peak_of, {label!r})"
            )

    benchmark.group = f"peers peak memory {CPU}"
    benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info["peak_extra_bytes"] = measured
    for case, (dtype, _) in MEMORY_CASES.items():
        if dtype == torch.bfloat16:
            _memory_goals(benchmark, case, {k: v[case] for k, v in measured.items() if case in v})
    harness.assert_goals(benchmark)


def _memory_goals(benchmark, case: str, peak: dict[str, int]) -> None:
    """Against the peers whose logits are float32 as ours are, and against all of them."""
    rounding = {
        label for label, peer in peers.peers_of("jsd", torch.bfloat16).items() if peer.rounds_logits
    }
    others = [label for label in peak if label not in (harness.OURS, SMALL)]
    for whom, rivals in (
        ("peers with float32 logits", [label for label in others if label not in rounding]),
        ("all peers", others),
    ):
        best = min(rivals, key=peak.get)
        harness.goal(
            benchmark,
            f"jsd, {case}, V = {CPU.vocab_size:,}: our peak memory over the best of {whom}",
            peak[harness.OURS] / peak[best],
            at_most=1.0,
            note=f"best peer: {best}; ours with a workspace of {SMALL_WORKSPACE_MIB} MiB: "
            f"{peak[SMALL] / peak[best]:.2f}",
        )


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [d for d in opk.divergences.DIVERGENCES if d not in KLS])
def bench_other_divergences(benchmark, divergence):
    """The rest of the family against torch, the only one that has all of it."""
    if divergence == "cross_entropy":
        pytest.skip("no teacher in it: frameworks have fused cross-entropies of their own")
    benchmark.group = f"peers float32 other divergences {CPU}"
    turns, others = compete(
        benchmark, divergence, CPU, torch.float32, True, budget_s=12, slow_rounds=1
    )
    best = min(others, key=lambda label: turns.ratio(label, harness.OURS))
    assert turns.ratio(best, harness.OURS) > 1, benchmark.extra_info["ratio_to_ours"]
