# SPDX-License-Identifier: Apache-2.0
"""The Triton mirror, entry by entry, against 60-digit values; and its elementary functions."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from opd_kernels import _library
from tests.cases import LIMIT_SPECS, SPECS
from tests.pointwise import (
    SMALLEST_FLOAT32,
    entries,
    exact_dterm,
    exact_dterm_teacher,
    exact_term,
    is_pointwise,
)

triton = pytest.importorskip("triton")
tl = triton.language

from opd_kernels.triton import _math  # noqa: E402
from opd_kernels.triton._components import NUM_ROW_SUMS, total_of  # noqa: E402
from opd_kernels.triton._divergence_rows import (  # noqa: E402
    constants,
    divergence_dterm_teacher,
    divergence_row,
    divergence_row_sums,
    divergence_value,
)
from opd_kernels.triton._divergences import divergence_dterm, divergence_term  # noqa: E402
from opd_kernels.triton._entry import Entry  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
]

EPS = torch.finfo(torch.float32).eps
exp, exp_pair_nonpositive = _math.exp, _math.exp_pair_nonpositive
exp_minus_distance = _math.exp_minus_distance


@triton.jit
def _sums_of(e, c, threshold, inside, DIVERGENCE: tl.constexpr):
    sums = ()
    values = divergence_row_sums(e, c, threshold, DIVERGENCE)
    for k in tl.static_range(len(values)):
        sums = sums + (total_of(tl.where(inside, values[k], 0.0)),)  # noqa: RUF005
    return sums


@triton.jit
def _evaluate_kernel(
    lp_ptr, lq_ptr, out_ptr, value_ptr, count, threshold, c, given, DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, BLOCK)
    inside = index < count
    lp = tl.load(lp_ptr + index, mask=inside, other=0.0)
    lq = tl.load(lq_ptr + index, mask=inside, other=0.0)
    e = Entry(lp, lq, exp(lp), exp(lq), lq - lp, tl.zeros_like(lp), tl.zeros_like(lp))
    sums = ()
    if given is None:
        sums = _sums_of(e, c, threshold, inside, DIVERGENCE)
    elif NUM_ROW_SUMS[DIVERGENCE] == 1:
        sums = (tl.full((), given, tl.float64),)
    row = divergence_row(c, sums, DIVERGENCE)
    term = divergence_term(e, c, row, DIVERGENCE)
    tl.store(out_ptr + index, term, mask=inside)
    dterm = divergence_dterm(e, c, row, DIVERGENCE)
    tl.store(out_ptr + count + index, dterm, mask=inside)
    teacher = divergence_dterm_teacher(e, c, row, DIVERGENCE)
    tl.store(out_ptr + 2 * count + index, teacher, mask=inside)
    if given is None:
        total = total_of(tl.where(inside, term, 0.0))
        tl.store(value_ptr, divergence_value(c, total, sums, DIVERGENCE))


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


def evaluate(divergence, pairs, given=None, threshold=0.0):
    """(term, dterm, dterm_teacher, value); given: the row's one sum, else taken of these."""
    public = divergence.public()
    lp, lq = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    out, value = torch.empty(3, len(pairs)), torch.empty(1, dtype=torch.float64)
    c = constants(public.id, *public.kernel_params)
    _evaluate_kernel[(1,)](
        lp, lq, out, value, len(pairs), threshold, c, given,
        DIVERGENCE=public.id, BLOCK=triton.next_power_of_2(len(pairs)),
    )  # fmt: skip
    return *out, value.item()


def evaluate_in_float64(divergence, pairs):
    """The same of the compiled header, in float64."""
    library = ctypes.CDLL(str(_library.PATH))
    library.opd_divergence_eval.argtypes = (
        ctypes.c_int32, ctypes.c_double, ctypes.c_double, ctypes.c_int64, *[ctypes.c_void_p] * 6
    )  # fmt: skip
    public = divergence.public()
    lp, lq = torch.tensor(pairs, dtype=torch.float32).double().T.contiguous()
    out, value = torch.empty(3, len(pairs), dtype=torch.float64), torch.empty(1).double()
    pointers = (lp, lq, out[0], out[1], out[2], value)
    status = library.opd_divergence_eval(
        public.id, *public.kernel_params, len(pairs), *(tensor.data_ptr() for tensor in pointers)
    )
    assert status == 0
    return *out, value.item()


TEXTBOOK = ("skew_forward_kl", "squared_hellinger", "alpha", "pearson_chi2", "neyman_chi2")


