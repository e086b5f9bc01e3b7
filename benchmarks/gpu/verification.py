# SPDX-License-Identifier: Apache-2.0
"""Verification of drafts: ours over the two GEMMs inside it, and flashinfer's chain kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import cases
from benchmarks.gpu.device import Device, Run
from benchmarks.shapes import Shape

OP = "fused_linear_speculative_verify"
# sequences and drafts of each: a batch, and one request alone
SIZES = ((8, 8), (1, 4))


class Drafts(NamedTuple):
    """What both contestants are given."""

    draft_token_ids: Tensor
    uniforms: Tensor
    student_hidden: Tensor
    student_lm_head_weight: Tensor
    teacher_hidden: Tensor
    teacher_lm_head_weight: Tensor


def drafts_of(
    device: Device, shape: Shape, dtype: torch.dtype, num_sequences: int, num_drafts: int
) -> Drafts:
    """Drafts of the student's own law; how many a teacher keeps of them is as it happens."""
    inputs = cases.inputs_of(
        device, shape._replace(num_tokens=num_sequences * (num_drafts + 1)), dtype
    )
    generator = device.generator(5)
    student = inputs.student_hidden.view(num_sequences, num_drafts + 1, -1)[:, :num_drafts]
    student = student.contiguous()
    laws = (student.flatten(0, 1) @ inputs.student_lm_head_weight.t()).float().softmax(-1)
    uniforms = torch.rand(
        num_sequences,
        num_drafts + 1,
        generator=generator,
        device=device.kind,
        dtype=torch.float64,
    )
    return Drafts(
        laws.multinomial(1, generator=generator).view(num_sequences, num_drafts),
        uniforms,
        student,
        inputs.student_lm_head_weight,
        inputs.teacher_hidden.view(num_sequences, num_drafts + 1, -1),
        inputs.teacher_lm_head_weight,
    )


def ours(drafts: Drafts, mode: str, backend: str, **options) -> Run:
    """The fused op."""
    import opd_kernels as opk

    return lambda: opk.fused_linear_speculative_verify(
        drafts.draft_token_ids,
        *drafts[2:],
        uniforms=drafts.uniforms,
        mode=mode,
        backend=backend,
        **options,
    )


def gemms_of(device: Device, drafts: Drafts) -> Run:
    """Both heads on all of their rows, into float32."""
    pairs = []
    for hidden, head in (drafts[2:4], drafts[4:6]):
        flat = hidden.flatten(0, 1)
        logits = torch.empty(len(flat), len(head), device=device.kind, dtype=torch.float32)
        pairs.append((flat, head.t(), logits))

    def run() -> None:
        for pair in pairs:
            device.mm(*pair)

    return run


class Logits(NamedTuple):
    """Both models' logits, as a verifier that does not own the heads has them."""

    student: Tensor
    teacher: Tensor


def logits_of(device: Device, drafts: Drafts) -> Logits:
    return Logits(
        *(
            device.mm(
                hidden.flatten(0, 1),
                head.t(),
                torch.empty(
                    hidden.shape[0] * hidden.shape[1],
                    len(head),
                    device=device.kind,
                    dtype=torch.float32,
                ),
            ).view(*hidden.shape[:2], -1)
            for hidden, head in (drafts[2:4], drafts[4:6])
        )
    )


def ours_from_logits(drafts: Drafts, logits: Logits, backend: str) -> Run:
    import opd_kernels as opk

    return lambda: opk.speculative_verify(
        drafts.draft_token_ids, *logits, uniforms=drafts.uniforms, backend=backend
    )


def flashinfer(drafts: Drafts, logits: Logits) -> Run:
    """Its kernel takes probabilities, hence the softmax of both."""
    from flashinfer.sampling import chain_speculative_sampling

    ids = drafts.draft_token_ids.to(torch.int32)
    return lambda: chain_speculative_sampling(
        logits.student.softmax(-1), ids, logits.teacher.softmax(-1)
    )
