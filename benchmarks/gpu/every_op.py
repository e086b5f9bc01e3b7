# SPDX-License-Identifier: Apache-2.0
"""Calls every op of a backend once on small, awkward shapes: what a sanitizer watches.

An op that raises leaves the others, and says so in a line that begins with FAILED.
"""

from __future__ import annotations

import argparse
import traceback

import torch

import opd_kernels as opk
from benchmarks.gpu import (
    cases,
    device,
    part_ours,
    sparse_teacher,
    two_vocabularies,
    verification,
)
from benchmarks.gpu.context import is_lost, public
from benchmarks.shapes import Shape
from opd_kernels import divergences as D
from opd_kernels import targets

# a vocabulary that is no multiple of a vector, and one long enough for a cluster of blocks
SHAPES = (Shape(5, 1003, 24, 40), Shape(3, 40_000, 16, 24))
DRY_SHAPES = (Shape(3, 67, 8, 16),)
# rows of one block and of a cluster, several for each that is resident on a large GPU
MANY_ROWS = ((700, 8_000), (160, 40_000))
DRY_MANY_ROWS = ((5, 64),)
STATISTICS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl", "top1_agreement")
OPS = (
    "divergence",
    "many_rows",
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
# not for a sanitizer, under which it would take all the time
REAL_SIZE = "real_size"
FAILED = "FAILED"


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


def many_rows(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """The kernels that keep rows on chip, over more rows than there is room for at once."""
    is_first = shape in (SHAPES[0], DRY_SHAPES[0])
    if dtype != torch.float32 or not is_first:
        return
    for size in DRY_MANY_ROWS if shape == DRY_SHAPES[0] else MANY_ROWS:
        for name in ("forward_kl", "jsd", "renyi"):
            generator = dev.generator(0)
            pair = [torch.randn(size, generator=generator, device=dev.kind) for _ in range(2)]
            part_ours.row_call(name, backend, *pair)()


def real_size(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """What benchmarks time first: the row kernels on a chunk, and a step."""
    sizes = cases.DRY if shape in DRY_SHAPES else cases.REAL
    if dtype != torch.bfloat16 or shape not in (SHAPES[0], DRY_SHAPES[0]):
        return
    for name in cases.DIVERGENCES:
        ((student, teacher),) = part_ours.logits_pairs(dev, sizes, count=1)
        part_ours.row_call(name, backend, student, teacher)()
    inputs = cases.inputs_of(dev, sizes.shapes[0], sizes.dtype).with_head("trained")
    options = {"backend": backend, "workspace_bytes": sizes.workspace_bytes}
    cases.step(cases.loss_of("reverse_kl", **options), inputs)()


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
    pair = two_vocabularies.pair_of(dev, shape, dtype)
    student, teacher = two_vocabularies.logits_of(dev, pair)
    for pairs in (None, (pair.student_ids, pair.teacher_ids)):
        options = {"pairs": pairs, "pair_weight": 0.5 if pairs else 0.0, "backend": backend}
        opk.sorted_l1(student, teacher, **options).sum().backward()
        two_vocabularies.sorted_loss(**options)(*pair.inputs).backward()


def overlap_divergence(shape: Shape, dev: device.Device, backend: str, dtype: torch.dtype) -> None:
    """Every tail and one more cell; both reductions."""
    pair = two_vocabularies.pair_of(dev, shape, dtype)
    more = torch.zeros(shape.num_tokens, device=dev.kind)
    options = (
        {"tail": "bucket", "student_extra_logits": more, "teacher_extra_logits": more},
        {"tail": "renormalize_both", "divergence": "jsd"},
        {"tail": "renormalize_teacher", "divergence": "forward_kl", "reduction": "none"},
    )
    for option in options:
        loss = two_vocabularies.overlap_loss(pair, backend=backend, **option)
        loss(*pair.inputs).sum().backward()


def runs(op: str, backend: str, shape: Shape, dev: device.Device, dtype: torch.dtype) -> bool:
    """Whether one call of an op goes through; if not, a line says why.

    Raises:
        RuntimeError: nothing runs on the device any more.
    """
    try:
        globals()[op](shape, dev, backend, dtype)
        dev.synchronize()
        return True
    except Exception as error:
        traceback.print_exception(error)
        words = public(" ".join(f"{type(error).__name__}: {error}".split()))
        print(f"{FAILED} {op}, {shape}, {str(dtype).removeprefix('torch.')}: {words}", flush=True)
        if is_lost(error):
            raise RuntimeError(f"{op} lost the device") from error
        return False


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("ops", nargs="*", default=OPS)
    options = parser.parse_args()
    dev = device.of(options.dry_run)
    shapes = DRY_SHAPES if options.dry_run else SHAPES
    failed = 0
    for op in options.ops:
        for shape in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                failed += not runs(op, options.backend, shape, dev, dtype)
        print(f"ran {op}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
