# SPDX-License-Identifier: Apache-2.0
"""The Triton mirror, entry by entry, against 60-digit values; and its elementary functions."""

from __future__ import annotations

import math

import pytest
import torch

from tests.cases import SPECS
from tests.pointwise import SMALLEST_FLOAT32, entries, exact_dterm, exact_term

triton = pytest.importorskip("triton")
tl = triton.language

from opd_kernels.triton import _math  # noqa: E402
from opd_kernels.triton._divergences import (  # noqa: E402
    divergence_dterm,
    divergence_term,
    parameters,
)

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

EPS = torch.finfo(torch.float32).eps
exp, exp_pair_nonpositive = _math.exp, _math.exp_pair_nonpositive
exp_minus_distance = _math.exp_minus_distance


@triton.jit
def _evaluate_kernel(
    lp_ptr, lq_ptr, term_ptr, dterm_ptr, count, weight, rest, live,
    DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, BLOCK)
    lp = tl.load(lp_ptr + index, mask=index < count, other=0.0)
    lq = tl.load(lq_ptr + index, mask=index < count, other=0.0)
    p, q, gap = exp(lp), exp(lq), lq - lp
    term = divergence_term(p, q, gap, weight, rest, live, DIVERGENCE)
    dterm = divergence_dterm(p, q, gap, weight, rest, live, DIVERGENCE)
    tl.store(term_ptr + index, term, mask=index < count)
    tl.store(dterm_ptr + index, dterm, mask=index < count)


@triton.jit
def _elementary_kernel(x_ptr, y_ptr, out_ptr, count, NAME: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < count, other=0.0)
    y = tl.load(y_ptr + index, mask=index < count, other=0.0)
    if NAME == "exp":
        result = exp(x)
    elif NAME == "expm1_of_pair":
        _, result = exp_pair_nonpositive(x)
    elif NAME == "exp_of_pair":
        result, _ = exp_pair_nonpositive(x)
    else:
        result = exp_minus_distance(x, y)
    tl.store(out_ptr + index, result, mask=index < count)


def elementary(name: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.numel())
    _elementary_kernel[(1,)](x, x if y is None else y, out, x.numel(), NAME=name, BLOCK=block)
    return out


def float32_entries() -> list[tuple[float, float]]:
    pairs = torch.tensor(list(entries()), dtype=torch.float32)
    return [tuple(pair) for pair in pairs.tolist()]


def evaluate(number: int, weight: float, rest: float, live: float, pairs) -> list[torch.Tensor]:
    lp, lq = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    term, dterm = torch.empty_like(lp), torch.empty_like(lp)
    _evaluate_kernel[(1,)](
        lp, lq, term, dterm, len(pairs), weight, rest, live,
        DIVERGENCE=number, BLOCK=triton.next_power_of_2(len(pairs)),
    )  # fmt: skip
    return term, dterm


def test_triton_skew_forward_kl_has_two_forms_that_differ_by_a_multiple_of_q():
    pairs = float32_entries()
    (_, near), (_, textbook) = (evaluate(3, 0.1, 0.9, form, pairs) for form in (0.0, 1.0))
    q = torch.tensor(pairs)[:, 1].exp()
    bound = 4 * EPS * (q + textbook.abs()) + 1e-36
    assert bool(((near - textbook - 0.9 * q).abs() <= bound).all())


@pytest.mark.parametrize("divergence", SPECS, ids=str)
def test_triton_terms_match_the_definition(divergence):
    public = divergence.public()
    weight, rest, live = parameters(*public.kernel_params)
    # skew_forward_kl reads it as the form of its dterm; 0 is the one of divergences.h's comment
    live = 0.0 if divergence.name == "skew_forward_kl" else live
    pairs = float32_entries()
    term, dterm = evaluate(public.id, weight, rest, live, pairs)
    for pair, got_term, got_dterm in zip(pairs, term.tolist(), dterm.tolist(), strict=True):
        assert got_term == pytest.approx(
            exact_term(divergence, *pair, SMALLEST_FLOAT32), rel=16 * EPS, abs=1e-36
        ), f"term at {pair}"
        assert got_dterm == pytest.approx(
            exact_dterm(divergence, *pair, SMALLEST_FLOAT32), rel=16 * EPS, abs=1e-36
        ), f"dterm at {pair}"


def test_triton_exp_is_exact_to_two_roundings_and_zero_below_its_range():
    values = -torch.logspace(-6, math.log10(87.3), 2000)
    truth = values.double().exp()
    error = (elementary("exp", values).double() - truth).abs() / truth
    assert error.max().item() <= 2 * EPS
    special = torch.tensor([0.0, -87.4, -104.0, -1e4, -math.inf])
    assert elementary("exp", special).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert elementary("exp", torch.tensor([math.nan])).isnan().all()


def test_triton_expm1_keeps_its_digits_near_zero():
    values = -torch.logspace(-30, math.log10(87.0), 2000)
    truth = torch.expm1(values.double())
    error = (elementary("expm1_of_pair", values).double() - truth).abs() / truth.abs()
    assert error.max().item() <= 2 * EPS
    special = torch.tensor([0.0, -1e4, -math.inf])
    assert elementary("expm1_of_pair", special).tolist() == [0.0, -1.0, -1.0]
    assert elementary("exp_of_pair", special).tolist() == [1.0, 0.0, 0.0]


def test_triton_exp_minus_distance_puts_the_rounding_of_the_distance_back():
    x, y = -torch.rand(2, 4000) * 12
    truth = (-(x.double() - y.double()).abs()).exp()
    error = (elementary("exp_minus_distance", x, y).double() - truth).abs() / truth
    assert error.max().item() <= 2 * EPS
    x = torch.tensor([0.0, -math.inf, 3.0, math.nan])
    y = torch.tensor([-math.inf, 1.0, 3.0, 0.0])
    assert elementary("exp_minus_distance", x, y).tolist()[:3] == [0.0, 0.0, 1.0]
    assert elementary("exp_minus_distance", x, y)[3].isnan()
