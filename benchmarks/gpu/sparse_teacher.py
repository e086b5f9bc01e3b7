# SPDX-License-Identifier: Apache-2.0
"""Teachers of whom K entries are known: inputs, row kernels and steps of topk_divergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import cases
from benchmarks.gpu.device import Device, Run
from opd_kernels import _dispatch, _laws
from opd_kernels.token_logprobs import pack_law

OP = "topk_divergence"
NUM_IDS = 64


class SparseTeacher(NamedTuple):
    """As `topk_divergence` takes them."""

    teacher_ids: Tensor
    teacher_logprobs: Tensor


def teacher_of(device: Device, num_tokens: int, vocab_size: int) -> SparseTeacher:
    """NUM_IDS distinct ids in a row, anywhere in the vocabulary, and log-probabilities whose
    probabilities leave something of 1."""
    num_ids = min(NUM_IDS, vocab_size // 4)
    # a prime step meets no column twice in fewer steps than there are columns
    steps = torch.arange(num_ids, device=device.kind) * 2371
    starts = torch.arange(num_tokens, device=device.kind) * 61
    ids = (starts.unsqueeze(1) + steps) % vocab_size
    logits = torch.randn(num_tokens, num_ids + 1, generator=device.generator(3), device=device.kind)
    logprobs = logits.mul_(2.0).log_softmax(1)[:, :num_ids]
    return SparseTeacher(ids.to(torch.int32), logprobs.contiguous())


def row_kernels(
    backend: str, logits: Tensor, ids: Tensor, grad_dtype: int
) -> dict[str, tuple[object, tuple]]:
    """The two row kernels, by what they are called in results, with their arguments: one reads
    the logits, the other leaves dZ in their place."""
    law = pack_law(
        _laws.rows_of(OP, logits),
        logits.shape[1],
        temperature=1.0,
        softcap=None,
        logit_scale=1.0,
    )
    ids = ids.to(torch.int64)
    per_id = torch.full(ids.shape, 0.01, device=logits.device)
    per_row = torch.full(ids.shape[:1], -0.5, device=logits.device)
    # of standard deviation 2: e^2 V of mass
    lse = torch.full(ids.shape[:1], 14.0, dtype=torch.float64, device=logits.device)
    ops = _dispatch.row_ops(backend)
    return {
        f"{OP} forward": (ops.topk_divergence_fwd, (logits, ids, *law)),
        f"{OP} backward": (
            ops.topk_divergence_bwd_,
            (logits, ids, per_id, per_row, lse, *law, grad_dtype),
        ),
    }


def loss_of(name: str, teacher: SparseTeacher, **options):
    """`fused_linear_topk_divergence` as a loss of the student's two tensors."""
    import opd_kernels as opk

    def loss(hidden: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        out = opk.fused_linear_topk_divergence(hidden, weight, *teacher, divergence=name, **options)
        return out.loss

    return loss


def floor_of(gemms: cases.Gemms, head: str, split: int) -> Run:
    """Its three GEMMs (two with the head frozen), chunk by chunk."""

    def run() -> None:
        for rows in gemms.chunks():
            gemms.student(rows)
            gemms.grad_of_hidden(rows, split)
            if head == "trained":
                gemms.grad_of_weight(rows)

    return run
