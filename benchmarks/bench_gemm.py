# SPDX-License-Identifier: Apache-2.0
"""The GEMMs of an LM head in our own CPU kernel, against torch.mm (docs/decisions/0004)."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness
from benchmarks.shapes import CPU

TOKENS = 256


@pytest.mark.parametrize("product", ["logits", "grad_hidden", "grad_weight"])
def bench_gemm(benchmark, product):
    """A chunk of 256 tokens, float32, into buffers that exist."""
    hidden, head = (
        torch.randn(TOKENS, CPU.student_hidden_size),
        torch.randn(CPU.vocab_size, CPU.student_hidden_size),
    )
    grad_logits = torch.randn(TOKENS, CPU.vocab_size)
    a, b = {
        "logits": (hidden, head.t()),
        "grad_hidden": (grad_logits, head),
        "grad_weight": (grad_logits.t(), hidden),
    }[product]
    out = torch.empty(a.shape[0], b.shape[1])
    benchmark.group = f"gemm {product}"
    harness.compare(
        benchmark,
        {
            "torch.mm": lambda: torch.mm(a, b, out=out),
            harness.OURS: lambda: torch.ops.opd.gemm_(out, a, b, False),
        },
        floor="torch.mm",
        rounds=9,
    )
