# SPDX-License-Identifier: Apache-2.0
"""The Triton sample_tokens kernel under the interpreter, by the public, fused and raw op."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import BF16, F16, F32, F64, INF, NAN, FusedCase, fused_of
from tests.checks import dtype_id
from tests.options import LAW_OPTIONS, law_options_of

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


def triton_sample_tokens(*args, **keywords):
    return opk.sample_tokens(*args, backend="triton", **keywords)


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


def check(logits: torch.Tensor, num_draws: int, **keywords) -> None:
    uniforms = inner_uniforms(logits, num_draws, **keywords)
    got = triton_sample_tokens(logits, uniforms, **keywords)
    truth = reference.sample_tokens(logits.double(), uniforms, **keywords)
    assert got.ids.dtype == torch.int32 and torch.equal(got.ids, truth.ids)
    for name in ("weights", "logprobs", "lse"):
        mine, exact = getattr(got, name), getattr(truth, name)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("proposal_temperature", [1.0, 1.6])
def test_triton_sample_tokens_matches_reference(dtype, proposal_temperature):
    logits = torch.randn(2, 1500, generator=torch.Generator().manual_seed(2)) * 4
    logits[1, 40:1300] = -INF
    check(logits.to(dtype), 66 if dtype == F32 else 20, proposal_temperature=proposal_temperature)


@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_triton_sample_tokens_with_options_matches_reference(option):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(3)) * 6
    options = law_options_of(option, 3)
    check(logits, 20, vocab_size=290, proposal_temperature=0.8, **options)


def test_triton_sample_tokens_at_the_ends_of_the_law():
    logits = torch.full((2, 3000), -INF)
    logits[0, [7, 2000]] = 0.0
    logits[1, 1500] = 3.0
    uniforms = torch.tensor([[0.0, 1.0 - 2.0**-53, 0.4], [0.0, 1.0 - 2.0**-53, 0.4]]).double()
    uniforms[:, 1] = 1.0 - 2.0**-53
    out = triton_sample_tokens(logits, uniforms)
    assert out.ids.tolist() == [[7, 2000, -1], [1500, -1, -1]]
    torch.testing.assert_close(out.weights, torch.tensor([[2 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0]]))
    assert out.logprobs[1].tolist() == [0.0, -INF, -INF]


def test_triton_sample_tokens_of_a_row_without_a_law():
    logits = torch.randn(4, 50)
    logits[1, 3], logits[2, 9], logits[3] = NAN, INF, -INF
    uniforms = torch.rand(4, 5)
    out = triton_sample_tokens(logits, uniforms)
    assert out.ids[1:].tolist() == [[-1] * 5] * 3 and bool((out.ids[0] >= -1).all())
    assert bool(out.weights[1:].isnan().all()) and bool(out.logprobs[1:].isnan().all())
    assert out.lse.isnan().tolist() == [False, True, True, False] and out.lse[3].item() == -INF


def test_triton_sample_tokens_of_several_rows_in_one_program(monkeypatch):
    from opd_kernels.triton import sample_tokens as kernels

    logits, uniforms = torch.randn(5, 200), torch.rand(5, 9)
    expected = triton_sample_tokens(logits, uniforms)
    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", 2)
    for one, two in zip(triton_sample_tokens(logits, uniforms), expected, strict=True):
        assert torch.equal(one, two)
    assert triton_sample_tokens(logits[:0], uniforms[:0]).ids.shape == (0, 9)


def test_triton_sample_tokens_opcheck():
    law = (torch.randn(18), torch.tensor([1.5, 0.7]), [0.5, 9.0, 1.0], 18)
    op = torch.ops.opd_triton.sample_tokens_fwd
    torch.library.opcheck(op, (torch.randn(2, 20), torch.rand(2, 3).double(), *law, 1.3))


def test_triton_fused_linear_sample_tokens_is_that_of_the_cpu():
    inputs = fused_of(FusedCase("triton", 4, 101, 16, 8), F32)
    hidden, head = inputs.student_hidden, inputs.student_lm_head_weight
    uniforms = inner_uniforms(hidden @ head.t(), 6)
    one = opk.fused_linear_sample_tokens(hidden, head, uniforms, backend="triton")
    two = opk.fused_linear_sample_tokens(hidden, head, uniforms, backend="cpu")
    assert torch.equal(one.ids, two.ids)
    torch.testing.assert_close(one.weights, two.weights)
    torch.testing.assert_close(one.logprobs, two.logprobs)
