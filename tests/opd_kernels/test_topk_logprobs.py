# SPDX-License-Identifier: Apache-2.0
"""opk.topk_logprobs on the CPU kernel: truth, ties, tails, hostile rows, compile, errors."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests.cases import BF16, CASES, F16, F32, F64, INF, NAN, logits_of
from tests.checks import dtype_id, leaf
from tests.options import LAW_OPTIONS, law_options_of
from tests.topk import check_topk_logprobs, hostile_rows, tail_rows

DTYPES = (F64, F32, BF16, F16)
RELEVANT = [
    case
    for case in CASES
    if case.weights is None and not isinstance(case.temperature, tuple) and case.law != "equal"
]
EVERY = [
    pytest.param(
        case, dtype, id=f"{case.name}-{dtype_id(dtype)}", marks=[pytest.mark.slow] * case.slow
    )
    for case in RELEVANT
    for dtype in case.dtypes
]


def ids_of(num_tokens: int, vocab_size: int, columns: int = 3) -> torch.Tensor:
    """[T, columns] ids with a -1 among them."""
    generator = torch.Generator().manual_seed(num_tokens + vocab_size)
    ids = torch.randint(vocab_size, (num_tokens, columns), generator=generator)
    ids[:, -1:][1::2] = -1
    return ids


def on_cpu(*arguments, **keywords):
    return opk.topk_logprobs(*arguments, backend="cpu", **keywords)


def same(one, two) -> bool:
    """All outputs bit by bit, a NaN being one."""
    return all(
        (a is None and b is None) or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_topk_logprobs_matches_reference(case, dtype):
    logits = logits_of(case, dtype)
    keywords = {"temperature": logits.temperature, "vocab_size": logits.vocab_size}
    for num_topk in sorted({1, min(5, case.vocab_size), min(130, case.vocab_size)}):
        check_topk_logprobs(
            on_cpu,
            logits.student,
            num_topk,
            f"cpu {case.name} {dtype_id(dtype)} K={num_topk}",
            token_ids=ids_of(case.num_tokens, case.vocab_size),
            **keywords,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_topk_logprobs_with_options_matches_reference(option, dtype):
    logits = torch.randn(6, 701) * 4
    logits[2, 5:9] = -INF
    check_topk_logprobs(
        on_cpu,
        logits.to(dtype),
        20,
        f"cpu {option} {dtype_id(dtype)}",
        token_ids=ids_of(6, 690),
        vocab_size=690,
        **law_options_of(option, 6),
    )


def test_topk_logprobs_by_hand():
    out = opk.topk_logprobs(torch.tensor([[0.0, 2.0, -INF, 2.0, 1.0]]), 2)
    lse = math.log(1 + 2 * math.exp(2) + math.e)
    assert out.ids.tolist() == [[1, 3]]
    assert out.logprobs[0].tolist() == pytest.approx([2 - lse] * 2, rel=1e-6)
    assert out.lse.item() == pytest.approx(lse, rel=1e-6)
    assert out.tail_logprob.item() == pytest.approx(math.log(1 + math.e) - lse, rel=1e-6)
    entropy = lse - (4 * math.exp(2) + math.e) / math.exp(lse)
    assert out.entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert out.token_logprobs is None


def test_topk_logprobs_of_a_negative_scale_takes_the_smallest_logits():
    logits = torch.randn(3, 50)
    out = opk.topk_logprobs(logits, 4, logit_scale=-2.0)
    assert torch.equal(out.ids, opk.topk_logprobs(-2 * logits, 4).ids)


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("num_topk", [1, 5, 64, 700])
def test_topk_logprobs_of_equal_logits_takes_the_smaller_ids(num_topk, dtype):
    generator = torch.Generator().manual_seed(num_topk)
    # few values: every threshold is a tie, over blocks as well as inside of them
    logits = torch.randint(-3, 3, (20, 1500), generator=generator).to(dtype)
    # a few are compared all with all: half a register, whole ones, as many as that takes, one more
    for vocab_size in (8, 64, 250, 256, 257, 1500):
        size = min(num_topk, vocab_size)
        here = logits[:, :vocab_size]
        expected = reference.topk_logprobs(here, size)
        assert torch.equal(on_cpu(here, size).ids, expected.ids)


def test_topk_logprobs_takes_signed_zeros_for_equal():
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert opk.topk_logprobs(logits, 4).ids.tolist() == [[0, 1, 2, 3]]
    assert opk.topk_logprobs(logits.double(), 3).ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("name", hostile_rows(20))
@pytest.mark.parametrize("num_topk", [1, 64, 4096])
def test_topk_logprobs_of_hostile_rows(name, num_topk):
    logits = hostile_rows(20_000)[name]
    got, truth = on_cpu(logits, num_topk), reference.topk_logprobs(logits, num_topk)
    assert torch.equal(got.ids, truth.ids)
    for field in ("logprobs", "lse", "tail_logprob", "entropy"):
        mine, exact = getattr(got, field).double(), getattr(truth, field)
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


def test_topk_logprobs_at_every_place_of_a_block():
    # a single best token at the ends of blocks and lanes of a row that ends in neither
    for vocab_size in (15, 16, 17, 511, 512, 513, 1030):
        for place in {0, 14, vocab_size // 2, vocab_size - 2, vocab_size - 1}:
            logits = torch.zeros(1, vocab_size)
            logits[0, place] = 1.0
            assert on_cpu(logits, 1).ids.item() == place


# -- what is left out ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
def test_topk_logprobs_tail_is_right_from_1e_12_to_almost_1(dtype):
    logits = tail_rows(dtype)
    got, truth = on_cpu(logits, 1), reference.topk_logprobs(logits.double(), 1)
    assert truth.tail_logprob[0].exp() == pytest.approx(1e-12, rel=1e-3)
    relative = (got.tail_logprob.double() - truth.tail_logprob).abs()
    assert relative.max() <= (1e-12 if dtype == F64 else 2e-6)


@pytest.mark.parametrize("gap", [27.0, 80.0, 200.0, 3e4])
def test_topk_logprobs_tail_next_to_a_certain_token(gap):
    # e^-200 is no float32, its logarithm is
    logits = torch.full((1, 1000), -gap)
    logits[0, 700] = 0.0
    out = on_cpu(logits, 1)
    assert out.tail_logprob.item() == pytest.approx(math.log(999) - gap, rel=1e-6)
    assert out.logprobs.item() <= 0.0


def test_topk_logprobs_tail_of_a_mass_of_almost_one():
    # 1 - 1e-12 of the mass is outside; its logarithm is -1e-12
    logits = torch.zeros(1, 4000, dtype=F64)
    logits[0, 1:] = math.log((1e12 - 1) / 3999)
    out = on_cpu(-logits, 3999)
    truth = reference.topk_logprobs(-logits, 3999)
    assert out.tail_logprob.item() == pytest.approx(truth.tail_logprob.item(), rel=1e-9)
    one = on_cpu(logits, 1)
    assert one.tail_logprob.item() == pytest.approx(math.log1p(-1 / 3999), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_topk_logprobs_of_the_whole_vocabulary_leaves_nothing(dtype):
    logits = torch.randn(3, 700).to(dtype)
    out = on_cpu(logits, 700)
    assert out.tail_logprob.tolist() == [-INF] * 3
    torch.testing.assert_close(out.logprobs.exp().sum(1), torch.ones(3, dtype=out.lse.dtype))
    assert torch.equal(out.ids.sort(1).values, torch.arange(700).int().expand(3, -1))


def test_topk_logprobs_masses_add_up_to_one():
    logits = torch.randn(8, 5000, dtype=F64) * 3
    for num_topk in (1, 7, 300, 4096):
        out = on_cpu(logits, num_topk)
        mass = out.logprobs.exp().sum(1) + out.tail_logprob.exp()
        torch.testing.assert_close(mass, torch.ones(8, dtype=F64), rtol=1e-13, atol=0)


def test_topk_logprobs_pads_where_fewer_tokens_are_possible():
    logits = torch.full((2, 600), -INF)
    logits[0, [590, 5]] = torch.tensor([1.0, 0.0])
    logits[1, 3] = -4.0
    out = on_cpu(logits, 3)
    assert out.ids.tolist() == [[590, 5, -1], [3, -1, -1]]
    assert out.logprobs[0, 2].item() == -INF and out.logprobs[1].tolist() == [0.0, -INF, -INF]
    assert out.tail_logprob.tolist() == [-INF, -INF]
    assert out.entropy[1].item() == 0.0


# -- rows without a law --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("place", [0, 7, 699])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_topk_logprobs_of_a_bad_row_is_nan_and_its_neighbours_are_not(bad, place, dtype):
    logits, ids = torch.randn(3, 700).to(dtype), torch.tensor([[1, -1]] * 3)
    expected = on_cpu(logits, 5, token_ids=ids)
    broken = logits.clone()
    broken[1, place] = bad
    out = on_cpu(broken, 5, token_ids=ids)
    assert out.ids[1].tolist() == [-1] * 5
    for values in out[1:]:
        assert bool(values[1].isnan().all())
    for got, whole in zip(out, expected, strict=True):
        assert torch.equal(got[::2], whole[::2])


def test_topk_logprobs_of_a_row_without_a_token():
    logits = torch.full((1, 40), -INF)
    out = on_cpu(logits, 2, token_ids=torch.tensor([3]))
    assert out.ids.tolist() == [[-1, -1]] and out.lse.item() == -INF
    assert all(
        bool(values.isnan().all())
        for values in (out.logprobs, out.tail_logprob, out.entropy, out.token_logprobs)
    )
    truth = reference.topk_logprobs(logits, 2, token_ids=torch.tensor([3]))
    assert same(out, [value if i == 0 else value.float() for i, value in enumerate(truth)])


def test_topk_logprobs_softcap_makes_infinities_finite():
    logits = torch.tensor([[0.0, INF, -INF]])
    out = on_cpu(logits, 3, softcap=3.0)
    assert out.ids.tolist() == [[1, 0, 2]]
    assert bool(out.logprobs.isfinite().all())


# -- ids, layouts, types -------------------------------------------------------------------------


def test_topk_logprobs_scores_ids_in_their_own_shape():
    logits, ids = torch.randn(4, 90), ids_of(4, 90, 6)
    every = torch.log_softmax(logits, -1)
    table = on_cpu(logits, 3, token_ids=ids).token_logprobs
    expected = every.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -INF)
    torch.testing.assert_close(table, expected)
    column = on_cpu(logits, 3, token_ids=ids[:, 0].int()).token_logprobs
    assert column.shape == (4,) and torch.equal(column, table[:, 0])
    assert on_cpu(logits, 3, token_ids=ids[:, :0]).token_logprobs.shape == (4, 0)
    assert torch.equal(on_cpu(logits, 3, token_ids=ids.t().contiguous().t())[5], table)
    many = torch.arange(4096).expand(4, -1) % 90
    assert torch.equal(
        on_cpu(logits, 3, token_ids=many).token_logprobs[:, :90],
        on_cpu(logits, 3, token_ids=many[:, :90]).token_logprobs,
    )


def test_topk_logprobs_agrees_with_token_logprobs():
    logits = torch.randn(6, 2000) * 5
    ids = torch.randint(2000, (6,))
    one = on_cpu(logits, 9, token_ids=ids, temperature=0.7)
    two = opk.token_logprobs(logits, ids, temperature=0.7)
    torch.testing.assert_close(one.token_logprobs, two.logprobs)
    torch.testing.assert_close(one.lse, two.lse)
    torch.testing.assert_close(one.entropy, two.entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_topk_logprobs_of_no_tokens(dtype):
    out = on_cpu(torch.empty(0, 9, dtype=dtype), 4, token_ids=torch.empty(0, 2).long())
    assert [x.shape for x in out] == [(0, 4), (0, 4), (0,), (0,), (0,), (0, 2)]


def test_topk_logprobs_reads_any_strides():
    logits = torch.randn(6, 600)
    expected = on_cpu(logits, 8)
    assert same(on_cpu(logits.t().contiguous().t(), 8), expected)
    wide = torch.full((6, 900), NAN)
    wide[:, :600] = logits
    assert same(on_cpu(wide[:, :600], 8), expected)
    assert same(on_cpu(wide, 8, vocab_size=600), expected)
    repeated = on_cpu(logits[:1].expand(6, -1), 8)
    assert torch.equal(repeated.ids, expected.ids[:1].expand(6, -1))


def test_topk_logprobs_has_no_gradient_and_takes_what_requires_one():
    logits = leaf(torch.randn(3, 20))
    out = opk.topk_logprobs(logits * 2, 4, token_ids=torch.tensor([1, 2, 3]))
    assert not any(values.requires_grad for values in out)
    for values in opk.topk_logprobs(logits, 4, backend="reference")[:5]:
        assert not values.requires_grad


def test_topk_logprobs_rows_are_calls_of_their_own():
    logits, ids = torch.randn(7, 3001) * 4, ids_of(7, 3001)
    whole = on_cpu(logits, 33, token_ids=ids)
    for t in range(7):
        alone = on_cpu(logits[t : t + 1], 33, token_ids=ids[t : t + 1])
        assert all(torch.equal(one[t], two[0]) for one, two in zip(whole, alone, strict=True))


def test_topk_logprobs_is_deterministic_across_threads_and_runs():
    logits = torch.randn(37, 3001)
    results = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        results.append(on_cpu(logits, 50, token_ids=ids_of(37, 3001)))
    assert all(same(results[0], other) for other in results[1:])


def test_topk_logprobs_compiles_without_a_graph_break():
    ids, options = ids_of(5, 60), law_options_of("law_everything", 5)

    def call(logits):
        out = opk.topk_logprobs(logits * 1.5, 7, token_ids=ids, **options)
        return out.ids + 1, out.logprobs.sum() + out.tail_logprob.sum(), out.token_logprobs

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    logits = torch.randn(5, 60)
    for one, two in zip(compiled(logits), call(logits), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no_ids"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_topk_logprobs_opcheck(dtype, with_ids):
    real = torch.promote_types(dtype, F32)
    law = (torch.randn(18, dtype=real), torch.ones(3, dtype=real) * 1.5, [0.5, 9.0, 1.0], 18)
    ids = ids_of(3, 18) if with_ids else None
    torch.library.opcheck(
        torch.ops.opd.topk_logprobs_fwd, (torch.randn(3, 20, dtype=dtype), ids, *law, 4)
    )


# -- refusals ------------------------------------------------------------------------------------


def _call(**changes):
    arguments = {"logits": torch.randn(4, 20), "num_topk": 3, **changes}
    return opk.topk_logprobs(arguments.pop("logits"), arguments.pop("num_topk"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(20)}, ValueError, "logits must have 2 dim"),
        ({"logits": torch.zeros(4, 20).int()}, TypeError, "logits must be float32, .*int32"),
        ({"num_topk": 0}, ValueError, r"num_topk must be in \[1, 20\] .* got 0"),
        ({"num_topk": 21}, ValueError, r"num_topk must be in \[1, 20\] for a vocab.* 20, got 21"),
        (
            {"logits": torch.zeros(1, 5000), "num_topk": 4097},
            ValueError,
            r"num_topk must be in \[1, 4096\] .* 5000, got 4097",
        ),
        ({"num_topk": 5, "vocab_size": 4}, ValueError, r"num_topk must be in \[1, 4\]"),
        ({"num_topk": 2.0}, TypeError, "num_topk must be an int, got float"),
        ({"num_topk": True}, TypeError, "num_topk must be an int, got bool"),
        ({"token_ids": torch.zeros(5).long()}, ValueError, "token_ids must have 4 rows"),
        ({"token_ids": torch.zeros(4)}, TypeError, "token_ids must be int64 or int32"),
        (
            {"token_ids": torch.zeros(4, 4097).long()},
            ValueError,
            "token_ids must have at most 4096 columns, got 4097",
        ),
        ({"token_ids": [0, 0, 0, 0]}, TypeError, "token_ids must be a tensor, got list"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and not 0, got 0.0"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must be in \[1, 20\], got 21"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "backend 'cuda' was requested but"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_topk_logprobs_rejects_in_words(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        _call(**changes)
    assert str(raised.value).startswith("topk_logprobs: ")


@pytest.mark.parametrize("bad", [20, 1 << 40])
def test_topk_logprobs_rejects_an_id_beyond_the_vocabulary(bad):
    ids = torch.tensor([[0, -1], [3, bad], [1, 2], [0, 0]])
    with pytest.raises(
        RuntimeError, match=rf"token_ids must be below 20, got {bad} at position \(1, 1\)"
    ):
        _call(token_ids=ids)


def test_topk_logprobs_row_op_refuses_what_python_checks():
    logits, law = torch.randn(2, 9), (None, None, [1.0, 0.0, 1.0], 9)
    for num_topk in (0, -1, 10, 4097):
        with pytest.raises(RuntimeError, match="num_topk must be in"):
            torch.ops.opd.topk_logprobs_fwd(logits, None, *law, num_topk)
    with pytest.raises(RuntimeError, match="tables of ids"):
        torch.ops.opd.topk_logprobs_fwd(logits, torch.zeros(3, 1).long(), *law, 2)
