# SPDX-License-Identifier: Apache-2.0
"""sample_tokens from logits: in passes over the logits, against a plain copy and eager torch."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness
from benchmarks.bench_topk_logprobs import NUM_TOKENS, logits

NUM_DRAWS = 50


def eager(values: torch.Tensor, uniforms: torch.Tensor, tau: float) -> tuple[torch.Tensor, ...]:
    """Draws, log-probs and weights as a careful user writes them; tokens may repeat."""
    law = torch.log_softmax(values.float(), -1)
    proposal = torch.log_softmax(values.float() / tau, -1)
    upto = proposal.exp().cumsum(-1, dtype=torch.float64)
    draws = torch.searchsorted(upto, uniforms, right=True).clamp_(max=values.shape[1] - 1)
    logprobs = law.gather(1, draws)
    weights = (logprobs - proposal.gather(1, draws)).exp() / uniforms.shape[1]
    return draws, weights, logprobs, torch.logsumexp(values, -1)


@pytest.mark.parametrize("tau", [1.0, 1.2], ids=str)
def bench_sample_tokens(benchmark, tau):
    """Ours, which also merges repeated draws, and eager, as multiples of copying the logits."""
    values = logits(torch.float32)
    target = torch.empty_like(values)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(NUM_TOKENS, NUM_DRAWS, generator=generator, dtype=torch.float64)
    benchmark.group = "sample_tokens float32"
    benchmark.extra_info["row"] = f"{NUM_DRAWS} draws, proposal_temperature {tau}"
    ratios = harness.compare(
        benchmark,
        {
            "copy": lambda: target.copy_(values),
            harness.OURS: lambda: opk.sample_tokens(values, uniforms, proposal_temperature=tau),
            "eager": lambda: eager(values, uniforms, tau),
        },
        floor="copy",
        rounds=9,
        budget_s=5,
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
