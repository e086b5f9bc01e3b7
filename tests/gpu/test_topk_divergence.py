# SPDX-License-Identifier: Apache-2.0
"""Sparse teachers on a GPU: rows and gradients at real sizes against float64, graphs, no sync."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import cases, sparse_teacher
from opd_kernels import _dispatch, _gemms
from opd_kernels.token_logprobs import Law
from tests import topk_rows
from tests.gpu.conftest import check_replay, logits_of
from tests.tolerance import assert_within_eager

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned")]


def law_of(vocab_size: int, softcap: float = 0.0) -> Law:
    return Law(None, None, [1.0, softcap, 1.0], vocab_size)


def check_rows(ops, logits: Tensor, ids: Tensor, law: Law, grad_rest: Tensor, what: str) -> None:
    """Forward and backward of some rows of a larger call, which `logits` and `ids` are."""
    rows = sorted({0, len(ids) // 2, len(ids) - 1})
    found = ops.topk_divergence_fwd(logits, ids, *law)
    exact, eager = (
        topk_rows.forward(logits[rows], ids[rows], law, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    names = topk_rows.Rows._fields
    for name, got, baseline, truth in zip(names, found, eager, exact, strict=True):
        assert_within_eager(got[rows].float(), baseline, truth, f"{what} {name}")
    grad_ids = torch.linspace(-1, 1, ids.shape[1], device=ids.device).expand(ids.shape).contiguous()
    got = ops.topk_divergence_bwd(logits, ids, grad_ids, grad_rest, found[2], *law)[rows]
    some = (logits[rows], ids[rows], grad_ids[rows], grad_rest[rows], exact.lse, law)
    truth = topk_rows.backward(*some, torch.float64)
    baseline = topk_rows.backward(*some, torch.float32)
    assert_within_eager(got, baseline.to(got.dtype), truth, f"{what} gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ids", [1, 64, 300])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_rows_match_float64(device, sizes, backend, num_ids, softcap, dtype):
    num_tokens, vocab_size = sizes.row
    logits = torch.randn(*sizes.row, generator=device.generator(0), device=device.kind).to(dtype)
    ids = topk_rows.ids_of(num_tokens, vocab_size, num_ids, 1).to(device.kind)
    rest = torch.linspace(-1, 1, num_tokens, device=device.kind)
    ops = _dispatch.row_ops(backend)
    check_rows(ops, 4.0 * logits, ids, law_of(vocab_size, softcap), rest, f"{backend} {num_ids}")


def test_rows_beyond_32_bit_offsets(device, sizes, backend):
    num_tokens, vocab_size, *_ = sizes.large
    logits = torch.empty(num_tokens, vocab_size, dtype=torch.bfloat16, device=device.kind)
    logits.normal_(generator=device.generator(0))
    ids = sparse_teacher.teacher_of(device, num_tokens, vocab_size).teacher_ids.long()
    rest = torch.linspace(-1, 1, num_tokens, device=device.kind)
    check_rows(_dispatch.row_ops(backend), logits, ids, law_of(vocab_size), rest, backend)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_the_gradient_in_place_is_the_gradient(device, sizes, backend, softcap):
    num_tokens, vocab_size = sizes.row
    logits = torch.randn(*sizes.row, generator=device.generator(0), device=device.kind)
    ids = topk_rows.ids_of(num_tokens, vocab_size, 64, 1).to(device.kind)
    law, ops = law_of(vocab_size, softcap), _dispatch.row_ops(backend)
    lse = ops.topk_divergence_fwd(logits, ids, *law)[2]
    grads = torch.ones(ids.shape, device=device.kind), torch.ones(num_tokens, device=device.kind)
    arguments = (ids, *grads, lse, *law)
    expected = ops.topk_divergence_bwd(logits, *arguments)
    own = logits.clone()
    ops.topk_divergence_bwd_(own, *arguments, -1)
    assert torch.equal(own, expected)
    if device.kind == "cpu":
        return  # whose GEMMs take float32
    for number, dtype in ((2, torch.bfloat16), (3, torch.float16)):
        own = logits.clone()
        ops.topk_divergence_bwd_(own, *arguments, number)
        assert torch.equal(own.view(dtype)[:, :vocab_size], expected.to(dtype))


def gradients_by_slices(
    device, inputs: cases.Inputs, teacher: sparse_teacher.SparseTeacher, dtype, step: int
) -> list[Tensor]:
    """[loss, dX, dW] of the bucket's forward_kl in `dtype`, a slice of tokens at a time."""
    own_head = inputs.student_lm_head_weight.detach()
    head = own_head.to(dtype)
    losses, grad_hidden, grad_head = [], [], torch.zeros_like(head)
    for begin in range(0, inputs.student_hidden.shape[0], step):
        rows = slice(begin, begin + step)
        hidden = inputs.student_hidden.detach()[rows]
        logits = logits_of(device, hidden, own_head, dtype).requires_grad_()
        ids, p = teacher.teacher_ids[rows].long(), teacher.teacher_logprobs[rows].double()
        rest = torch.log(-torch.expm1(p.logsumexp(1)))
        p = torch.cat([p, rest[:, None]], 1).to(dtype)
        logq = logits.log_softmax(1)
        tail = logq.scatter(1, ids, -math.inf).logsumexp(1)
        q = torch.cat([logq.gather(1, ids), tail[:, None]], 1)
        loss = (p.exp() * (p - q)).sum(1)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        losses.append(loss.detach())
        grad_hidden.append(gradient @ head)
        grad_head.addmm_(gradient.t(), hidden.to(dtype))
    return [torch.cat(losses), torch.cat(grad_hidden), grad_head]