@pytest.mark.parametrize("divergence", [each for each in SPECS if each.name in TEXTBOOK], ids=str)
def test_triton_textbook_form_differs_by_a_multiple_of_q(divergence):
    pairs = [pair for pair in float32_entries() if min(pair) > -20 or pair[0] == pair[1]]
    _, near, _, _ = evaluate(divergence, pairs, given=1.0)
    _, textbook, _, _ = evaluate(divergence, pairs, given=0.0)
    q = torch.tensor(pairs)[:, 1].exp()
    public = divergence.public()
    c = constants(public.id, *public.kernel_params)
    factor = c[1] if divergence.name == "skew_forward_kl" else c[2] * c[3]
    bound = 64 * EPS * (abs(factor) * q + textbook.abs()) + 1e-36
    assert bool(((near - textbook - factor * q).abs() <= bound).all())


def rounding(divergence, lp, lq) -> float:
    """What rounding may do to an entry, relative to it.

    Powers have the exponent's own rounding, a part of its size, in their logarithm.
    """
    if divergence.name not in ("alpha_beta", "alpha", *TEXTBOOK[1:]):
        return 16 * EPS
    sizes = [abs(x) for x in (lp, lq) if math.isfinite(x)]
    order = max([1.0, *(abs(value) for _, value in divergence.params)])
    order = {"pearson_chi2": 2.0, "neyman_chi2": 2.0}.get(divergence.name, order)
    return (64 + 4 * order * max(sizes, default=0.0)) * EPS


POINTWISE = [each for each in (*SPECS, *LIMIT_SPECS) if is_pointwise(each)]


@pytest.mark.parametrize("divergence", POINTWISE, ids=str)
def test_triton_terms_match_the_definition(divergence):
    is_power = rounding(divergence, -1.0, -1.0) != 16 * EPS
    # a power of a probability that float32 has not may be one that it has, and the other way round
    pairs = [
        pair
        for pair in float32_entries()
        if not is_power or all(x > -87 or x == -math.inf for x in pair)
    ]
    if divergence.name == "alpha_beta" and sum(value for _, value in divergence.params) == 0:
        # the header has no limit there where a law rules a token out, and this is its mirror
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    # laws that overlap, and no common error of the gaps
    given = 0.0 if divergence.name == "alpha_beta" else 1.0
    term, dterm, teacher, _ = evaluate(divergence, pairs, given)
    largest = torch.finfo(torch.float32).max
    for pair, *got in zip(pairs, term.tolist(), dterm.tolist(), teacher.tolist(), strict=True):
        exact = (
            exact_term(divergence, *pair, SMALLEST_FLOAT32),
            exact_dterm(divergence, *pair, SMALLEST_FLOAT32),
            exact_dterm_teacher(divergence, *pair, SMALLEST_FLOAT32),
        )
        for name, one, truth in zip(("term", "dterm", "dterm_teacher"), got, exact, strict=True):
            if name == "dterm_teacher" and divergence.name not in SYMMETRIC:
                continue
            if abs(truth) > largest / 16:
                assert abs(one) > largest / 32, f"{name} at {pair}"
                continue
            assert one == pytest.approx(truth, rel=rounding(divergence, *pair), abs=1e-36), (
                f"{name} at {pair}"
            )


# where dterm_teacher is the mirror's dterm, without a multiple of p
SYMMETRIC = {
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation",
    "jeffreys", "squared_hellinger", "alpha", "pearson_chi2", "neyman_chi2", "todi", "alpha_beta",
}  # fmt: skip


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.5])
@pytest.mark.parametrize("divergence", (*SPECS, *LIMIT_SPECS), ids=str)
def test_triton_row_is_that_of_the_header(divergence, scale):
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(64, generator=generator, dtype=torch.float64) * 2
    noise = torch.randn(64, generator=generator, dtype=torch.float64)
    laws = [x.log_softmax(0) for x in (teacher, teacher + scale * noise)]
    pairs = list(zip(*(law.float().tolist() for law in laws), strict=True))
    # its head is known from the law: the kernels bisect, which test_triton_divergence.py holds
    threshold = 0.0
    if divergence.name == "adaptive_kl":
        ordered = laws[0].sort(descending=True).values
        fits = int((ordered.exp().cumsum(0) <= dict(divergence.params)["head_mass"]).sum())
        threshold = float((ordered[max(fits, 1) - 1] + ordered[max(fits, 1)]) / 2)
    got = evaluate(divergence, pairs, threshold=threshold)
    truth = evaluate_in_float64(divergence, pairs)
    assert got[3] == pytest.approx(truth[3], rel=2e-4 if scale == 1e-3 else 1e-5, abs=1e-12)
    for name, one, exact in zip(("term", "dterm", "dterm_teacher"), got, truth, strict=False):
        error = (one.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
        assert error < 2e-5, f"{name}: {error:.1e}"


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
