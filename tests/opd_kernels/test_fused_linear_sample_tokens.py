# SPDX-License-Identifier: Apache-2.0
"""opk.fused_linear_sample_tokens on CPU: truth, chunks, bent heads, memory, compile, errors."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests.cases import BF16, F16, F32, F64, FusedCase
from tests.checks import dtype_id, leaf
from tests.memory import peak_bytes
from tests.opd_kernels.test_fused_linear_topk import bent_tensors, inputs_of
from tests.opd_kernels.test_sample_tokens import uniforms_of
from tests.options import LAW_OPTIONS, law_options_of

SMALL = FusedCase("small", 23, 301, 16, 8)


@pytest.mark.parametrize("budget", [1 << 30, 20_000])
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_fused_linear_sample_tokens_matches_reference(option, budget):
    # float64: in less, rounding moves the borders of the cells that uniforms fall into
    hidden, head, bias, down, up = bent_tensors(SMALL, F64)
    keywords = {
        "bias": bias,
        "lora": (down, up, 0.6),
        "vocab_size": 290,
        "proposal_temperature": 1.3,
        **law_options_of(option, SMALL.num_tokens),
    }
    uniforms = uniforms_of(SMALL.num_tokens, 12)
    got = opk.fused_linear_sample_tokens(hidden, head, uniforms, workspace_bytes=budget, **keywords)
    truth = reference.fused_linear_sample_tokens(hidden, head, uniforms, **keywords)
    assert torch.equal(got.ids, truth.ids)
    for one, two in zip(got[1:], truth[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
def test_fused_linear_sample_tokens_scores_what_it_draws(dtype):
    hidden, head, *_ = inputs_of(SMALL, dtype)
    uniforms = uniforms_of(SMALL.num_tokens, 12)
    got = opk.fused_linear_sample_tokens(hidden, head, uniforms, workspace_bytes=20_000)
    assert got.weights.dtype == got.logprobs.dtype == F32
    scored = opk.fused_linear_topk(hidden, head, num_topk=1, token_ids=got.ids)
    torch.testing.assert_close(got.logprobs, scored.token_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.weights.sum(1), torch.ones(SMALL.num_tokens))
    exact = opk.fused_linear_sample_tokens(hidden.double(), head.double(), uniforms)
    assert (got.ids == exact.ids).all(1).float().mean() > 0.8


def test_fused_linear_sample_tokens_of_no_tokens_and_without_gradient():
    hidden, head = torch.empty(0, 8), leaf(torch.randn(30, 8))
    out = opk.fused_linear_sample_tokens(hidden, head, torch.empty(0, 4))
    assert [x.shape for x in out] == [(0, 4), (0, 4), (0, 4), (0,)]
    hidden = leaf(torch.randn(5, 8))
    for backend in ("cpu", "reference"):
        out = opk.fused_linear_sample_tokens(hidden, head, torch.rand(5, 3), backend=backend)
        assert not any(values.requires_grad for values in out)


def test_fused_linear_sample_tokens_is_deterministic_across_threads():
    hidden, head, *_ = inputs_of(FusedCase("threads", 40, 3000, 32, 8), F32)
    results = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        results.append(opk.fused_linear_sample_tokens(hidden, head, uniforms_of(40, 20)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_fused_linear_sample_tokens_stays_within_its_workspace():
    hidden, head, *_ = inputs_of(FusedCase("memory", 512, 4000, 64, 8), F32)
    budget, uniforms = 1 << 20, torch.rand(512, 32, dtype=F64)

    def step():
        opk.fused_linear_sample_tokens(hidden, head, uniforms, workspace_bytes=budget)

    step()
    peak = peak_bytes(step)
    assert peak <= budget + 1.1 * 512 * (32 * 12 + 16) + (64 << 10), f"{peak} bytes"


def test_fused_linear_sample_tokens_compiles_without_a_graph_break():
    hidden, head, bias, down, up = bent_tensors(SMALL, F32)
    uniforms = uniforms_of(SMALL.num_tokens, 4)
    options = law_options_of("law_everything", SMALL.num_tokens)

    def call(hidden, head, bias, down, up):
        out = opk.fused_linear_sample_tokens(
            hidden * 1.5, head, uniforms, bias=bias, lora=(down, up, 0.5), **options
        )
        return out.ids * 2, out.weights, out.logprobs, out.lse

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = (hidden, head, bias, down, up)
    for one, two in zip(compiled(*tensors), call(*tensors), strict=True):
        assert torch.equal(one, two)


def test_fused_linear_sample_tokens_opcheck_and_explain():
    hidden, head, bias, down, up = bent_tensors(SMALL, F32)
    uniforms = uniforms_of(SMALL.num_tokens, 4)
    law = (bias, torch.linspace(0.5, 2, SMALL.num_tokens), [0.5, 9.0, 1.0], 301)
    for low_rank in ((down, up), (None, None)):
        torch.library.opcheck(
            torch.ops.opd.fused_linear_sample_tokens_fwd,
            (hidden, head, *low_rank, uniforms, *law, 1.4, 1 << 20, "cpu"),
        )
    text = opk.explain("fused_linear_sample_tokens", hidden, head, uniforms)
    assert "cuda: cannot run (the tensors are on cpu" in text and "path A" in text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lm_head_weight": torch.zeros(8, 20)}, ValueError, r"must have shape \(vocab_size, 8\)"),
        ({"uniforms": torch.zeros(3, 2)}, ValueError, "uniforms must have 4 rows"),
        ({"uniforms": torch.ones(4, 2)}, RuntimeError, r"uniforms must be in \[0, 1\), got 1"),
        ({"proposal_temperature": -1}, ValueError, "proposal_temperature must be positive"),
        ({"workspace_bytes": 1}, ValueError, "workspace_bytes must be at least .* got 1"),
        ({"bias": torch.zeros(19)}, ValueError, "bias must have one value per token"),
        ({"lora": torch.zeros(2, 8)}, TypeError, r": lora must be \(A, B, scaling\)"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "the tensors are on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_fused_linear_sample_tokens_rejects_in_words(changes, error, message):
    arguments = {
        "hidden": torch.randn(4, 8),
        "lm_head_weight": torch.randn(20, 8),
        "uniforms": torch.zeros(4, 2),
        **changes,
    }
    tensors = [arguments.pop(name) for name in ("hidden", "lm_head_weight", "uniforms")]
    with pytest.raises(error, match=message):
        opk.fused_linear_sample_tokens(*tensors, **arguments)
