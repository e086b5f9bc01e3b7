# SPDX-License-Identifier: Apache-2.0
"""The CUDA sample_tokens kernels under emulation, by the public, fused and raw op."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from tests.cases import BF16, F64, INF, NAN
from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.sample_tokens import *  # noqa: F403

pytestmark = [needs_kernels("sample_tokens"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA


def cuda_sample_tokens(*args, **keywords):
    return opk.sample_tokens(*args, backend="cuda", **keywords)


def same(one, two) -> bool:
    """All outputs bit by bit, a NaN being one."""
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("seed", ["0", "3", "11"])
def test_cuda_sample_tokens_do_not_depend_on_the_order_of_threads_or_draws(seed, monkeypatch):
    logits, uniforms = torch.randn(2, 2500), torch.rand(2, 70, dtype=F64)
    expected = cuda_sample_tokens(logits, uniforms, proposal_temperature=1.4)
    monkeypatch.setenv("OPD_EMULATION_SEED", seed)
    shuffled = uniforms[:, torch.randperm(70)]
    assert same(cuda_sample_tokens(logits, shuffled, proposal_temperature=1.4), expected)


def test_cuda_sample_tokens_agree_with_token_logprobs():
    logits = torch.randn(3, 2500).mul(3).to(BF16)
    out = cuda_sample_tokens(logits, torch.rand(3, 4, dtype=F64), temperature=0.7)
    ids = out.ids[:, 0].long()
    scored = opk.token_logprobs(logits, ids, temperature=0.7, backend="cuda")
    torch.testing.assert_close(out.logprobs[:, 0], scored.logprobs)
    torch.testing.assert_close(out.lse, scored.lse)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_cuda_sample_tokens_leave_the_neighbours_of_a_bad_row_alone(bad):
    logits, uniforms = torch.randn(3, 700), torch.rand(3, 6, dtype=F64)
    expected = cuda_sample_tokens(logits, uniforms)
    logits[1, 600] = bad
    out = cuda_sample_tokens(logits, uniforms)
    assert out.ids[1].tolist() == [-1] * 6 and bool(out.lse[1].isnan())
    assert same([value[::2] for value in out], [value[::2] for value in expected])


def test_cuda_sample_tokens_weights_are_the_law_on_average():
    # uniforms in strata: their mean over draws is an integral, not an estimate of one
    logits, strata = torch.randn(1, 40) * 2, 40_000
    uniforms = ((torch.arange(strata, dtype=F64) + 0.5) / strata).view(-1, 1000)
    uniforms = uniforms[:, torch.randperm(1000)]
    for tau in (0.7, 1.4):
        out = cuda_sample_tokens(
            logits.expand(len(uniforms), -1), uniforms, proposal_temperature=tau
        )
        mean = torch.zeros(41, dtype=F64).index_add(
            0, (out.ids.long() % 41).flatten(), out.weights.double().flatten()
        )[:40] / len(uniforms)
        law, proposal = ((logits[0].double() / t).softmax(0) for t in (1.0, tau))
        # a cell's share is off by less than two strata, and by what float32 terms move its borders
        allowed = (2 / strata + 2e-6) * law / proposal
        assert bool(((mean - law).abs() <= allowed).all())


def test_cuda_sample_tokens_compile_without_a_graph_break():
    uniforms = torch.rand(2, 5, dtype=F64)

    def call(logits):
        out = cuda_sample_tokens(logits * 1.5, uniforms)
        return out.ids + 1, out.weights, out.logprobs, out.lse

    torch._dynamo.reset()
    logits = torch.randn(2, 40)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert same(compiled(logits), call(logits))


def test_cuda_sample_tokens_of_no_tokens_and_of_float64():
    out = cuda_sample_tokens(torch.empty(0, 9), torch.empty(0, 4))
    assert [x.shape for x in out] == [(0, 4), (0, 4), (0, 4), (0,)]
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the CUDA"):
        cuda_sample_tokens(torch.randn(2, 5, dtype=F64), torch.rand(2, 2))
