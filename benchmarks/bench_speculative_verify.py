# SPDX-License-Identifier: Apache-2.0
"""speculative_verify from logits, in passes over them, against a plain copy and eager torch."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks import harness

# sequences, drafts of each, vocabulary
NUM_SEQUENCES, NUM_DRAFTS, VOCAB_SIZE = 8, 8, 151_936


def eager(
    drafts: Tensor, student_logits: Tensor, teacher_logits: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """(num_accepted, next_token): both laws formed, then rejection, as a careful user writes it."""
    num_sequences, num_drafts = drafts.shape
    q, p = student_logits.float().softmax(-1), teacher_logits.float().softmax(-1)
    ids = drafts.unsqueeze(2)
    ratio = p[:, :-1].gather(2, ids).squeeze(2) / q.gather(2, ids).squeeze(2)
    kept = (uniforms[:, :-1] < ratio).cumprod(1).sum(1)
    rows = torch.arange(num_sequences)
    next_p = p[rows, kept]
    residual = (next_p - q[rows, kept.clamp(max=num_drafts - 1)]).clamp_(min=0)
    residual = torch.where((kept == num_drafts).unsqueeze(1), next_p, residual)
    upto = residual.cumsum(1, dtype=torch.float64)
    token = torch.searchsorted(upto, uniforms[:, -1:] * upto[:, -1:], right=True)
    return kept, token.squeeze(1)


def logits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(drafts, student's logits, the teacher's, uniforms) of models that are near."""
    generator = torch.Generator().manual_seed(0)
    size = (NUM_SEQUENCES, NUM_DRAFTS + 1, VOCAB_SIZE)
    teacher = 3 * torch.randn(size, generator=generator)
    student = teacher[:, :-1] + 0.3 * torch.randn(size, generator=generator)[:, :-1]
    law = student.flatten(0, 1).softmax(-1)
    drafts = law.multinomial(1, generator=generator).view(NUM_SEQUENCES, NUM_DRAFTS)
    uniforms = torch.rand(size[:2], generator=generator, dtype=torch.float64)
    return drafts, student, teacher, uniforms


@pytest.mark.parametrize("cut", [{}, {"top_k": 50, "top_p": 0.95}], ids=["whole laws", "cut laws"])
def bench_speculative_verify(benchmark, cut):
    """Ours and eager, which cuts nothing, as multiples of copying the logits."""
    *tensors, uniforms = logits()
    targets = [torch.empty_like(values) for values in tensors[1:]]
    benchmark.group = "speculative_verify float32"
    benchmark.extra_info["row"] = ", ".join(f"{key} {value}" for key, value in cut.items()) or "all"
    turns = harness.take_turns(
        benchmark,
        {
            "copy": lambda: [
                target.copy_(values) for target, values in zip(targets, tensors[1:], strict=True)
            ],
            harness.OURS: lambda: opk.speculative_verify(*tensors, uniforms=uniforms, **cut),
            "block": lambda: opk.speculative_verify(
                *tensors, uniforms=uniforms, mode="block", **cut
            ),
            "eager": lambda: eager(*tensors, uniforms),
        },
        rounds=7,
        budget_s=6,
    )
    harness.record(benchmark, turns, "copy")
    harness.goal(
        benchmark,
        f"speculative_verify, {benchmark.extra_info['row']}: eager torch's time over ours",
        turns.ratio("eager", harness.OURS),
        at_least=1.0,
        medians=turns.ratio("eager", harness.OURS, statistics.median),
        note="Eager cuts no law." if cut else "",
    )
    harness.assert_goals(benchmark)
