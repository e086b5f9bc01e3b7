# SPDX-License-Identifier: Apache-2.0
"""topk_logprobs from logits: in passes over the logits, against a plain copy and eager torch."""

from __future__ import annotations

import functools

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness

NUM_TOKENS, VOCAB_SIZE = 64, 151_936
CASES = [(64, torch.float32), (64, torch.bfloat16), (1, torch.float32), (1024, torch.float32)]


@functools.cache
def logits(dtype: torch.dtype) -> torch.Tensor:
    """Of a law with an entropy of about 7 nats."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator) * 3).to(dtype)


def eager(values: torch.Tensor, num_topk: int) -> tuple[torch.Tensor, ...]:
    """The same five outputs as a careful user writes them, the tail summed over its own terms."""
    logprobs = torch.log_softmax(values.float(), -1)
    best, ids = logprobs.topk(num_topk, -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    lse = values.gather(1, ids[:, :1]).squeeze(1) - best[:, 0]
    tail = logprobs.scatter_(1, ids, -torch.inf).logsumexp(-1)
    return ids, best, lse, tail, entropy


@pytest.mark.parametrize(("num_topk", "dtype"), CASES, ids=str)
def bench_topk_logprobs(benchmark, num_topk, dtype):
    """Ours and eager as multiples of the time of copying the logits once."""
    values = logits(dtype)
    target = torch.empty_like(values)
    benchmark.group = f"topk_logprobs {dtype}"
    benchmark.extra_info["row"] = f"K = {num_topk}"
    ratios = harness.compare(
        benchmark,
        {
            "copy": lambda: target.copy_(values),
            harness.OURS: lambda: opk.topk_logprobs(values, num_topk),
            "eager": lambda: eager(values, num_topk),
        },
        floor="copy",
        rounds=9,
        budget_s=6,
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
