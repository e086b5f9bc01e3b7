# SPDX-License-Identifier: Apache-2.0
"""speculative_verify on a GPU: truth at real sizes, bits, graphs, and the law of what comes out."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from benchmarks.gpu import verification
from opd_kernels import _dispatch
from tests.gpu.conftest import DRY_RUN
from tests.row_kernels.speculative_verify import rows_of, truth_of
from tests.verification import same
from tests.verification_laws import (
    EXACT_MODES,
    NUM_SAMPLES,
    PAIRS,
    check_calls,
    check_laws,
    even_work,
    of_each,
)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("cut", [(0, 1.0), (50, 1.0), (0, 0.95), (20_000, 0.9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_at_real_size(device, sizes, backend, dtype, cut):
    num_rows, vocab_size = sizes.row
    generator = device.generator(0)
    logits = torch.randn(num_rows, vocab_size + 3, generator=generator, device=device.kind)
    logits = (3.0 * logits).to(dtype)
    # a flat row, whose every tile is read
    logits[1] *= 0.01
    ids = torch.arange(num_rows, device=device.kind) * 61 % vocab_size
    got = rows_of(_dispatch.row_ops(backend), logits, ids, vocab_size, cut)
    truth = truth_of(logits[:, :vocab_size].double(), ids, cut)
    for name, mine, exact in zip(
        ("lse", "floor", "logprobs", "ranks", "argmax", "largest"), got, truth, strict=True
    ):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["rejection", "block", "topk"])
def test_many_runs_and_a_graph_are_equal_to_the_bit_without_a_host_sync(
    device, sizes, backend, mode
):
    drafts = verification.drafts_of(device, sizes.fused, torch.bfloat16, 8, 8)
    run = verification.ours(drafts, mode, backend, top_k=100, top_p=0.95)
    first = run()
    with device.no_host_sync():
        second = run()
    same(second, first)
    out: dict[str, tuple] = {}
    replay = device.capture(lambda: out.update(verdict=run()))
    replay()
    device.synchronize()
    same(out["verdict"], first)


def test_from_logits_and_from_hidden_states_agree(device, sizes, backend):
    drafts = verification.drafts_of(device, sizes.fused, torch.bfloat16, 8, 8)
    logits = verification.logits_of(device, drafts)
    fused = verification.ours(drafts, "rejection", backend)()
    same(verification.ours_from_logits(drafts, logits, backend)(), fused, rtol=1e-5, atol=1e-5)
    truth = opk.speculative_verify(
        drafts.draft_token_ids, *logits, uniforms=drafts.uniforms, backend="reference"
    )
    # a coin or a place may fall within rounding of a border, which is rare
    assert (fused.num_accepted != truth.num_accepted).sum() <= 1


@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("pair", (*PAIRS, "equal"))
def test_what_comes_out_has_the_law_of_the_teacher(device, backend, pair, mode):
    counts = even_work(500) if DRY_RUN else of_each(NUM_SAMPLES)
    check_laws(backend, pair, mode, counts, device=device.kind)


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_what_comes_out_of_few_sequences_is_what_comes_out_of_many(device, backend, mode):
    check_calls(backend, "random", mode, {2: 36} if DRY_RUN else of_each(36), device.kind)
