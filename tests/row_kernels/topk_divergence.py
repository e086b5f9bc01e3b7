# SPDX-License-Identifier: Apache-2.0
"""topk_divergence on a GPU backend, by the raw ops and the public op."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels.token_logprobs import Law
from tests import topk_rows
from tests.checks import dtype_id, leaf
from tests.options import LAW_OPTIONS, law_options_of
from tests.sparse import BY_NAME, PAIRS, TAILS, check_topk_divergence
from tests.tolerance import assert_relative, assert_within_eager

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NARROW = {BF16: 2, F16: 3}


def law_of(option: str, num_tokens: int, vocab_size: int, bias: bool = False) -> Law:
    """The law that an option of tests/options.py names."""
    options = law_options_of(option, num_tokens)
    temperature = options.get("temperature", 1.0)
    is_number = not isinstance(temperature, torch.Tensor)
    return Law(
        torch.linspace(-1, 1, vocab_size) if bias else None,
        None if is_number else temperature,
        [
            options.get("logit_scale", 1.0),
            options.get("softcap") or 0.0,
            temperature if is_number else 1.0,
        ],
        vocab_size,
    )


def gradients_of(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_ids, grad_rest), NaN where there is no id."""
    num_tokens, num_ids = ids.shape
    grad_ids = torch.linspace(-2, 1, num_tokens * num_ids).view(num_tokens, num_ids)
    grad_rest = torch.linspace(0.9, -0.7, num_tokens)
    return grad_ids.masked_fill(ids < 0, math.nan), grad_rest


def check_rows(gpu, logits, ids, law, what) -> None:
    """Both calls against float64, with eager float32 beside them."""
    rows = topk_rows.Rows(*gpu.ops.topk_divergence_fwd(logits, ids, *law))
    exact = topk_rows.forward(logits, ids, law, F64)
    eager = topk_rows.forward(logits, ids, law, F32)
    for name, got, baseline, truth in zip(topk_rows.Rows._fields, rows, eager, exact, strict=True):
        assert_within_eager(got.to(F32), baseline, truth, f"{what} {name}")
    grads = gradients_of(ids)
    args = (ids, *grads, rows.lse)
    got = gpu.ops.topk_divergence_bwd(logits, *args, *law)
    assert bool((got[:, law.vocab_size :] == 0).all())
    clean = (ids, grads[0].nan_to_num(), grads[1], exact.lse, law)
    truth = topk_rows.backward(logits, *clean, F64)
    baseline = topk_rows.backward(logits, *clean, F32)
    assert_within_eager(got, baseline.to(logits.dtype), truth, f"{what} gradient")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_rows_with_options_match_float64(gpu, option, dtype):
    logits = (torch.randn(3, 701) * 4).to(dtype)
    logits[2, 5:9] = -math.inf
    logits[:, 690:] = math.nan
    ids = topk_rows.ids_of(3, 690, 8, 1)
    law = law_of(option, 3, 690, bias=True)
    check_rows(gpu, logits, ids, law, f"{gpu.name} {option} {dtype_id(dtype)}")


@pytest.mark.parametrize("num_ids", [1, 64, 700, 2499, 2500])
def test_rows_of_any_number_of_ids_match_float64(gpu, num_ids):
    logits = torch.randn(2, 2500) * 3
    ids = topk_rows.ids_of(2, 2500, num_ids, 2)
    check_rows(gpu, logits, ids, law_of("law_everything", 2, 2500), f"{gpu.name} K={num_ids}")


@pytest.mark.parametrize("grad_dtype", [None, BF16, F16], ids=["own", "bf16", "fp16"])
@pytest.mark.parametrize("numbers", [[1.0, 0.0, 0.7], [-0.5, 2.0, 0.7]], ids=["plain", "capped"])
def test_rows_in_place_are_bwd(gpu, numbers, grad_dtype):
    logits, ids = torch.randn(4, 3000), topk_rows.ids_of(4, 2990, 40, 3)
    law = Law(torch.randn(2990), None, numbers, 2990)
    lse = gpu.ops.topk_divergence_fwd(logits, ids, *law)[2]
    grad_ids, grad_rest = gradients_of(ids)
    grad_ids[1], grad_rest[1] = 0.0, 0.0
    grad_rest[2] = 0.0
    arguments = (logits, ids, grad_ids, grad_rest, lse, *law)
    gradient = gpu.ops.topk_divergence_bwd(*arguments)
    assert bool((gradient[1] == 0).all())
    assert int((gradient[2] != 0).sum()) == int((ids[2] >= 0).sum())
    gpu.ops.topk_divergence_bwd_(*arguments, NARROW.get(grad_dtype, -1))
    if grad_dtype is None:
        assert torch.equal(logits, gradient)
    else:
        narrow = logits.view(grad_dtype)[:, :2990]
        assert torch.equal(narrow, gradient[:, :2990].to(grad_dtype))


