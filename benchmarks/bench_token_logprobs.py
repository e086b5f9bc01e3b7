# SPDX-License-Identifier: Apache-2.0
"""token_logprobs from logits, forward + backward, against eager log_softmax and gather."""

from __future__ import annotations

import torch

import opd_kernels as opk
from benchmarks import harness
from benchmarks.bench_divergence import NUM_TOKENS, VOCAB_SIZE, logits
from benchmarks.bench_fused_linear_divergence import with_backward


def eager(values: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Sum of chosen log-probs and entropies, as a training loop would write it."""
    logprobs = torch.log_softmax(values.float(), -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, token_ids[:, None]).sum() + 0.01 * entropy.sum()


def ours(values: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The same by the kernel."""
    out = opk.token_logprobs(values, token_ids)
    return out.logprobs.sum() + 0.01 * out.entropy.sum()


def bench_token_logprobs(benchmark):
    """Log-prob and entropy with their gradients."""
    student, _ = logits(torch.float32)
    token_ids = torch.arange(NUM_TOKENS) % VOCAB_SIZE
    target = torch.empty_like(student.detach())
    benchmark.group = "token_logprobs float32"
    ratios = harness.compare(
        benchmark,
        {
            "copy": lambda: target.copy_(student.detach()),
            harness.OURS: with_backward(ours, (student, token_ids)),
            "eager": with_backward(eager, (student, token_ids)),
        },
        floor="copy",
        rounds=7,
        budget_s=8,
    )
    assert ratios[harness.OURS] < ratios["eager"], ratios
