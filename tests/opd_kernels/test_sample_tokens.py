# SPDX-License-Identifier: Apache-2.0
"""opk.sample_tokens on the CPU kernel: truth, unbiasedness, edges of the law, compile, errors."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import BF16, CASES, F16, F32, F64, INF, NAN, logits_of
from tests.checks import dtype_id, leaf
from tests.options import LAW_OPTIONS, law_options_of

DTYPES = (F64, F32, BF16, F16)
CHOSEN = (
    "one_token one_word two_words odd_both strided_rows padded_both_odd temperature_half peaked "
    "minus_inf_student unrelated_12.0 scale_2.0_gap_1.0 scale_30.0_gap_1.0 vocab_32000 vocab_151936"
)
RELEVANT = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype_id(dtype)}")
    for case in CASES
    if case.name in CHOSEN.split()
    for dtype in case.dtypes
]


def on_cpu(*arguments, **keywords):
    return opk.sample_tokens(*arguments, backend="cpu", **keywords)


def uniforms_of(num_tokens: int, num_draws: int) -> torch.Tensor:
    """0 and almost 1 among them; the last place before 1 has a test of its own."""
    generator = torch.Generator().manual_seed(num_draws)
    uniforms = torch.rand(num_tokens, num_draws, generator=generator, dtype=F64)
    uniforms[:, 0] = 0.0
    uniforms[:, -1] = 1.0 - 1e-6
    return uniforms


def check(logits: torch.Tensor, num_draws: int, what: str, **keywords) -> None:
    """Against the reference. Float32 sums move the borders of the cells: there by their edges."""
    uniforms = uniforms_of(logits.shape[0], num_draws)
    got = on_cpu(logits, uniforms, **keywords)
    truth = reference.sample_tokens(logits.double(), uniforms, **keywords)
    torch.testing.assert_close(got.lse.double(), truth.lse, rtol=2e-6, atol=2e-6, msg=what)
    real = torch.promote_types(logits.dtype, F32)
    assert got.weights.dtype == got.logprobs.dtype == real and got.ids.dtype == torch.int32
    if logits.dtype == F64:
        assert torch.equal(got.ids, truth.ids), what
        torch.testing.assert_close(got.weights, truth.weights, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.logprobs, truth.logprobs, rtol=1e-11, atol=1e-11)
        return
    p, r = laws(logits, **keywords)
    upto = torch.nn.functional.pad(r.exp().cumsum(1), (1, 0))
    for t in range(len(logits)):
        ids = got.ids[t][got.ids[t] >= 0].long()
        counts = got.weights[t, : len(ids)].double() / (p - r)[t, ids].exp() * num_draws
        torch.testing.assert_close(counts, counts.round(), rtol=1e-4, atol=1e-4)
        assert int(counts.round().sum()) == num_draws, what
        torch.testing.assert_close(
            got.logprobs[t, : len(ids)].double(), p[t, ids], rtol=2e-5, atol=2e-5
        )
        position, ordered = 0, uniforms[t].sort().values
        for token, count in zip(ids.tolist(), counts.round().int().tolist(), strict=True):
            inside = ordered[position : position + count]
            position += count
            assert upto[t, token] - 2e-6 <= inside[0], f"{what}: {t} {token}"
            assert inside[-1] <= upto[t, token + 1] + 2e-6, f"{what}: {t} {token}"


def laws(
    logits: torch.Tensor,
    *,
    proposal_temperature: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the law and of the proposal, float64."""
    nowhere = torch.zeros(len(logits), dtype=torch.bool)
    z = eager._scaled(logits, softcap, logit_scale, temperature, nowhere, F64, vocab_size)
    return z.log_softmax(-1), (z / proposal_temperature).log_softmax(-1)