@pytest.mark.parametrize("lift", [27.0, -27.0], ids=["tail of e-12", "tail of 1 - e-12"])
def test_the_tail_is_a_sum_and_no_difference(gpu, lift):
    logits = torch.rand(3, 1000) * 0.1
    ids = topk_rows.ids_of(3, 1000, 16, 4)
    for row, chosen in enumerate(ids):
        logits[row, chosen[chosen >= 0]] += lift
    law = Law(None, None, [1.0, 0.0, 1.0], 1000)
    tail = gpu.ops.topk_divergence_fwd(logits, ids, *law)[1]
    q = logits.to(F64).softmax(1)
    on = topk_rows._on(ids, 1000)
    off_mass = torch.where(on, 0.0, q).sum(1)
    assert_relative(tail.exp(), off_mass, 1e-5, "mass off the ids")
    # beyond what 1 - exp(tail_logprob) could say of it, too
    assert_relative(-torch.expm1(tail), torch.where(on, q, 0.0).sum(1), 1e-5, "mass at the ids")


def test_the_tail_is_nothing_exactly_where_nothing_is_off_the_ids(gpu):
    logits = torch.randn(4, 6)
    logits[1, 4:] = -math.inf
    logits[2, :4] = -math.inf
    ids = torch.tensor([[3, 0, 1, 2, 5, 4], *[[3, 0, 1, 2, -1, -1]] * 2, [-1] * 6])
    law = Law(None, None, [1.0, 0.0, 1.0], 6)
    logprobs, tail, _, _ = gpu.ops.topk_divergence_fwd(logits, ids, *law)
    assert tail.tolist() == [-math.inf, -math.inf, 0.0, 0.0]
    assert bool((logprobs[ids < 0] == -math.inf).all())
    assert bool((logprobs[2] == -math.inf).all())


