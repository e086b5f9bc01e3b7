# SPDX-License-Identifier: Apache-2.0
"""How it runs on a GPU: beyond 2^31 elements, bit for bit again, captured, without a host sync."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks.gpu import cases
from benchmarks.gpu.part_ours import row_kernel
from opd_kernels import _dispatch, _laws, reference
from opd_kernels.token_logprobs import pack_law
from tests import eager
from tests.cases import spec
from tests.checks import laws_of, leaf
from tests.gpu.conftest import DRY_RUN, check_replay
from tests.tolerance import assert_within_eager

pytestmark = pytest.mark.cuda


def sampled_rows(num_tokens: int, vocab_size: int) -> list[int]:
    """The first, the last, and those on either side of element 2^31."""
    edge = min((1 << 31) // vocab_size, num_tokens - 2)
    return sorted({0, edge - 1, edge, edge + 1, num_tokens - 1})


def test_divergence_beyond_32_bit_offsets(device, sizes, backend):
    num_tokens, vocab_size, *_ = sizes.large
    assert DRY_RUN or num_tokens * vocab_size > 1 << 31
    generator = device.generator(0)

    def logits() -> Tensor:
        values = torch.empty(num_tokens, vocab_size, dtype=torch.bfloat16, device=device.kind)
        return values.normal_(generator=generator).mul_(2.0)

    student, teacher = logits().requires_grad_(), logits()
    loss = opk.divergence(student, teacher, divergence="reverse_kl", backend=backend)
    loss.sum().backward()
    rows = sampled_rows(num_tokens, vocab_size)

    def by(function, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own = student.detach()[rows].to(dtype).requires_grad_()
        value = function(own, teacher[rows], divergence=spec("reverse_kl"))
        value.sum().backward()
        return value.detach(), own.grad

    actual = loss.detach()[rows], student.grad[rows]
    baseline, truth = by(eager.divergence, torch.bfloat16), by(reference.divergence, torch.float64)
    for what, got, eager_value, exact in zip(("loss", "dZ"), actual, baseline, truth, strict=True):
        assert_within_eager(got, eager_value, exact, f"{backend} {what}")


def test_fused_linear_divergence_beyond_32_bit_offsets_in_one_chunk(device, sizes, backend):
    shape = sizes.large
    inputs = cases.inputs_of(device, shape, torch.bfloat16).with_head("trained")
    whole = cases.whole_chunk_bytes(shape)
    found = []
    for workspace_bytes in (whole, sizes.workspace_bytes):
        cut = cases.cut_of(inputs, workspace_bytes, backend)
        assert (cut.chunk == shape.num_tokens) == (workspace_bytes == whole)
        loss = cases.loss_of("forward_kl", backend=backend, workspace_bytes=workspace_bytes)
        cases.step(loss, inputs)()
        found.append([tensor.grad.double() for tensor in inputs[:2]])
        device.free()
    # cut or not, the same gradients but for the order of sums
    for one, many in zip(*found, strict=True):
        assert (one - many).norm() <= 1e-2 * many.norm() > 0


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_two_runs_are_equal_to_the_bit(device, sizes, backend, name):
    inputs = cases.inputs_of(device, sizes.fused, torch.bfloat16).with_head("trained")
    loss = cases.loss_of(name, backend=backend, workspace_bytes=sizes.workspace_bytes)
    found = []
    for _ in range(2):
        cases.step(loss, inputs)()
        found.append([loss(*inputs).detach(), *(tensor.grad for tensor in inputs[:2])])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second) and bool(first.isfinite().all())


def test_opcheck_on_the_device(device, backend):
    """Schemas, fakes and autograd of the row ops, as each backend registers them."""
    generator = device.generator(0)
    student, teacher = (
        torch.randn(3, 20, generator=generator, device=device.kind) for _ in range(2)
    )
    laws = laws_of(student, 18, divergence="jsd")
    ops = _dispatch.row_ops(backend)
    torch.library.opcheck(ops.divergence_fwd.default, (leaf(student), teacher, None, *laws, True))
    kernel, arguments = row_kernel("jsd", backend, student.clone(), teacher)
    torch.library.opcheck(kernel.default, arguments)
    ids = torch.arange(3, device=device.kind)
    law = token_law(student, 18)
    torch.library.opcheck(ops.token_logprobs_fwd.default, (leaf(student), ids, *law))


def token_law(logits: Tensor, vocab_size: int) -> tuple:
    """The packed law of one model's logits."""
    return pack_law(
        _laws.rows_of("token_logprobs", logits),
        vocab_size,
        temperature=1.0,
        softcap=None,
        logit_scale=1.0,
    )


def test_graph_replays_with_other_inputs(device, sizes, backend):
    inputs = cases.inputs_of(device, sizes.fused, torch.bfloat16).with_head("trained")
    loss = cases.loss_of("jsd", backend=backend, workspace_bytes=sizes.workspace_bytes)
    out: dict[str, Tensor] = {}

    def run() -> None:
        value = loss(*inputs)
        gradients = torch.autograd.grad(value, inputs[:2])
        out.update(loss=value.detach(), hidden=gradients[0], weight=gradients[1])

    replay = device.capture(run)
    other = cases.inputs_of(device, sizes.fused, torch.bfloat16, seed=1)
    with torch.no_grad():
        for static, fresh in zip(inputs, other, strict=True):
            static.copy_(fresh)
    check_replay(device, replay, run, out)


@pytest.mark.parametrize("head", cases.HEADS)
def test_no_host_sync(device, sizes, backend, head):
    inputs = cases.inputs_of(device, sizes.fused, torch.bfloat16).with_head(head)
    loss = cases.loss_of("reverse_kl", backend=backend, workspace_bytes=sizes.workspace_bytes)
    run = cases.step(loss, inputs)
    run()
    with device.no_host_sync():
        run()
    assert bool(inputs[0].grad.isfinite().all())


@pytest.mark.parametrize("head", cases.HEADS)
def test_peak_memory_is_workspace_and_gradients(device, sizes, backend, head):
    inputs = cases.inputs_of(device, sizes.fused, torch.bfloat16).with_head(head)
    loss = cases.loss_of("jsd", backend=backend, workspace_bytes=sizes.workspace_bytes)
    run = cases.step(loss, inputs)
    run()
    for tensor in inputs:
        tensor.grad = None
    peak = device.peak_bytes(run)
    allowed = sizes.workspace_bytes + cases.gradient_bytes(sizes.fused, head)
    assert 0 < peak <= 1.05 * allowed, f"{peak / 2**20:.1f} MiB of {allowed / 2**20:.1f} MiB"
