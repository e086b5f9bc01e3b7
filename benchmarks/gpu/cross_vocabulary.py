# SPDX-License-Identifier: Apache-2.0
"""Two vocabularies: the sorted laws and the shared tokens, their GEMMs, and both in eager torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import cases
from benchmarks.gpu.device import Device, Run
from benchmarks.shapes import Shape

SORTED, OVERLAP = "fused_linear_sorted_l1", "fused_linear_overlap_divergence"
ROWS = "sorted_l1"
# of the student's tokens: how many the teacher has, and how many both share
TEACHER_SHARE, SHARED = 27 / 32, 0.7


class Pair(NamedTuple):
    """What the losses are given: the teacher's vocabulary is the smaller one."""

    inputs: cases.Inputs
    student_ids: Tensor
    teacher_ids: Tensor


def pair_of(device: Device, shape: Shape, dtype: torch.dtype) -> Pair:
    """Random models and random pairs of ids, the student's ascending."""
    inputs = cases.inputs_of(device, shape, dtype)
    num_teacher = int(TEACHER_SHARE * shape.vocab_size)
    inputs = inputs._replace(teacher_lm_head_weight=inputs.teacher_lm_head_weight[:num_teacher])
    count = int(SHARED * shape.vocab_size)
    generator = device.generator(11)
    ids = [
        torch.randperm(size, generator=generator, device=device.kind)[:count]
        for size in (shape.vocab_size, num_teacher)
    ]
    return Pair(inputs.with_head("trained"), ids[0].sort().values, ids[1])


def logits_of(device: Device, pair: Pair) -> tuple[Tensor, Tensor]:
    """Both models' logits in float32; the student's is a leaf."""
    student, teacher = (
        device.mm(
            hidden.detach(),
            head.detach().t(),
            torch.empty(len(hidden), len(head), device=device.kind, dtype=torch.float32),
        )
        for hidden, head in (pair.inputs[:2], pair.inputs[2:])
    )
    return student.requires_grad_(), teacher


def sorted_loss(**options):
    """`fused_linear_sorted_l1` as a loss of the four tensors."""
    import opd_kernels as opk

    return lambda *tensors: opk.fused_linear_sorted_l1(*tensors, **options).loss


def overlap_loss(pair: Pair, **options):
    """`fused_linear_overlap_divergence`, reverse KL with a bucket, as the same."""
    import opd_kernels as opk

    ids = pair.student_ids, pair.teacher_ids
    return lambda *tensors: opk.fused_linear_overlap_divergence(*tensors, *ids, **options).loss


def eager_sorted_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """Softmax, sort, pad, subtract; the teacher has no more tokens than the student."""
    q, p = (x.float().softmax(1).sort(dim=1, descending=True).values for x in (student, teacher))
    return (torch.nn.functional.pad(p, (0, q.shape[1] - p.shape[1])) - q).abs().sum()


def eager_sorted(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """The same of whole logits."""
    return eager_sorted_rows(hidden @ head.t(), teacher @ teacher_head.t())


def eager_overlap(pair: Pair):
    """Whole logits, the shared cells and a bucket of the others, autograd."""

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        laws = []
        for states, weight, own in (
            (hidden, head, pair.student_ids),
            (teacher, teacher_head, pair.teacher_ids),
        ):
            logits = (states @ weight.t()).float()
            rest = logits.index_fill(1, own, -torch.inf).logsumexp(1, keepdim=True)
            laws.append(torch.cat([logits[:, own], rest], 1).log_softmax(1))
        return (laws[0].exp() * (laws[0] - laws[1].detach())).sum()

    return loss


def rows_step(loss, student: Tensor, teacher: Tensor) -> Run:
    """Forward and backward of a loss of logits."""

    def run() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return run