@pytest.mark.parametrize(("case", "dtype"), RELEVANT)
def test_sample_tokens_matches_reference(case, dtype):
    logits = logits_of(case, dtype).first(3)
    keywords = {"vocab_size": logits.vocab_size, "temperature": logits.temperature}
    check(logits.student, 20, f"{case.name} {dtype}", **keywords)
    check(logits.student, 7, f"{case.name} {dtype}", proposal_temperature=1.6, **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_sample_tokens_with_options_matches_reference(option, dtype):
    logits = torch.randn(6, 701) * 4
    logits[2, 5:9] = -INF
    options = law_options_of(option, 6)
    check(logits.to(dtype), 33, option, vocab_size=690, proposal_temperature=0.8, **options)


def test_sample_tokens_by_hand():
    # cells of [0, 1): id 1 to 1/4, id 2 to 1/2, id 4 from there
    logits = torch.tensor([[-INF, 1.0, 1.0, -INF, 2.0]]).exp().log()
    logits[0, 4] = 1.0 + math.log(2)
    uniforms = torch.tensor([[0.0, 0.24, 0.26, 0.9, 0.51, 0.99]])
    out = opk.sample_tokens(logits, uniforms)
    assert out.ids.tolist() == [[1, 2, 4, -1, -1, -1]]
    assert out.weights[0].tolist() == pytest.approx([2 / 6, 1 / 6, 3 / 6, 0, 0, 0])
    assert out.logprobs[0, :3].tolist() == pytest.approx([math.log(0.25)] * 2 + [math.log(0.5)])
    assert out.logprobs[0, 3:].tolist() == [-INF] * 3


def test_sample_tokens_weights_without_another_proposal_are_shares():
    out = opk.sample_tokens(torch.randn(4, 3000) * 3, uniforms_of(4, 50))
    assert bool(((out.weights * 50).round() == out.weights * 50).all())
    torch.testing.assert_close(out.weights.sum(1), torch.ones(4))


@pytest.mark.parametrize("tau", [0.7, 1.0, 1.4, 3.0])
def test_sample_tokens_weights_are_the_law_on_average(tau):
    # uniforms in strata: their mean over draws is an integral, not an estimate of one
    logits = torch.randn(1, 40, dtype=F64, generator=torch.Generator().manual_seed(1)) * 2
    strata = 400_000
    uniforms = (torch.arange(strata, dtype=F64) + 0.5) / strata
    uniforms = uniforms.view(-1, 1000)[:, torch.randperm(1000)]
    out = opk.sample_tokens(logits.expand(len(uniforms), -1), uniforms, proposal_temperature=tau)
    mean = torch.zeros(41, dtype=F64).index_add(
        0, (out.ids.long() % 41).flatten(), out.weights.flatten()
    )[:40] / len(uniforms)
    law = logits.softmax(-1)[0]
    ratio = (logits[0] / 1).log_softmax(0) - (logits[0] / tau).log_softmax(0)
    # a cell's share is off by less than two strata
    assert bool(((mean - law).abs() <= 2 / strata * ratio.exp() + 1e-12).all())


def test_sample_tokens_never_draws_what_has_no_mass():
    logits = torch.full((2, 1500), -INF)
    logits[:, [3, 700, 1400]] = 0.0
    for uniforms in (torch.zeros(2, 5), torch.full((2, 5), 1 - 2**-24), torch.rand(2, 4096)):
        out = on_cpu(logits, uniforms)
        assert set(out.ids.unique().tolist()) <= {-1, 3, 700, 1400}
    last = on_cpu(logits, torch.full((2, 1), 1 - 2**-53, dtype=F64))
    assert last.ids.tolist() == [[1400], [1400]]
    assert on_cpu(logits, torch.zeros(2, 1)).ids.tolist() == [[3], [3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sample_tokens_at_the_ends_of_proposal_temperatures(dtype):
    logits = torch.tensor([[0.0, -INF, 1.0, -3.0]], dtype=dtype).repeat(1, 300)
    cold = on_cpu(logits, uniforms_of(1, 9), proposal_temperature=1e-30)
    assert set(cold.ids[0].tolist()) - {-1} <= set(range(2, 1200, 4))
    # a flat proposal: every possible token alike
    hot = on_cpu(logits, uniforms_of(1, 9), proposal_temperature=1e30)
    found = hot.ids[0][hot.ids[0] >= 0].long()
    p = logits.double().log_softmax(-1)[0, found]
    torch.testing.assert_close(hot.weights[0, : len(found)].double(), p.exp() * 900 / 9)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sample_tokens_of_a_bad_row_is_nan_and_its_neighbours_are_not(bad, dtype):
    logits, uniforms = torch.randn(3, 700).to(dtype), uniforms_of(3, 6)
    expected = on_cpu(logits, uniforms)
    broken = logits.clone()
    broken[1, 600] = bad
    out = on_cpu(broken, uniforms)
    assert out.ids[1].tolist() == [-1] * 6
    assert all(bool(values[1].isnan().all()) for values in out[1:])
    assert all(torch.equal(a[::2], b[::2]) for a, b in zip(out, expected, strict=True))
    nothing = on_cpu(torch.full((1, 9), -INF, dtype=dtype), uniforms[:1])
    assert nothing.ids.unique().tolist() == [-1] and nothing.lse.item() == -INF
    assert bool(nothing.weights.isnan().all()) and bool(nothing.logprobs.isnan().all())


def test_sample_tokens_of_one_certain_token():
    out = on_cpu(torch.tensor([[-200.0, 0.0, -300.0]]), uniforms_of(1, 9))
    assert out.ids[0, :2].tolist() == [1, -1] and out.weights[0, 0] == 1
    assert on_cpu(torch.zeros(2, 1), uniforms_of(2, 3)).ids.tolist() == [[0, -1, -1]] * 2


def test_sample_tokens_of_no_tokens():
    out = on_cpu(torch.empty(0, 5), torch.empty(0, 3))
    assert [x.shape for x in out] == [(0, 3), (0, 3), (0, 3), (0,)]


def test_sample_tokens_reads_any_strides_and_has_no_gradient():
    logits, uniforms = torch.randn(6, 600), uniforms_of(6, 8)
    expected = on_cpu(logits, uniforms)
    wide = torch.full((6, 900), NAN)
    wide[:, :600] = logits
    for got in (
        on_cpu(logits.t().contiguous().t(), uniforms),
        on_cpu(wide[:, :600], uniforms.t().contiguous().t()),
        on_cpu(wide, uniforms, vocab_size=600),
        on_cpu(leaf(logits), uniforms.flip(1)),
        on_cpu(logits, uniforms.flip(0).flip(0)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert not any(values.requires_grad for values in got)


def test_sample_tokens_is_deterministic_across_threads_and_rows():
    logits, uniforms = torch.randn(37, 3001), uniforms_of(37, 20)
    results = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        results.append(on_cpu(logits, uniforms, proposal_temperature=1.3))
    alone = [
        on_cpu(logits[t : t + 1], uniforms[t : t + 1], proposal_temperature=1.3) for t in (0, 36)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for t, one in zip((0, 36), alone, strict=True):
        assert all(torch.equal(a[t], b[0]) for a, b in zip(results[0], one, strict=True))


def test_sample_tokens_compiles_without_a_graph_break():
    uniforms, options = uniforms_of(5, 9), law_options_of("law_everything", 5)

    def call(logits):
        out = opk.sample_tokens(logits * 1.5, uniforms, proposal_temperature=2.0, **options)
        return out.ids + 1, out.weights, out.logprobs, out.lse

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    logits = torch.randn(5, 60)
    assert all(torch.equal(a, b) for a, b in zip(compiled(logits), call(logits), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sample_tokens_opcheck(dtype):
    real = torch.promote_types(dtype, F32)
    law = (torch.randn(18, dtype=real), torch.ones(3, dtype=real) * 1.5, [0.5, 9.0, 1.0], 18)
    torch.library.opcheck(
        torch.ops.opd.sample_tokens_fwd,
        (torch.randn(3, 20, dtype=dtype), uniforms_of(3, 4), *law, 1.2),
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(20)}, ValueError, "logits must have 2 dim"),
        ({"uniforms": torch.zeros(4)}, ValueError, "uniforms must have 2 dim"),
        ({"uniforms": torch.zeros(3, 2)}, ValueError, "uniforms must have 4 rows"),
        ({"uniforms": torch.zeros(4, 0)}, ValueError, "uniforms must have 1 to 4096 columns"),
        ({"uniforms": torch.zeros(4, 4097)}, ValueError, "1 to 4096 columns.*got 4097"),
        ({"uniforms": torch.zeros(4, 2).half()}, TypeError, "uniforms must be float32 or float64"),
        ({"uniforms": torch.ones(4, 2)}, RuntimeError, r"uniforms must be in \[0, 1\), got 1 at"),
        ({"uniforms": torch.full((4, 2), NAN)}, RuntimeError, r"must be in \[0, 1\), got nan"),
        ({"uniforms": torch.full((4, 2), -1e-9)}, RuntimeError, r"must be in \[0, 1\), got -1e-09"),
        ({"proposal_temperature": 0.0}, ValueError, "proposal_temperature must be positive"),
        ({"proposal_temperature": 1e-31}, ValueError, r"must be in \[1e-30, 1e30\], got 1e-31"),
        ({"proposal_temperature": torch.ones(4)}, TypeError, "proposal_temperature must be a num"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must be in \[1, 20\], got 21"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "the tensors are on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_sample_tokens_rejects_in_words(changes, error, message):
    arguments = {"logits": torch.randn(4, 20), "uniforms": torch.zeros(4, 2), **changes}
    with pytest.raises(error, match=message) as raised:
        opk.sample_tokens(arguments.pop("logits"), arguments.pop("uniforms"), **arguments)
    assert str(raised.value).startswith("sample_tokens: ")
