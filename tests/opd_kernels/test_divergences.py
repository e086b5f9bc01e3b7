# SPDX-License-Identifier: Apache-2.0
"""The catalogue: names and errors, properties of every divergence, and the pointwise form."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opd_kernels as opk
from opd_kernels import _library
from opd_kernels import divergences as D
from tests.cases import F32, F64, SPECS, spec
from tests.checks import leaf
from tests.pointwise import GRID, entries, exact_dterm, exact_slope, exact_term

every_divergence = pytest.mark.parametrize("divergence", SPECS, ids=str)
quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)
scales = st.sampled_from([0.0, 1e-4, 0.1, 1.0, 10.0, 100.0])


def logits(num_tokens, vocab_size, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, vocab_size, generator=generator, dtype=F64) * scale
    teacher = torch.randn(num_tokens, vocab_size, generator=generator, dtype=F64) * scale
    return student, teacher


# -- properties ----------------------------------------------------------------------------------


@every_divergence
@given(vocab_size=sizes, seed=seeds, scale=scales)
@quick
def test_divergence_is_never_negative(divergence, vocab_size, seed, scale):
    student, teacher = logits(3, vocab_size, seed, scale)
    for dtype in (F64, F32):
        loss = opk.divergence(student.to(dtype), teacher.to(dtype), divergence=divergence.public())
        assert bool((loss >= 0).all()), loss


@every_divergence
@given(vocab_size=sizes, seed=seeds, scale=scales)
@quick
def test_divergence_of_a_law_from_itself_is_zero(divergence, vocab_size, seed, scale):
    student, _ = logits(2, vocab_size, seed, scale)
    z = leaf(student)
    loss = opk.divergence(z, student, divergence=divergence.public())
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert z.grad.abs().max() <= 1e-15


@every_divergence
@given(vocab_size=sizes, seed=seeds, scale=scales)
@quick
def test_gradient_sums_to_zero_over_the_vocabulary(divergence, vocab_size, seed, scale):
    student, teacher = logits(3, vocab_size, seed, scale)
    z = leaf(student)
    opk.divergence(z, teacher, divergence=divergence.public(), temperature=1.3).sum().backward()
    # the probabilities carry eps |z|, and what they multiply is at most |z|
    largest = 1 + max(student.abs().max().item(), teacher.abs().max().item())
    assert z.grad.sum(1).abs().max().item() <= 4 * torch.finfo(F64).eps * largest**2


@every_divergence
@given(seed=seeds, student_shift=st.floats(-50, 50), teacher_shift=st.floats(-50, 50))
@quick
def test_divergence_ignores_a_constant_added_to_a_row(
    divergence, seed, student_shift, teacher_shift
):
    student, teacher = logits(3, 20, seed, 2.0)
    loss = opk.divergence(student, teacher, divergence=divergence.public())
    shifted = opk.divergence(
        student + student_shift, teacher + teacher_shift, divergence=divergence.public()
    )
    torch.testing.assert_close(shifted, loss, rtol=1e-11, atol=1e-13)


@every_divergence
@given(seed=seeds)
@quick
def test_divergence_ignores_the_order_of_the_vocabulary(divergence, seed):
    student, teacher = logits(2, 33, seed, 2.0)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(seed))
    loss = opk.divergence(student, teacher, divergence=divergence.public())
    permuted = opk.divergence(
        student[:, order].contiguous(),
        teacher[:, order].contiguous(),
        divergence=divergence.public(),
    )
    torch.testing.assert_close(permuted, loss, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", D.DIVERGENCES)
@given(seed=seeds, scale=scales, parameter=st.floats(0.01, 0.99))
@quick
def test_divergence_stays_below_its_upper_bound(name, seed, scale, parameter):
    bounds = {
        "jsd": -parameter * math.log(parameter) - (1 - parameter) * math.log1p(-parameter),
        "skew_forward_kl": -math.log(parameter),
        "skew_reverse_kl": -math.log(parameter),
        "total_variation": 1.0,
    }
    key = {"jsd": "beta", "skew_forward_kl": "alpha", "skew_reverse_kl": "alpha"}.get(name)
    divergence = D.parse(name, **({key: parameter} if key else {}))
    student, teacher = logits(3, 30, seed, scale)
    loss = opk.divergence(student, teacher, divergence=divergence)
    assert bool((loss <= bounds.get(name, math.inf) * (1 + 1e-12)).all())


# -- orientation and limits ----------------------------------------------------------------------


def test_orientation_by_hand():
    # P = (3/4, 1/4) is the teacher, Q = (1/2, 1/2)
    teacher, student = (torch.tensor([row], dtype=F64).log() for row in ([0.75, 0.25], [0.5, 0.5]))

    def value(divergence):
        return opk.divergence(student, teacher, divergence=divergence).item()

    assert value("forward_kl") == pytest.approx(
        0.75 * math.log(1.5) - 0.25 * math.log(2), abs=1e-15
    )
    assert value("reverse_kl") == pytest.approx(
        0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-15
    )
    # beta weighs the teacher: M = (0.7, 0.3) at beta = 0.8
    mixture = 0.8 * (0.75 * math.log(0.75 / 0.7) + 0.25 * math.log(0.25 / 0.3)) + 0.2 * (
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    )
    assert value(D.jsd(beta=0.8)) == pytest.approx(mixture, abs=1e-15)
    # forward: M = alpha P + (1 - alpha) Q; reverse: M = (1 - alpha) P + alpha Q, at alpha = 0.2
    forward = 0.75 * math.log(0.75 / 0.55) + 0.25 * math.log(0.25 / 0.45)
    reverse = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    assert value(D.skew_forward_kl(alpha=0.2)) == pytest.approx(forward, abs=1e-15)
    assert value(D.skew_reverse_kl(alpha=0.2)) == pytest.approx(reverse, abs=1e-15)
    assert value("total_variation") == pytest.approx(0.25, abs=1e-15)


# name -> (divergence at a distance from the end, factor, limit, smallest distance in float32): the
# gradient of jsd is a difference of logarithms of size beta, good to eps / beta
LIMITS = {
    "jsd-to-forward": (lambda end: D.jsd(beta=end), lambda end: 1 / end, "forward_kl", 1e-4),
    "jsd-to-reverse": (lambda end: D.jsd(beta=1 - end), lambda end: 1 / end, "reverse_kl", 1e-8),
    "skew_forward": (lambda end: D.skew_forward_kl(end), lambda end: 1.0, "forward_kl", 1e-8),
    "skew_reverse": (lambda end: D.skew_reverse_kl(end), lambda end: 1.0, "reverse_kl", 1e-8),
}


@pytest.mark.parametrize(
    ("name", "dtype", "end"),
    [
        (name, dtype, end)
        for name, (_, _, _, smallest) in LIMITS.items()
        for dtype in (F64, F32)
        for end in (1e-4, 1e-6, 1e-8)
        if dtype == F64 or end >= smallest
    ],
)
def test_divergence_tends_to_its_limits(name, dtype, end):
    near_end, scale, limit, _ = LIMITS[name]
    student, teacher = (x.to(dtype) for x in logits(4, 50, 11, 1.0))
    z, exact = leaf(student), leaf(student)
    near = opk.divergence(z, teacher, divergence=near_end(end)) * scale(end)
    far = opk.divergence(exact, teacher, divergence=limit)
    near.sum().backward()
    far.sum().backward()
    # the rate of convergence is that of the parameter
    bound = 200 * end + (0.0 if dtype == F64 else 1e-5)
    torch.testing.assert_close(near, far, rtol=bound, atol=bound)
    torch.testing.assert_close(z.grad, exact.grad, rtol=bound, atol=bound)


def test_jsd_of_disjoint_laws_is_log_two():
    student = torch.tensor([[0.0, -math.inf]], dtype=F64)
    teacher = torch.tensor([[-math.inf, 0.0]], dtype=F64)
    loss = opk.divergence(student, teacher, divergence="jsd")
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)


def test_symmetric_jsd_does_not_know_who_is_the_teacher():
    student, teacher = logits(4, 60, 5, 2.0)
    one = opk.divergence(student, teacher, divergence=D.jsd(beta=0.3))
    two = opk.divergence(teacher, student, divergence=D.jsd(beta=0.7))
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-15)


def test_detaching_the_mixture_changes_the_gradient_and_not_the_value():
    student, teacher = logits(4, 60, 6, 2.0)
    live, detached = leaf(student), leaf(student)
    one = opk.divergence(live, teacher, divergence=D.skew_reverse_kl(0.3))
    two = opk.divergence(detached, teacher, divergence=D.skew_reverse_kl(0.3, detach_mixture=True))
    assert torch.equal(one, two)
    one.sum().backward()
    two.sum().backward()
    assert (live.grad - detached.grad).abs().max() > 1e-3


# -- pointwise -----------------------------------------------------------------------------------


@every_divergence
def test_pointwise_terms_sum_to_the_divergence(divergence):
    # the exact pointwise forms of tests/pointwise.py are themselves held by the row op
    student, teacher = logits(1, 12, 8, 1.5)
    lq, lp = (torch.log_softmax(x, -1)[0].tolist() for x in (student, teacher))
    total = math.fsum(exact_term(divergence, p, q) for p, q in zip(lp, lq, strict=True))
    loss = opk.divergence(student, teacher, divergence=divergence.public())
    assert loss.item() == pytest.approx(total, rel=1e-12)


# without the detached mixture, whose dterm is by definition not the slope of its term
@pytest.mark.parametrize(
    "divergence", [s for s in SPECS if not dict(s.params).get("detach_mixture")], ids=str
)
def test_pointwise_dterm_is_the_slope_of_term(divergence):
    for lp, lq in entries():
        if math.isinf(lp) or math.isinf(lq) or lp < -300 or lq < -300 or lp == lq:
            continue
        slope = exact_slope(divergence, lp, lq)
        assert exact_dterm(divergence, lp, lq) == pytest.approx(slope, rel=1e-14), (lp, lq)


@every_divergence
def test_pointwise_c_api_is_exact_float64(divergence):
    # the functors that every compiled kernel includes, through the exported C function
    public = divergence.public()
    pairs = list(entries())
    count = len(pairs)
    array = ctypes.c_double * count
    lp, lq = (array(*column) for column in zip(*pairs, strict=True))
    term, dterm = array(), array()
    library = ctypes.CDLL(str(_library.PATH))
    params = [ctypes.c_double(value) for value in public.kernel_params]
    status = library.opd_divergence_eval(
        public.id, *params, ctypes.c_int64(count), lp, lq, term, dterm
    )
    assert status == 0
    for index, pair in enumerate(pairs):
        exact = exact_term(divergence, *pair), exact_dterm(divergence, *pair)
        got = term[index], dterm[index]
        # log p and log q are given to 1e-16 of themselves, and so is their difference
        size = 1 + max((abs(value) for value in pair if math.isfinite(value)), default=0.0)
        bound = 1e-13 if pair[0] == pair[1] else 4e-16 * size / abs(pair[0] - pair[1]) + 1e-13
        assert got == pytest.approx(exact, rel=bound, abs=1e-40), (pair, exact)


def test_pointwise_grid_covers_the_special_values():
    assert {-math.inf, 0.0, -80.0, -1e4} <= set(GRID)


# -- names and errors ----------------------------------------------------------------------------


def test_parse_takes_a_name_or_a_divergence():
    assert D.parse("jsd") == D.jsd() == D.jsd(beta=0.5) == D.parse("jsd", beta=0.5)
    assert D.parse(D.jsd(0.2)) == D.jsd(beta=0.2)
    assert D.jsd(0.2) != D.jsd(0.3)
    assert len({D.jsd(0.2), D.jsd(0.2), D.reverse_kl()}) == 2
    assert str(D.skew_reverse_kl(0.3)) == "skew_reverse_kl(alpha=0.3, detach_mixture=False)"


def test_every_name_has_a_constructor_and_its_row():
    for name, row in D.DIVERGENCES.items():
        made = getattr(D, name)()
        assert made == D.parse(name)
        assert made.id == row.id
        assert name in D.__all__
        assert len(made.kernel_params) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: D.jsd(beta=0.0),
            ValueError,
            r"jsd: beta must be in \(0, 1\), got 0.0.*forward_kl",
        ),
        (
            lambda: D.jsd(beta=1.0),
            ValueError,
            r"jsd: beta must be in \(0, 1\), got 1.0.*reverse_kl",
        ),
        (lambda: D.jsd(beta=math.nan), ValueError, r"jsd: beta must be in \(0, 1\), got nan"),
        (lambda: D.jsd(beta="half"), TypeError, "jsd: beta must be a number, got 'half'"),
        (lambda: D.jsd(beta=True), TypeError, "jsd: beta must be a number, got True"),
        (lambda: D.skew_forward_kl(alpha=0), ValueError, r"alpha must be in \(0, 1\).*forward_kl"),
        (lambda: D.skew_reverse_kl(alpha=1), ValueError, r"alpha must be in \(0, 1\).*reverse_kl"),
        (
            lambda: D.skew_reverse_kl(detach_mixture=1),
            TypeError,
            "detach_mixture must be True or False, got 1",
        ),
        (lambda: D.parse("jds"), ValueError, "must be one of .*, got 'jds'. Did you mean 'jsd'"),
        (lambda: D.parse("jsd", alpha=0.1), ValueError, "unknown parameter 'alpha'.*beta"),
        (lambda: D.parse(None), TypeError, "must be a name or a Divergence, got NoneType"),
        (lambda: D.parse(D.jsd(), beta=0.1), TypeError, "parameters go with a bare name"),
    ],
)
def test_divergences_reject_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_spec_of_the_tests_is_the_public_divergence():
    for divergence in SPECS:
        assert divergence.public().params == tuple(
            {**dict(D.parse(divergence.name).params), **dict(divergence.params)}.items()
        )
    assert {s.name for s in SPECS} == set(D.DIVERGENCES), spec
