# SPDX-License-Identifier: Apache-2.0
"""topk_logprobs and fused_linear_topk on a GPU: truth at real sizes, hostile rows, bits, graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks.gpu import cases
from opd_kernels import _dispatch, reference
from tests.gpu.conftest import DRY_RUN, logits_of
from tests.tolerance import assert_within_eager
from tests.topk import check_ids, check_topk_logprobs, eager_topk_logprobs, hostile_rows

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = ("logprobs", "lse", "tail_logprob", "entropy")


def random_logits(device, num_tokens: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(num_tokens, vocab_size, dtype=dtype, device=device.kind)
    return values.normal_(generator=device.generator(0)).mul_(3.0)


def same(one, two) -> bool:
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("num_topk", [1, 64, 600, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_logprobs_of_rows(device, sizes, backend, dtype, num_topk):
    num_tokens, vocab_size = sizes.row
    logits = random_logits(device, num_tokens, vocab_size + 3, dtype)
    ids = torch.arange(2 * num_tokens, device=device.kind).reshape(-1, 2) * 61 % vocab_size - 1
    check_topk_logprobs(
        lambda *arguments, **keywords: opk.topk_logprobs(*arguments, backend=backend, **keywords),
        logits,
        min(num_topk, vocab_size),
        f"{backend} K={num_topk}",
        token_ids=ids,
        vocab_size=vocab_size,
    )


@pytest.mark.parametrize("num_topk", [64, 600])
def test_topk_logprobs_of_hostile_rows(device, backend, num_topk):
    rows = {name: row.to(device.kind) for name, row in hostile_rows(20_000).items()}
    for name, row in rows.items():
        got = opk.topk_logprobs(row, num_topk, backend=backend)
        truth = reference.topk_logprobs(row, num_topk)
        assert torch.equal(got.ids, truth.ids), name
        for field in FIELDS:
            mine, exact = getattr(got, field).double(), getattr(truth, field)
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5, msg=f"{name} {field}")


def test_topk_logprobs_beyond_32_bit_offsets(device, sizes, backend):
    num_tokens, vocab_size, *_ = sizes.large
    assert DRY_RUN or num_tokens * vocab_size > 1 << 31
    logits = random_logits(device, num_tokens, vocab_size, torch.bfloat16)
    got = opk.topk_logprobs(logits, 64, backend=backend)
    edge = min((1 << 31) // vocab_size, num_tokens - 2)
    rows = [0, edge - 1, edge, edge + 1, num_tokens - 1]
    truth = reference.topk_logprobs(logits[rows], 64)
    assert torch.equal(got.ids[rows], truth.ids)
    for field in FIELDS:
        mine, exact = getattr(got, field)[rows].double(), getattr(truth, field)
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_topk", [64, 600])
def test_topk_logprobs_of_many_runs_are_equal_to_the_bit(device, sizes, backend, num_topk):
    logits = random_logits(device, 8 * sizes.row[0], sizes.row[1], torch.bfloat16)
    num_topk = min(num_topk, sizes.row[1])
    first = opk.topk_logprobs(logits, num_topk, backend=backend)[:5]
    for _ in range(10):
        assert same(opk.topk_logprobs(logits, num_topk, backend=backend)[:5], first)


def test_topk_logprobs_writes_every_output(device, sizes, backend, poisoned):
    logits = random_logits(device, *sizes.row, torch.float32)
    ids = torch.zeros(sizes.row[0], 3, dtype=torch.long, device=device.kind)
    out = opk.topk_logprobs(logits, 70, token_ids=ids, backend=backend)
    assert all(bool(values.isfinite().all()) for values in out)


@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float32], ids=str)
def test_fused_linear_topk_at_real_size(device, sizes, backend, operands):
    inputs = cases.inputs_of(device, sizes.of_operands(operands), operands)
    hidden, head = inputs.teacher_hidden, inputs.teacher_lm_head_weight
    options = {"num_topk": 64, "workspace_bytes": sizes.workspace_bytes, "backend": backend}
    out = opk.fused_linear_topk(hidden, head, **options)
    assert same(opk.fused_linear_topk(hidden, head, **options)[:5], out[:5])
    step = max(len(hidden) // 16, 1)
    exact, logits = (
        logits_of(device, hidden[::step], head, dtype) for dtype in (torch.float64, torch.float32)
    )
    truth, baseline = reference.topk_logprobs(exact, 64), eager_topk_logprobs(logits, 64)
    check_ids(out, "fused")
    for field in FIELDS:
        got = getattr(out, field)[::step]
        assert_within_eager(got, baseline[field], getattr(truth, field), f"{backend} {field}")


def test_topk_logprobs_in_a_graph_without_a_host_sync(device, sizes, backend):
    logits = random_logits(device, *sizes.row, torch.float32)
    out: dict[str, tuple] = {}

    def run() -> None:
        out["values"] = opk.topk_logprobs(logits, 64, backend=backend)[:5]

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


def test_topk_logprobs_opcheck_on_the_device(device, backend):
    logits = torch.randn(3, 20, generator=device.generator(0), device=device.kind)
    ids = torch.arange(6, device=device.kind).reshape(3, 2)
    law = (None, None, [1.0, 0.0, 1.0], 18)
    op = _dispatch.row_ops(backend).topk_logprobs_fwd.default
    torch.library.opcheck(op, (logits, ids, *law, 5))
