# SPDX-License-Identifier: Apache-2.0
"""opk.token_logprobs on the CPU kernel: truth, edges, autograd, compile, errors, determinism."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests import eager
from tests.cases import (
    BF16,
    CASES,
    F16,
    F32,
    F64,
    INF,
    NAN,
    Case,
    logits_of,
    token_ids_of,
)
from tests.checks import check_token_logprobs, dtype_id, leaf
from tests.options import LAW_OPTIONS, law_options_of

# weights and pairs of temperatures are the divergences' own
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


def finite_ids(case: Case, logits: torch.Tensor) -> torch.Tensor:
    """Ids whose logits are finite: eager torch has no finite entropy gradient to compare beyond."""
    ids = token_ids_of(case.num_tokens, case.vocab_size, case.seed)
    chosen = logits.gather(1, ids[:, None]).squeeze(1)
    return torch.where(chosen.isfinite(), ids, torch.zeros_like(ids))


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_token_logprobs_matches_reference(case, dtype):
    logits = logits_of(case, dtype)
    check_token_logprobs(
        lambda *args, **keywords: opk.token_logprobs(*args, backend="cpu", **keywords),
        eager.token_logprobs,
        reference.token_logprobs,
        [logits.student],
        finite_ids(case, logits.student),
        dtype,
        f"cpu {case.name} {dtype_id(dtype)}",
        temperature=logits.temperature,
        vocab_size=logits.vocab_size,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_token_logprobs_with_options_matches_reference(option, dtype):
    logits = torch.randn(6, 701) * 4
    logits[2, 5:9] = -INF
    check_token_logprobs(
        lambda *args, **keywords: opk.token_logprobs(*args, backend="cpu", **keywords),
        eager.token_logprobs,
        reference.token_logprobs,
        [logits.to(dtype)],
        token_ids_of(6, 690, 3),
        dtype,
        f"cpu {option} {dtype_id(dtype)}",
        vocab_size=690,
        **law_options_of(option, 6),
    )


@pytest.mark.parametrize("options", [{"temperature": 1.7}, law_options_of("law_everything", 4)])
@pytest.mark.parametrize("output", [0, 1, 2], ids=["logprobs", "lse", "entropy"])
def test_token_logprobs_gradcheck_float64(output, options):
    logits = leaf(torch.randn(4, 9, dtype=F64) * 2)
    ids = token_ids_of(4, 9, 1)
    assert torch.autograd.gradcheck(
        lambda z: opk.token_logprobs(z, ids, **options)[output],
        (logits,),
        eps=1e-6,
        atol=1e-8,
        rtol=1e-6,
    )


def test_token_logprobs_by_hand():
    out = opk.token_logprobs(torch.tensor([[0.0, 2.0, -INF]]), torch.tensor([1]), temperature=2.0)
    lse = math.log(1 + math.e)
    assert out.lse.item() == pytest.approx(lse, rel=1e-6)
    assert out.logprobs.item() == pytest.approx(1 - lse, rel=1e-6)
    assert out.entropy.item() == pytest.approx(lse - math.e / (1 + math.e), rel=1e-6)


def test_token_logprobs_of_a_capped_law_by_hand():
    # 2 * 5 tanh(1) / 0.5 against 0: the cap comes after the scale and before the temperature
    out = opk.token_logprobs(
        torch.tensor([[2.5, 0.0]]),
        torch.tensor([0]),
        logit_scale=2.0,
        softcap=5.0,
        temperature=torch.tensor([0.5]),
    )
    z = 10 * math.tanh(1)
    assert out.lse.item() == pytest.approx(math.log(math.exp(z) + 1), rel=1e-6)
    assert out.logprobs.item() == pytest.approx(-math.log1p(math.exp(-z)), rel=1e-5)


def test_token_logprobs_softcap_makes_minus_infinity_finite():
    logits = leaf(torch.tensor([[0.0, 1.0, -INF]]))
    out = opk.token_logprobs(logits, torch.tensor([2]), softcap=3.0)
    expected = reference.token_logprobs(logits, torch.tensor([2]), softcap=3.0)
    torch.testing.assert_close(out.logprobs, expected.logprobs.float())
    out.logprobs.backward()
    assert logits.grad[0, 2] == 0 and bool(logits.grad.isfinite().all())


def test_token_logprobs_rows_of_temperatures_are_calls_of_their_own():
    logits, ids = torch.randn(5, 40), token_ids_of(5, 40, 8)
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.7])
    out = opk.token_logprobs(logits, ids, temperature=temperature.double())
    for t in range(5):
        alone = opk.token_logprobs(
            logits[t : t + 1], ids[t : t + 1], temperature=temperature[t].item()
        )
        assert all(one[t] == two[0] for one, two in zip(out, alone, strict=True))


def test_token_logprobs_over_a_large_uniform_vocabulary():
    vocab_size = 151936
    out = opk.token_logprobs(torch.full((1, vocab_size), 7.0), torch.tensor([vocab_size - 1]))
    eps = torch.finfo(F32).eps
    assert out.logprobs.item() == pytest.approx(-math.log(vocab_size), rel=4 * eps)
    assert out.entropy.item() == pytest.approx(math.log(vocab_size), rel=4 * eps)
    assert out.lse.item() == pytest.approx(7 + math.log(vocab_size), rel=eps)


def test_token_logprobs_of_an_impossible_token():
    logits = leaf(torch.tensor([[0.0, 1.0, -INF]]))
    out = opk.token_logprobs(logits, torch.tensor([2]))
    assert out.logprobs.item() == -INF
    out.entropy.backward()
    assert logits.grad[0, 2] == 0
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_token_logprobs_of_no_tokens(dtype):
    logits = torch.empty(0, 5, dtype=dtype, requires_grad=True)
    out = opk.token_logprobs(logits, torch.empty(0, dtype=torch.int64))
    sum(x.sum() for x in out).backward()
    assert [x.shape for x in out] == [(0,)] * 3
    assert logits.grad.shape == (0, 5)


def test_token_logprobs_of_one_word():
    out = opk.token_logprobs(torch.tensor([[3.0], [-7.0]]), torch.tensor([0, 0]))
    assert out.logprobs.tolist() == [0.0, 0.0]
    assert out.entropy.tolist() == [0.0, 0.0]
    assert out.lse.tolist() == [3.0, -7.0]


def test_token_logprobs_nan_stays_in_its_row():
    logits = torch.randn(3, 50)
    logits[1, 7] = NAN
    out = opk.token_logprobs(logits, torch.tensor([0, 1, 2]))
    for values in out:
        assert values.isnan().tolist() == [False, True, False]


def test_token_logprobs_row_without_upstream_gradient_hides_nan():
    logits = torch.randn(3, 50)
    logits[1, 7] = NAN
    logits = leaf(logits)
    out = opk.token_logprobs(logits, torch.tensor([0, 1, 2]))
    weights = torch.tensor([1.0, 0.0, 2.0])
    torch.autograd.backward(out, [weights, weights, weights])
    assert bool((logits.grad[1] == 0).all())
    assert bool(logits.grad.isfinite().all())


def test_token_logprobs_outputs_are_differentiable_one_at_a_time():
    z = torch.randn(4, 30, dtype=F64)
    ids = token_ids_of(4, 30, 2)
    for name in ("logprobs", "lse", "entropy"):
        ours, theirs = leaf(z), leaf(z)
        getattr(opk.token_logprobs(ours, ids), name).sum().backward()
        getattr(reference.token_logprobs(theirs, ids), name).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_token_logprobs_backward_twice_gives_the_same_gradient():
    logits = leaf(torch.randn(3, 20))
    total = sum(x.sum() for x in opk.token_logprobs(logits, torch.tensor([0, 5, 19])))
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    (second,) = torch.autograd.grad(total, logits)
    assert torch.equal(first, second)


def test_token_logprobs_without_grad_is_a_plain_tensor():
    out = opk.token_logprobs(torch.randn(3, 20), torch.tensor([0, 5, 19]))
    assert not any(x.requires_grad for x in out)


def test_token_logprobs_int32_ids_and_column_major_logits():
    logits = torch.randn(6, 20)
    ids = token_ids_of(6, 20, 3)
    expected = opk.token_logprobs(logits, ids)
    for got in (
        opk.token_logprobs(logits, ids.int()),
        opk.token_logprobs(logits.t().contiguous().t(), ids),
        opk.token_logprobs(logits, torch.stack([ids, ids], 1)[:, 0]),
    ):
        assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_token_logprobs_is_deterministic_across_threads_and_runs():
    z, ids = torch.randn(37, 3001), token_ids_of(37, 3001, 4)
    results = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        logits = leaf(z)
        out = opk.token_logprobs(logits, ids)
        sum(x.sum() for x in out).backward()
        results.append((*(x.detach() for x in out), logits.grad))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_token_logprobs_compiles_without_a_graph_break():
    ids, options = token_ids_of(5, 60, 5), law_options_of("law_everything", 5)

    def loss(logits):
        out = opk.token_logprobs(logits * 1.5, ids, **options)
        return (out.logprobs * 0.3 + out.lse - out.entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z = torch.randn(5, 60)
    expected, actual = leaf(z), leaf(z)
    loss(expected).backward()
    compiled(actual).backward()
    torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
def test_token_logprobs_opcheck(dtype):
    logits, ids = torch.randn(3, 20, dtype=dtype), token_ids_of(3, 18, 6)
    real = torch.promote_types(dtype, F32)
    law = (torch.randn(18, dtype=real), torch.ones(3, dtype=real) * 1.5, [0.5, 9.0, 1.0], 18)
    torch.library.opcheck(torch.ops.opd.token_logprobs_fwd, (leaf(logits), ids, *law))
    logprobs, lse, entropy = torch.ops.opd.token_logprobs_fwd(logits, ids, *law)
    upstream = torch.ones_like(logprobs), torch.ones_like(lse), torch.ones_like(entropy)
    arguments = (*upstream, logits, ids, lse, entropy, *law)
    torch.library.opcheck(torch.ops.opd.token_logprobs_bwd, arguments)
    if dtype in (F32, F64):
        torch.library.opcheck(torch.ops.opd.token_logprobs_bwd_, (*arguments, -1))


@pytest.mark.parametrize("numbers", [[1.0, 0.0, 0.7], [-0.5, 2.0, 0.7]], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
def test_token_logprobs_bwd_in_place_is_bwd(dtype, numbers):
    logits, ids = torch.randn(5, 700, dtype=dtype), token_ids_of(5, 690, 7)
    law = (torch.randn(690, dtype=dtype), None, numbers, 690)
    _, lse, entropy = torch.ops.opd.token_logprobs_fwd(logits, ids, *law)
    real = torch.linspace(-1, 1, 5, dtype=dtype)
    arguments = (real, real.double().flip(0), real * 2, logits, ids, lse, entropy, *law)
    gradient = torch.ops.opd.token_logprobs_bwd(*arguments)
    assert bool((gradient[:, 690:] == 0).all())
    assert torch.ops.opd.token_logprobs_bwd_(*arguments, -1) is None
    assert torch.equal(logits, gradient)


def _call(**changes):
    arguments = {"logits": torch.randn(4, 20), "token_ids": torch.zeros(4, dtype=torch.int64)}
    arguments.update(changes)
    return opk.token_logprobs(arguments.pop("logits"), arguments.pop("token_ids"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(20)}, ValueError, "logits must have 2 dim"),
        ({"logits": torch.zeros(4, 20).int()}, TypeError, "logits must be float32, .*int32"),
        ({"token_ids": torch.zeros(5).long()}, ValueError, "token_ids must have 4 rows"),
        ({"token_ids": torch.zeros(4)}, TypeError, "token_ids must be int64 or int32"),
        ({"token_ids": torch.zeros(4, 1).long()}, ValueError, "token_ids must have 1 dim"),
        ({"token_ids": [0, 0, 0, 0]}, TypeError, "token_ids must be a tensor, got list"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": (1.0, 1.0)}, TypeError, "temperature must be a number, got tuple"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must have 4 rows"),
        (
            {"temperature": torch.ones(4, requires_grad=True)},
            ValueError,
            "temperature must not require grad",
        ),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        ({"softcap": torch.ones(4)}, TypeError, "softcap must be a number, got Tensor"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and not 0, got 0.0"),
        ({"logit_scale": INF}, ValueError, "logit_scale must be finite and not 0, got inf"),
        ({"vocab_size": 21}, ValueError, r"vocab_size must be in \[1, 20\], got 21"),
        ({"backend": "cuda"}, opk.UnsupportedBackendError, "backend 'cuda' was requested but"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_token_logprobs_rejects_in_words(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        _call(**changes)
    assert str(raised.value).startswith("token_logprobs: ")


@pytest.mark.parametrize("bad", [-1, -100, 20, 1 << 40])
def test_token_logprobs_rejects_an_id_out_of_range(bad):
    ids = torch.tensor([0, bad, 1, 2])
    with pytest.raises(
        RuntimeError, match=rf"token_ids must be in \[0, 20\), got {bad} at position 1"
    ):
        _call(token_ids=ids)


def test_token_logprobs_rejects_an_id_in_the_padding():
    with pytest.raises(RuntimeError, match=r"token_ids must be in \[0, 18\), got 19"):
        _call(token_ids=torch.tensor([0, 1, 2, 19]), vocab_size=18)
