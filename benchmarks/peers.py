# SPDX-License-Identifier: Apache-2.0
"""The same loss from hidden states by other means: torch, torch.compile, and public packages.

Each peer runs as its users run it, at its own defaults. tests/benchmarks/test_peers.py holds that
they compute what ours computes. Packages are imported when a loss of theirs first runs: that takes
seconds, and a process that measures one peer's memory should not hold the others.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import eager
from opd_kernels import divergences

# distributions of the `bench` extra that are peers, by the module that they install
PACKAGES = {"liger_kernel": "liger-kernel", "trl": "trl", "orda_kernel": "orda-kernel"}

# student_hidden, student_lm_head_weight, teacher_hidden, teacher_lm_head_weight -> scalar
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    """A loss, and in which ways it is not ours."""

    loss: Loss
    # over the tokens, where ours sums
    averages: bool = False
    # 16-bit inputs are multiplied as they are, and the logits rounded to their dtype
    rounds_logits: bool = False


def installed() -> dict[str, str]:
    """Version by distribution of the peer packages that can be imported."""
    return {
        distribution: importlib.metadata.version(distribution)
        for module, distribution in PACKAGES.items()
        if importlib.util.find_spec(module) is not None
    }


def peers_of(name: str, dtype: torch.dtype) -> dict[str, Peer]:
    """Peer by label, of those that are installed and have the divergence `name` at its defaults.

    With 16-bit inputs there are two of eager and of torch.compile: one that widens hidden states
    and heads, so that its logits are float32 as ours are, and one that multiplies them as they are.
    """
    params = dict(divergences.parse(name).params)
    found: dict[str, Peer] = {}
    for rounds_logits in (False,) if dtype == torch.float32 else (False, True):
        loss = eager_loss(name, widen=not rounds_logits, **params)
        label = f", {str(dtype).removeprefix('torch.')} logits" if rounds_logits else ""
        found[f"eager{label}"] = Peer(loss, rounds_logits=rounds_logits)
        compiled = torch.compile(loss, fullgraph=True, dynamic=False)
        found[f"torch.compile{label}"] = Peer(compiled, rounds_logits=rounds_logits)
    return found | _of_packages(name, dtype, params)


def eager_loss(name: str, *, widen: bool = True, **params) -> Loss:
    """`eager.divergence` of the two LM heads' logits."""

    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight):
        if widen:
            student_hidden, student_weight = student_hidden.float(), student_weight.float()
            teacher_hidden, teacher_weight = teacher_hidden.float(), teacher_weight.float()
        return eager.divergence(
            student_hidden @ student_weight.t(), teacher_hidden @ teacher_weight.t(), name, **params
        )

    return loss


def _of_packages(name: str, dtype: torch.dtype, params: dict) -> dict[str, Peer]:
    found: dict[str, Peer] = {}
    # the weight on the teacher, as Liger and TRL count it; they take the KLs as its ends
    teacher_weight = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": params.get("beta")}.get(name)
    here = installed()
    if teacher_weight is not None:
        if "liger-kernel" in here:
            rounds = dtype != torch.float32
            found["liger"] = Peer(liger(teacher_weight, compiled=False), True, rounds)
            found["liger compiled"] = Peer(liger(teacher_weight, compiled=True), True, rounds)
        if "trl" in here:
            found["trl"] = Peer(trl(teacher_weight))
    variant = {
        "forward_kl": {"kl_divergence": "forward"},
        "reverse_kl": {"kl_divergence": "reverse"},
        # orda counts the weight on the student
        "jsd": {"kl_divergence": "skew_js", "kl_beta": 1 - params.get("beta", 0.0)},
    }.get(name)
    if variant is not None and "orda-kernel" in here:
        found["orda"] = Peer(orda(**variant), rounds_logits=dtype != torch.float32)
    return found


def liger(beta: float, compiled: bool) -> Loss:
    """Liger-Kernel's chunked JSD, torch alone, the one of its two that runs on a CPU."""

    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # no hard-label term
        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled
        )
        token_ids = _labels(student_hidden)
        return module(student_hidden, student_weight, teacher_hidden, teacher_weight, token_ids)

    return loss


def _labels(hidden: Tensor) -> Tensor:
    """Hard labels, which a loss wants and then weighs with zero."""
    return torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)


def trl(beta: float) -> Loss:
    """TRL's chunked divergence: Triton on a GPU, its torch path elsewhere."""

    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        student, teacher = (student_hidden, student_weight), (teacher_hidden, teacher_weight)
        divergence, _ = ChunkedDivergenceFunction.apply(*student, None, *teacher, None, beta)
        return divergence.sum()

    return loss


def orda(**variant) -> Loss:
    """orda-kernel's distillation loss: Triton on a GPU, its torch path elsewhere."""

    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight):
        from orda_kernel import SeparateTeacher, distillation_loss

        labels = _labels(student_hidden)
        teacher = SeparateTeacher(hidden=teacher_hidden, weight=teacher_weight)
        return distillation_loss(
            student_hidden,
            student_weight,
            labels,
            teacher,
            student_ce_weight=0.0,
            teacher_ce_weight=0.0,
            kl_weight=1.0,
            reduction="sum",
            backend="auto" if student_hidden.is_cuda else "torch",
            **variant,
        ).loss

    return loss


@functools.cache
def slow_16_bit_gemms(dtype: torch.dtype) -> float:
    """How many times longer a GEMM of this dtype takes than its float32 one; 0 if at most 4.

    Without the vector instructions for it a CPU multiplies 16-bit numbers in scalar loops: minutes
    for what takes float32 a second.
    """

    def best(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - begin)
        return min(times)

    ratio = best(dtype) / best(torch.float32)
    return ratio if ratio > 4 else 0.0
