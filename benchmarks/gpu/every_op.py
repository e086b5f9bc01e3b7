# SPDX-License-Identifier: Apache-2.0
"""Calls every op of a backend once on small, awkward shapes: what a sanitizer watches."""

from __future__ import annotations

import argparse

import torch

import opd_kernels as opk
from benchmarks.gpu import cases, cross_vocabulary, device, sparse_teacher, verification
from benchmarks.shapes import Shape
from opd_kernels import divergences as D
from opd_kernels import targets

# a vocabulary that is no multiple of a vector, and one long enough for a cluster of blocks
SHAPES = (Shape(5, 1003, 24, 40), Shape(3, 40_000, 16, 24))
DRY_SHAPES = (Shape(3, 67, 8, 16),)
STATISTICS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl", "top1_agreement")
OPS = (
    "divergence",
    "fused",
    "token_logprobs",
    "topk_divergence",
    "topk_logprobs",
    "sample_tokens",
    "speculative_verify",
    "segment_scan",
    "sorted_l1",
    "overlap_divergence",
)


def divergence(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """Every divergence forward and backward; sums, targets and labels."""
    generator = dev.generator(0)

    def logits() -> torch.Tensor:
        size = (shape.num_tokens, shape.vocab_size)
        return torch.randn(*size, generator=generator, device=dev.kind).to(dtype)

    labels = torch.arange(shape.num_tokens, device=dev.kind)
    for name in opk.divergences.DIVERGENCES:
        given = {"labels": labels} if name == "cross_entropy" else {}
        student = logits().requires_grad_()
        loss = opk.divergence(student, logits(), divergence=name, backend=backend, **given)
        loss.sum().backward()
    for target in (targets.geometric(0.3, 0.7), targets.mixture(0.5, detach=False)):
        student = logits().requires_grad_()
        loss = opk.divergence(student, logits(), target=target, backend=backend)
        loss.sum().backward()


def fused(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """Path A and path B, weights, statistics, both reductions, and a tolerance."""
    inputs = cases.inputs_of(dev, shape, dtype).with_head("trained")
    weights = torch.linspace(0.0, 1.0, shape.num_tokens, device=dev.kind)
    row_bytes = 8 * shape.vocab_size
    options = (
        {"divergence": D.jsd(beta=0.3), "statistics": STATISTICS},
        {"divergence": "reverse_kl", "token_weights": weights, "reduction": "none"},
        {"divergence": "forward_kl", "workspace_bytes": row_bytes + (1 << 13)},
        {"divergence": "jsd", "workspace_bytes": row_bytes // 2 + (1 << 13)},
        {"divergence": "reverse_kl", "gradient_tolerance": 1e-3},
        {"divergence": [(0.5, D.forward_kl()), (0.5, D.total_variation())]},
    )
    for option in options:
        out = opk.fused_linear_divergence(*inputs, backend=backend, **option)
        out.loss.sum().backward()


def token_logprobs(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """From logits and from hidden states, all three outputs differentiated."""
    inputs = cases.inputs_of(dev, shape, dtype).with_head("trained")
    ids = torch.arange(shape.num_tokens, device=dev.kind)
    logits = (inputs.student_hidden @ inputs.student_lm_head_weight.t()).detach().requires_grad_()
    for out in (
        opk.token_logprobs(logits, ids, backend=backend),
        opk.fused_linear_token_logprobs(*inputs[:2], ids, backend=backend),
    ):
        (out.logprobs + out.lse + out.entropy).sum().backward()


def topk_divergence(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """Every tail, under a softcap and without, from logits and from hidden states."""
    inputs = cases.inputs_of(dev, shape, dtype).with_head("trained")
    teacher = sparse_teacher.teacher_of(dev, shape.num_tokens, shape.vocab_size)
    logits = (inputs.student_hidden @ inputs.student_lm_head_weight.t()).detach().requires_grad_()
    weights = torch.linspace(0.0, 1.0, shape.num_tokens, device=dev.kind)
    for tail in ("bucket", "renormalize_both", "renormalize_teacher", "drop"):
        softcap = 30.0 if tail == "bucket" else None
        opk.topk_divergence(
            logits, *teacher, tail=tail, softcap=softcap, backend=backend
        ).sum().backward()
        opk.fused_linear_topk_divergence(
            *inputs[:2], *teacher, tail=tail, student_softcap=softcap, token_weights=weights,
            backend=backend,
        ).loss.backward()  # fmt: skip


def topk_logprobs(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """With a sample and without one; ids; a row that is masked, one of equals, one that ascends."""
    inputs = cases.inputs_of(dev, shape, dtype)
    hidden, head = inputs.teacher_hidden, inputs.teacher_lm_head_weight
    logits = hidden @ head.t()
    logits[0, 7:] = -torch.inf
    logits[1] = 1.0
    logits[2] = torch.arange(shape.vocab_size, device=dev.kind).to(dtype)
    ids = torch.arange(2 * shape.num_tokens, device=dev.kind).reshape(-1, 2) - 1
    for num_topk in (1, min(64, shape.vocab_size), min(600, shape.vocab_size)):
        opk.topk_logprobs(logits, num_topk, token_ids=ids, backend=backend)
    opk.fused_linear_topk(hidden, head, num_topk=9, token_ids=ids, softcap=5.0, backend=backend)


def sample_tokens(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """Few draws and many, both ends of [0, 1); a masked row, one of equals, one without a law."""
    inputs = cases.inputs_of(dev, shape, dtype)
    hidden, head = inputs.teacher_hidden, inputs.teacher_lm_head_weight
    logits = hidden @ head.t()
    logits[0, 7:] = -torch.inf
    logits[1] = 1.0
    logits[2, 5] = torch.nan
    for num_draws in (1, 70, 600):
        size = (shape.num_tokens, num_draws)
        uniforms = torch.rand(*size, generator=dev.generator(0), device=dev.kind).double()
        uniforms[:, 0] = 0.0
        uniforms[:, -1] = 1.0 - 2.0**-53
        opk.sample_tokens(logits, uniforms, proposal_temperature=1.2, backend=backend)
        opk.fused_linear_sample_tokens(hidden, head, uniforms, softcap=5.0, backend=backend)


def speculative_verify(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """Every mode that draws, cut and not, from logits and from hidden states; a masked row."""
    drafts = verification.drafts_of(dev, shape, dtype, 2, 2)
    logits = verification.logits_of(dev, drafts)
    logits.teacher[0, 1, 7:] = -torch.inf
    for mode in ("rejection", "block", "topk"):
        for options in ({}, {"top_k": 9, "top_p": 0.9}):
            verification.ours(drafts, mode, backend, **options)()
    verification.ours_from_logits(drafts, logits, backend)()


def segment_scan(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """The family over packed segments, an empty one among them."""
    if dtype != torch.float32:
        return
    offsets = torch.tensor([0, 3, 3, 700, 1003], device=dev.kind)
    values = torch.randn(1003, generator=dev.generator(0), device=dev.kind).requires_grad_()
    opk.segment_scan(values, offsets, discount=0.9, backend=backend).sum().backward()
    opk.segment_reduce(values, offsets, backend=backend).sum().backward()


def sorted_l1(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """From logits and from hidden states, with pairs and without; Triton has none."""
    if backend == "triton":
        return
    pair = cross_vocabulary.pair_of(dev, shape, dtype)
    student, teacher = cross_vocabulary.logits_of(dev, pair)
    for pairs in (None, (pair.student_ids, pair.teacher_ids)):
        options = {"pairs": pairs, "pair_weight": 0.5 if pairs else 0.0, "backend": backend}
        opk.sorted_l1(student, teacher, **options).sum().backward()
        cross_vocabulary.sorted_loss(**options)(*pair.inputs).backward()


def overlap_divergence(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """Every tail and one more cell; both reductions."""
    pair = cross_vocabulary.pair_of(dev, shape, dtype)
    more = torch.zeros(shape.num_tokens, device=dev.kind)
    options = (
        {"tail": "bucket", "student_extra_logits": more, "teacher_extra_logits": more},
        {"tail": "renormalize_both", "divergence": "jsd"},
        {"tail": "renormalize_teacher", "divergence": "forward_kl", "reduction": "none"},
    )
    for option in options:
        loss = cross_vocabulary.overlap_loss(pair, backend=backend, **option)
        loss(*pair.inputs).sum().backward()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("ops", nargs="*", default=OPS)
    options = parser.parse_args()
    dev = device.of(options.dry_run)
    for op in options.ops:
        for shape in DRY_SHAPES if options.dry_run else SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                globals()[op](shape, dev, options.backend, dtype)
                dev.synchronize()
        print(f"ran {op}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
