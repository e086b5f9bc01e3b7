# SPDX-License-Identifier: Apache-2.0
"""sample_tokens on a GPU backend, by the public, fused and raw op."""

from __future__ import annotations

import functools

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import BF16, F16, F32, F64, INF, NAN, FusedCase, fused_of
from tests.checks import dtype_id
from tests.options import LAW_OPTIONS, law_options_of


def on(gpu):
    """The op on this backend."""
    return functools.partial(opk.sample_tokens, backend=gpu.name)


def inner_uniforms(
    logits: torch.Tensor,
    num_draws: int,
    *,
    proposal_temperature: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Places that are not within 1e-5 of a border of a cell, where float32 sums may move it."""
    nowhere = torch.zeros(len(logits), dtype=torch.bool)
    z = eager._scaled(logits, softcap, logit_scale, temperature, nowhere, F64, vocab_size)
    upto = (z / proposal_temperature).softmax(-1).cumsum(-1)
    generator = torch.Generator().manual_seed(num_draws)
    uniforms = torch.rand(len(logits), 8 * num_draws, generator=generator, dtype=F64)
    apart = (uniforms[:, :, None] - upto[:, None, :]).abs().amin(-1) > 1e-5
    assert bool((apart.sum(1) >= num_draws).all())
    return torch.stack([row[keep][:num_draws] for row, keep in zip(uniforms, apart, strict=True)])


def check(gpu, logits: torch.Tensor, num_draws: int, **keywords) -> None:
    uniforms = inner_uniforms(logits, num_draws, **keywords)
    got = on(gpu)(logits, uniforms, **keywords)
    truth = reference.sample_tokens(logits.double(), uniforms, **keywords)
    assert got.ids.dtype == torch.int32 and torch.equal(got.ids, truth.ids)
    for name in ("weights", "logprobs", "lse"):
        mine, exact = getattr(got, name), getattr(truth, name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("proposal_temperature", [1.0, 1.6])
def test_sample_tokens_matches_reference(gpu, dtype, proposal_temperature):
    logits = torch.randn(2, 1500, generator=torch.Generator().manual_seed(2)) * 4
    logits[1, 40:1300] = -INF
    num_draws = 66 if dtype == F32 else 20
    check(gpu, logits.to(dtype), num_draws, proposal_temperature=proposal_temperature)


@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_sample_tokens_with_options_matches_reference(gpu, option):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(3)) * 6
    options = law_options_of(option, 3)
    check(gpu, logits, 20, vocab_size=290, proposal_temperature=0.8, **options)


def test_sample_tokens_at_the_ends_of_the_law(gpu):
    logits = torch.full((2, 3000), -INF)
    logits[0, [7, 2000]] = 0.0
    logits[1, 1500] = 3.0
    uniforms = torch.tensor([[0.0, 1.0 - 2.0**-53, 0.4]], dtype=F64).expand(2, 3)
    out = on(gpu)(logits, uniforms)
    assert out.ids.tolist() == [[7, 2000, -1], [1500, -1, -1]]
    torch.testing.assert_close(out.weights, torch.tensor([[2 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0]]))
    assert out.logprobs[1].tolist() == [0.0, -INF, -INF]


def test_sample_tokens_of_a_row_without_a_law(gpu):
    logits = torch.randn(4, 50)
    logits[1, 3], logits[2, 9], logits[3] = NAN, INF, -INF
    uniforms = torch.rand(4, 5)
    out = on(gpu)(logits, uniforms)
    assert out.ids[1:].tolist() == [[-1] * 5] * 3 and bool((out.ids[0] >= -1).all())
    assert bool(out.weights[1:].isnan().all()) and bool(out.logprobs[1:].isnan().all())
    assert out.lse.isnan().tolist() == [False, True, True, False] and out.lse[3].item() == -INF


def test_sample_tokens_opcheck(gpu):
    law = (torch.randn(18), torch.tensor([1.5, 0.7]), [0.5, 9.0, 1.0], 18)
    arguments = (torch.randn(2, 20), torch.rand(2, 3).double(), *law, 1.3)
    torch.library.opcheck(gpu.ops.sample_tokens_fwd, arguments)


def test_fused_linear_sample_tokens_is_that_of_the_cpu(gpu):
    inputs = fused_of(FusedCase(gpu.name, 4, 101, 16, 8), F32)
    hidden, head = inputs.student_hidden, inputs.student_lm_head_weight
    uniforms = inner_uniforms(hidden @ head.t(), 6)
    one = opk.fused_linear_sample_tokens(hidden, head, uniforms, backend=gpu.name)
    two = opk.fused_linear_sample_tokens(hidden, head, uniforms, backend="cpu")
    assert torch.equal(one.ids, two.ids)
    torch.testing.assert_close(one.weights, two.weights)
    torch.testing.assert_close(one.logprobs, two.logprobs)
