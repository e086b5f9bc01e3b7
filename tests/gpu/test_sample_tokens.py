# SPDX-License-Identifier: Apache-2.0
"""sample_tokens on a GPU: draws in their cells at real sizes, hostile rows, bits, graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks.gpu import cases
from opd_kernels import _dispatch, reference
from tests.gpu.conftest import DRY_RUN

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# how far float32 terms may move a border between cells
BORDER = 1e-5


def inputs(device, num_tokens: int, vocab_size: int, num_draws: int, dtype: torch.dtype):
    """Random logits, and uniforms with both ends of [0, 1) among them."""
    generator = device.generator(0)
    logits = torch.empty(num_tokens, vocab_size, dtype=dtype, device=device.kind)
    uniforms = torch.rand(
        num_tokens, num_draws, generator=generator, device=device.kind, dtype=torch.float64
    )
    uniforms[:, 0], uniforms[:, -1] = 0.0, 1.0 - 2.0**-53
    return logits.normal_(generator=generator).mul_(3.0), uniforms


def same(one, two) -> bool:
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, two, strict=True)
    )


def check_cells(out, logits: Tensor, uniforms: Tensor, tau: float) -> None:
    """Each draw within its token's cell of the proposal in float64, weighted by its count."""
    law, proposal = (logits.double().div(t).log_softmax(-1) for t in (1.0, tau))
    ends = proposal.exp().cumsum(-1)
    is_token = out.ids >= 0
    ids = out.ids.long().clamp(min=0)
    ratio = (law.gather(1, ids) - proposal.gather(1, ids)).exp()
    counts = (out.weights.double() / ratio * uniforms.shape[1]).where(is_token, 0.0)
    torch.testing.assert_close(counts, counts.round(), rtol=1e-3, atol=1e-3)
    upto = counts.round().long().cumsum(1)
    assert bool((upto[:, -1] == uniforms.shape[1]).all())
    ordered = uniforms.sort(1).values
    last = ordered.gather(1, upto.clamp(min=1) - 1)
    first = ordered.gather(1, (upto - counts.round().long()).clamp(max=ordered.shape[1] - 1))
    assert bool((last <= ends.gather(1, ids) + BORDER)[is_token].all())
    begins = ends - proposal.exp()
    assert bool((first >= begins.gather(1, ids) - BORDER)[is_token].all())
    torch.testing.assert_close(
        out.logprobs.double()[is_token], law.gather(1, ids)[is_token], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("num_draws", [1, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_tokens_of_rows(device, sizes, backend, dtype, num_draws):
    num_tokens, vocab_size = sizes.row
    for tau in (1.0, 1.3):
        logits, uniforms = inputs(device, num_tokens, vocab_size + 3, num_draws, dtype)
        out = opk.sample_tokens(
            logits, uniforms, proposal_temperature=tau, vocab_size=vocab_size, backend=backend
        )
        check_cells(out, logits[:, :vocab_size], uniforms, tau)


def test_sample_tokens_of_few_rows_and_of_many(device, sizes, backend):
    """What blocks of a GPU share a row depends on how many there are; the results do not."""
    logits, uniforms = inputs(device, 16 * sizes.row[0], sizes.row[1], 50, torch.float32)
    many = opk.sample_tokens(logits, uniforms, backend=backend)
    one = opk.sample_tokens(logits[:1], uniforms[:1], backend=backend)
    assert same([value[:1] for value in many], one)
    assert same(opk.sample_tokens(logits, uniforms, backend=backend), many)


def test_sample_tokens_of_hostile_rows(device, backend):
    logits = torch.zeros(6, 20_001, device=device.kind)
    logits[1:4] = -torch.inf
    logits[1, 777], logits[2, [0, -1]] = 3.0, 1.0
    logits[4, 19_000], logits[5, 5] = torch.nan, torch.inf
    _, uniforms = inputs(device, 6, 1, 9, torch.float32)
    out = opk.sample_tokens(logits, uniforms, backend=backend)
    truth = reference.sample_tokens(logits, uniforms)
    assert torch.equal(out.ids[1:], truth.ids[1:])
    for name in ("weights", "logprobs", "lse"):
        mine, exact = getattr(out, name).double()[1:], getattr(truth, name)[1:]
        torch.testing.assert_close(mine, exact, equal_nan=True, rtol=1e-6, atol=1e-6)
    check_cells(type(out)(*(value[:1] for value in out)), logits[:1], uniforms[:1], 1.0)


def test_sample_tokens_beyond_32_bit_offsets(device, sizes, backend):
    num_tokens, vocab_size, *_ = sizes.large
    assert DRY_RUN or num_tokens * vocab_size > 1 << 31
    logits, uniforms = inputs(device, num_tokens, vocab_size, 20, torch.bfloat16)
    out = opk.sample_tokens(logits, uniforms, backend=backend)
    edge = min((1 << 31) // vocab_size, num_tokens - 2)
    rows = [0, edge - 1, edge, edge + 1, num_tokens - 1]
    some = type(out)(*(value[rows] for value in out))
    check_cells(some, logits[rows], uniforms[rows], 1.0)


def test_fused_linear_sample_tokens_at_real_size(device, sizes, backend, poisoned):
    given = cases.inputs_of(device, sizes.fused, torch.bfloat16)
    hidden, head = given.teacher_hidden, given.teacher_lm_head_weight
    _, uniforms = inputs(device, len(hidden), 1, 50, torch.float32)
    options = {"workspace_bytes": sizes.workspace_bytes, "backend": backend}
    out = opk.fused_linear_sample_tokens(hidden, head, uniforms, **options)
    assert same(opk.fused_linear_sample_tokens(hidden, head, uniforms, **options), out)
    step = max(len(hidden) // 16, 1)
    logits = hidden[::step].double() @ head.double().t()
    some = type(out)(*(value[::step] for value in out))
    torch.testing.assert_close(some.lse.double(), logits.logsumexp(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.weights.sum(1), torch.ones_like(out.lse))


def test_sample_tokens_in_a_graph_without_a_host_sync(device, sizes, backend):
    logits, uniforms = inputs(device, *sizes.row, 64, torch.float32)
    out: dict[str, tuple] = {}

    def run() -> None:
        out["values"] = opk.sample_tokens(logits, uniforms, backend=backend)

    run()
    with device.no_host_sync():
        run()
    replay = device.capture(run)
    logits.mul_(-1.0)
    replay()
    device.synchronize()
    captured = [value.clone() for value in out["values"]]
    run()
    device.synchronize()
    assert same(captured, out["values"])


def test_sample_tokens_opcheck_on_the_device(device, backend):
    logits, uniforms = inputs(device, 3, 20, 4, torch.float32)
    op = _dispatch.row_ops(backend).sample_tokens_fwd.default
    torch.library.opcheck(op, (logits, uniforms, None, None, [1.0, 0.0, 1.0], 18, 1.2))