@pytest.mark.parametrize("where", ["at an id", "off the ids"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_law_is_nan_and_its_neighbours_are_not(gpu, value, where):
    logits, ids = torch.randn(3, 300), topk_rows.ids_of(3, 300, 5, 5)
    column = (
        int(ids[1].max())
        if where == "at an id"
        else next(v for v in range(300) if v not in ids[1].tolist())
    )
    logits[1, column] = value
    law = Law(None, None, [1.0, 0.0, 1.0], 300)
    for got in gpu.ops.topk_divergence_fwd(logits, ids, *law):
        assert bool(got[1].isnan().all())
        assert not bool(got[[0, 2]].isnan().any())


def test_a_row_of_no_finite_logit_is_nan(gpu):
    # but for its lse: a rank's columns may have no mass where another's have
    law = Law(None, None, [1.0, 0.0, 1.0], 40)
    logits, ids = torch.full((1, 40), -math.inf), torch.tensor([[3, -1]])
    rows = topk_rows.Rows(*gpu.ops.topk_divergence_fwd(logits, ids, *law))
    assert rows.lse.tolist() == [-math.inf]
    for got in (rows.logprobs, rows.tail_logprob, rows.entropy):
        assert bool(got.isnan().all())


def test_an_id_out_of_range_is_nan_and_reads_nothing(gpu):
    # a GPU kernel can't raise without a sync, and must not read beyond the row
    ids = torch.tensor([[-1, 20, 3], [2**40, -(2**40), 0]])
    for softcap in (0.0, 5.0):
        law = Law(None, None, [-2.0, softcap, 1.0], 20)
        logits = torch.randn(2, 20)
        logprobs, tail, lse, _ = gpu.ops.topk_divergence_fwd(logits, ids, *law)
        assert logprobs.isnan().tolist() == [[False, True, False], [True, False, False]]
        assert bool(tail.isfinite().all())
        gradient = gpu.ops.topk_divergence_bwd(
            logits, ids, torch.ones(2, 3), torch.zeros(2), lse, *law
        )
        assert gradient.count_nonzero().item() == 2


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_what_has_no_gradient_is_not_read(gpu, softcap):
    logits = torch.full((2, 300), math.nan)
    ids = torch.tensor([[7, 290], [290, 7]])
    logits[1, 7], logits[1, 290] = 1.0, 2.0
    law = Law(None, None, [1.0, softcap, 1.0], 300)
    lse = torch.full((2,), math.nan, dtype=F64)
    grad_ids = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    gradient = gpu.ops.topk_divergence_bwd(logits, ids, grad_ids, torch.zeros(2), lse, *law)
    assert gradient.isfinite().all()
    assert gradient.nonzero().tolist() == [[1, 7], [1, 290]]


def test_rows_of_no_tokens(gpu):
    law = Law(None, None, [1.0, 0.0, 1.0], 30)
    logits, ids = torch.randn(0, 40), torch.zeros(0, 3, dtype=torch.int64)
    logprobs, tail, lse, _ = gpu.ops.topk_divergence_fwd(logits, ids, *law)
    assert logprobs.shape == (0, 3)
    gradient = gpu.ops.topk_divergence_bwd(logits, ids, logprobs, tail.to(F32), lse, *law)
    assert gradient.shape == (0, 40)


def test_rows_with_strides(gpu):
    wide, ids = torch.randn(5, 2000), topk_rows.ids_of(3, 901, 7, 6)
    law = law_of("law_everything", 3, 901)
    rows = wide[::2, 3:904]
    every = [rows, rows.contiguous()]
    one, two = (gpu.ops.topk_divergence_fwd(logits, ids, *law) for logits in every)
    for got, same in zip(one, two, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-6, atol=1e-6)
    grads = gradients_of(ids)
    one, two = (gpu.ops.topk_divergence_bwd(logits, ids, *grads, two[2], *law) for logits in every)
    assert torch.equal(one, two)


def test_row_ops_opcheck(gpu):
    logits, ids = torch.randn(2, 20), torch.tensor([[0, 17, -1], [4, 3, 2]])
    law = Law(torch.randn(18), torch.tensor([1.5, 0.7]), [0.5, 9.0, 1.0], 18)
    torch.library.opcheck(gpu.ops.topk_divergence_fwd, (leaf(logits), ids, *law))
    lse = gpu.ops.topk_divergence_fwd(logits, ids, *law)[2]
    arguments = (logits, ids, torch.ones(2, 3), torch.ones(2), lse, *law)
    torch.library.opcheck(gpu.ops.topk_divergence_bwd, arguments)
    torch.library.opcheck(gpu.ops.topk_divergence_bwd_, (*arguments, -1))


# -- the public op -------------------------------------------------------------------------------

INTERPRETED = (
    "no_tokens", "one_token", "one_word", "all_but_one", "every_id", "odd", "given_tail", "masked",
    "padded", "bent", "close", "peaked", "unlike",
)  # fmt: skip
CASES = [
    pytest.param(BY_NAME[name], dtype, id=f"{name}-{dtype_id(dtype)}")
    for name in INTERPRETED
    for dtype in BY_NAME[name].dtypes
    if dtype != F64
]
# the divergences themselves are held by the tests of `divergence`: some of each tail first
EVERY_PAIR = [
    pytest.param(pair, id=f"{pair[0]}-{pair[1]}", marks=() if i % 7 == 0 else pytest.mark.slow)
    for i, pair in enumerate(PAIRS)
]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_topk_divergence_matches_reference(gpu, case, dtype):
    spec, tail = PAIRS[0]
    assert (spec.name, tail) == ("forward_kl", "bucket")
    check_topk_divergence(case, dtype, spec, tail, gpu.name, max_tokens=5)


@pytest.mark.parametrize("pair", EVERY_PAIR)
def test_topk_divergence_of_every_kind_matches_reference(gpu, pair):
    check_topk_divergence(BY_NAME["odd"], F32, *pair, gpu.name, max_tokens=5)


@pytest.mark.parametrize("tail", [TAILS[0], TAILS[-1]])
def test_topk_divergence_compiles_without_a_graph_break(gpu, tail):
    z, ids = torch.randn(2, 40), torch.tensor([[3, 39, -1], [0, 7, 7]])
    logprobs = torch.tensor([[-1.0, -2.0, -math.inf], [-0.5, -1.5, -1.5]])

    def loss(logits):
        options = {"tail": tail, "divergence": "skew_reverse_kl", "backend": gpu.name}
        return opk.topk_divergence(logits * 1.5, ids, logprobs, **options).sum()

    torch._dynamo.reset()
    expected, actual = leaf(z), leaf(z)
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    assert torch.equal(actual.grad, expected.grad)


def test_topk_divergence_refuses_float64_in_words(gpu):
    logits, ids = torch.randn(2, 5, dtype=F64), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the"):
        opk.topk_divergence(logits, ids, -torch.ones(2, 1), backend=gpu.name)