@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float32], ids=str)
def test_fused_linear_topk_divergence_at_real_size(device, sizes, backend, operands):
    shape = sizes.of_operands(operands)
    inputs = cases.inputs_of(device, shape, operands).with_head("trained")
    teacher = sparse_teacher.teacher_of(device, shape.num_tokens, shape.vocab_size)
    options = {"backend": backend, "workspace_bytes": sizes.workspace_bytes}
    with torch.no_grad():
        per_token = sparse_teacher.loss_of("forward_kl", teacher, reduction="none", **options)
        loss = per_token(*inputs)
    total = sparse_teacher.loss_of("forward_kl", teacher, **options)(*inputs)
    actual = [loss, *torch.autograd.grad(total, inputs[:2])]
    truth, baseline = (
        gradients_by_slices(device, inputs, teacher, dtype, sizes.slice_tokens)
        for dtype in (torch.float64, torch.float32)
    )
    for what, got, eager_value, exact in zip(
        ("loss", "dX", "dW"), actual, baseline, truth, strict=True
    ):
        assert_within_eager(got, eager_value.to(got.dtype), exact, f"{backend} sparse {what}")


def test_two_runs_are_equal_to_the_bit(device, sizes, backend):
    inputs = cases.inputs_of(device, sizes.fused, torch.bfloat16).with_head("trained")
    teacher = sparse_teacher.teacher_of(device, sizes.fused.num_tokens, sizes.fused.vocab_size)
    options = {"backend": backend, "workspace_bytes": sizes.workspace_bytes}
    loss = sparse_teacher.loss_of("reverse_kl", teacher, **options)
    found = []
    for _ in range(2):
        cases.step(loss, inputs)()
        found.append([loss(*inputs).detach(), *(tensor.grad for tensor in inputs[:2])])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second) and bool(first.isfinite().all())


def test_graph_replays_with_other_inputs(device, sizes, backend):
    inputs = cases.inputs_of(device, sizes.fused, torch.bfloat16).with_head("trained")
    teacher = sparse_teacher.teacher_of(device, sizes.fused.num_tokens, sizes.fused.vocab_size)
    options = {"backend": backend, "workspace_bytes": sizes.workspace_bytes}
    loss = sparse_teacher.loss_of("forward_kl", teacher, **options)
    out: dict[str, Tensor] = {}

    def run() -> None:
        value = loss(*inputs)
        gradients = torch.autograd.grad(value, inputs[:2])
        out.update(loss=value.detach(), hidden=gradients[0], weight=gradients[1])

    replay = device.capture(run)
    with torch.no_grad():
        inputs.student_hidden.mul_(0.5)
    check_replay(device, replay, run, out)


@pytest.mark.parametrize("head", cases.HEADS)
def test_no_host_sync(device, sizes, backend, head):
    inputs = cases.inputs_of(device, sizes.fused, torch.bfloat16).with_head(head)
    teacher = sparse_teacher.teacher_of(device, sizes.fused.num_tokens, sizes.fused.vocab_size)
    options = {"backend": backend, "workspace_bytes": sizes.workspace_bytes}
    run = cases.step(sparse_teacher.loss_of("reverse_kl", teacher, **options), inputs)
    run()
    with device.no_host_sync():
        run()
    assert bool(inputs[0].grad.isfinite().all())


def test_opcheck_on_the_device(device, backend):
    generator = device.generator(0)
    logits = torch.randn(3, 20, generator=generator, device=device.kind)
    ids = torch.tensor([[0, 17, -1], [4, 3, 2], [9, -1, 1]], device=device.kind)
    for kernel, arguments in sparse_teacher.row_kernels(
        backend, logits.clone(), ids, _gemms.AS_LOGITS
    ).values():
        torch.library.opcheck(kernel.default, arguments)
