# SPDX-License-Identifier: Apache-2.0
"""topk_logprobs on a GPU backend, by the public op, the fused op and the raw op."""

from __future__ import annotations

import functools

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests.cases import CASES, F16, F32, F64, INF, INTERPRETED, NAN, FusedCase, fused_of, logits_of
from tests.checks import dtype_id, leaf
from tests.options import LAW_OPTIONS, law_options_of
from tests.topk import check_topk_logprobs, hostile_rows, tail_rows

EVERY = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype_id(dtype)}")
    for case in CASES
    if case.name in INTERPRETED and case.weights is None and not isinstance(case.temperature, tuple)
    for dtype in case.dtypes
    if dtype != F64
]


def on(gpu):
    """The op on this backend."""
    return functools.partial(opk.topk_logprobs, backend=gpu.name)


def same(one, two) -> bool:
    """All outputs bit by bit, a NaN being one."""
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_topk_logprobs_matches_reference(gpu, case, dtype):
    logits = logits_of(case, dtype).first(1 if case.vocab_size > 10000 else 3)
    num_tokens, vocab_size = len(logits.student), logits.vocab_size or case.vocab_size
    ids = torch.arange(2 * num_tokens).reshape(-1, 2) * 61 % vocab_size - 1
    for num_topk in sorted({1, min(70, case.vocab_size)}):
        check_topk_logprobs(
            on(gpu),
            logits.student,
            num_topk,
            f"{gpu.name} {case.name} {dtype_id(dtype)} K={num_topk}",
            token_ids=ids,
            temperature=logits.temperature,
            vocab_size=logits.vocab_size,
        )


@pytest.mark.parametrize("dtype", [F32, F16], ids=dtype_id)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_topk_logprobs_with_options_matches_reference(gpu, option, dtype):
    logits = torch.randn(3, 701) * 4
    logits[2, 5:9] = -INF
    check_topk_logprobs(
        on(gpu),
        logits.to(dtype),
        20,
        f"{gpu.name} {option} {dtype_id(dtype)}",
        token_ids=torch.tensor([[3, -1], [689, 0], [6, 7]]),
        vocab_size=690,
        **law_options_of(option, 3),
    )


def check_hostile_rows(gpu, vocab_size, num_topk):
    for name, row in hostile_rows(vocab_size).items():
        got, truth = on(gpu)(row, num_topk), reference.topk_logprobs(row, num_topk)
        assert torch.equal(got.ids, truth.ids), name
        for field in ("logprobs", "lse", "tail_logprob", "entropy"):
            mine, exact = getattr(got, field).double(), getattr(truth, field)
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5, msg=f"{name} {field}")


def test_topk_logprobs_tail_is_right_from_1e_12_to_almost_1(gpu):
    logits = tail_rows()
    got, truth = on(gpu)(logits, 1), reference.topk_logprobs(logits.double(), 1)
    assert (got.tail_logprob.double() - truth.tail_logprob).abs().max() <= 2e-6


@pytest.mark.parametrize("bad", [NAN, INF])
def test_topk_logprobs_of_a_bad_row_is_nan_and_its_neighbours_are_not(gpu, bad):
    logits, ids = torch.randn(3, 5000), torch.tensor([[1, -1]] * 3)
    expected = on(gpu)(logits, 5, token_ids=ids)
    logits[1, 4321] = bad
    out = on(gpu)(logits, 5, token_ids=ids)
    assert out.ids[1].tolist() == [-1] * 5
    assert all(bool(values[1].isnan().all()) for values in out[1:])
    assert same([value[::2] for value in out], [value[::2] for value in expected])


def test_topk_logprobs_agree_with_token_logprobs(gpu):
    logits, ids = torch.randn(3, 2500) * 3, torch.tensor([5, 0, 2499])
    one = on(gpu)(logits, 9, token_ids=ids, temperature=0.7)
    two = opk.token_logprobs(logits, ids, temperature=0.7, backend=gpu.name)
    torch.testing.assert_close(one.token_logprobs, two.logprobs)
    torch.testing.assert_close(one.lse, two.lse)
    torch.testing.assert_close(one.entropy, two.entropy)


def test_topk_logprobs_of_an_id_out_of_range_is_nan(gpu):
    # a GPU kernel can't raise without a sync, and must not read beyond the row
    law = (None, None, [-2.0, 5.0, 1.0], 20)
    out = gpu.ops.topk_logprobs_fwd(torch.randn(2, 20), torch.tensor([[20, 3], [-1, 19]]), *law, 2)
    assert out[-1].isnan().tolist() == [[True, False], [False, False]]
    assert out[-1][1, 0] == -INF


@pytest.mark.parametrize("ids", [None, torch.tensor([[0, 17], [-1, 5]])], ids=["no_ids", "ids"])
def test_topk_logprobs_opcheck(gpu, ids):
    law = (torch.randn(18), torch.tensor([1.5, 0.7]), [0.5, 9.0, 1.0], 18)
    torch.library.opcheck(gpu.ops.topk_logprobs_fwd, (torch.randn(2, 20), ids, *law, 6))


def test_topk_logprobs_compiles_without_a_graph_break(gpu):
    logits, ids = leaf(torch.randn(2, 40)), torch.tensor([3, 39])

    def call(values):
        return on(gpu)(values * 1.5, 4, token_ids=ids)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(logits)
    assert same(compiled, call(logits))


def test_topk_logprobs_of_no_tokens(gpu):
    out = on(gpu)(torch.empty(0, 9), 4, token_ids=torch.empty(0, 2).long())
    assert [x.shape for x in out] == [(0, 4), (0, 4), (0,), (0,), (0,), (0, 2)]


def test_topk_logprobs_refuses_float64_in_words(gpu):
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the"):
        on(gpu)(torch.randn(2, 5, dtype=F64), 2)


@pytest.mark.parametrize("dtype", [F32, F16], ids=dtype_id)
def test_fused_linear_topk_of_a_bent_head_matches_reference(gpu, dtype):
    inputs = fused_of(FusedCase(gpu.name, 5, 301, 16, 8), dtype)
    hidden, head = inputs.student_hidden, inputs.student_lm_head_weight
    bias, down, up = ((torch.randn(shape) * 0.5).to(dtype) for shape in ((301,), (4, 16), (301, 4)))
    options = {"num_topk": 12, "bias": bias, "lora": (down, up, 0.6)}
    options |= law_options_of("law_everything", 5)
    got = opk.fused_linear_topk(hidden, head, backend=gpu.name, **options)
    truth = reference.fused_linear_topk(hidden, head, **options)
    rtol = 1e-5 if dtype == F32 else 2e-2
    assert dtype == F16 or torch.equal(got.ids, truth.ids)
    for name in ("logprobs", "lse", "tail_logprob", "entropy"):
        mine, exact = getattr(got, name).double(), getattr(truth, name)
        torch.testing.assert_close(mine, exact, rtol=rtol, atol=rtol)
