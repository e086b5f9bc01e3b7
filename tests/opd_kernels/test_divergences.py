# SPDX-License-Identifier: Apache-2.0
"""The catalogue: names, parameters, sums and error texts; and the pointwise form."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _library
from opd_kernels import divergences as D
from tests.cases import F64, LABEL_SPECS, LIMIT_SPECS, SPECS, spec
from tests.pointwise import (
    GRID,
    entries,
    exact_dterm,
    exact_dterm_teacher,
    exact_slope,
    exact_term,
    has_slope,
    is_pointwise,
)

EVERY = tuple(dict.fromkeys((*SPECS, *LIMIT_SPECS)))
POINTWISE = [divergence for divergence in EVERY if is_pointwise(divergence)]
every_pointwise = pytest.mark.parametrize("divergence", POINTWISE, ids=str)


def logits(num_tokens, vocab_size, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, vocab_size)
    return [torch.randn(shape, generator=generator, dtype=F64) * scale for _ in range(2)]


# -- pointwise -----------------------------------------------------------------------------------


def test_orientation_by_hand():
    # P = (3/4, 1/4) is the teacher, Q = (1/2, 1/2)
    teacher, student = (torch.tensor([row], dtype=F64).log() for row in ([0.75, 0.25], [0.5, 0.5]))

    def value(divergence):
        return opk.divergence(student, teacher, divergence=divergence).item()

    log = math.log
    assert value("forward_kl") == pytest.approx(0.75 * log(1.5) - 0.25 * log(2), abs=1e-15)
    assert value("reverse_kl") == pytest.approx(0.5 * log(2 / 3) + 0.5 * log(2), abs=1e-15)
    # beta weighs the teacher: M = (0.7, 0.3) at beta = 0.8
    mixture = 0.8 * (0.75 * log(0.75 / 0.7) + 0.25 * log(0.25 / 0.3)) + 0.2 * (
        0.5 * log(0.5 / 0.7) + 0.5 * log(0.5 / 0.3)
    )
    assert value(D.jsd(beta=0.8)) == pytest.approx(mixture, abs=1e-15)
    # forward: M = alpha P + (1 - alpha) Q; reverse: M = (1 - alpha) P + alpha Q, at alpha = 0.2
    forward = 0.75 * log(0.75 / 0.55) + 0.25 * log(0.25 / 0.45)
    reverse = 0.5 * log(0.5 / 0.7) + 0.5 * log(0.5 / 0.3)
    assert value(D.skew_forward_kl(alpha=0.2)) == pytest.approx(forward, abs=1e-15)
    assert value(D.skew_reverse_kl(alpha=0.2)) == pytest.approx(reverse, abs=1e-15)
    assert value("total_variation") == pytest.approx(0.25, abs=1e-15)
    # weight is that of forward KL, alpha that of the teacher, chi2 named by its denominator
    forward, reverse = value("forward_kl"), value("reverse_kl")
    assert value(D.jeffreys(0.9)) == pytest.approx(0.9 * forward + 0.1 * reverse, abs=1e-15)
    power = 0.75**1.5 * 0.5**-0.5 + 0.25**1.5 * 0.5**-0.5
    assert value(D.alpha(1.5)) == pytest.approx((power - 1) / 0.75, abs=1e-15)
    assert value(D.renyi(1.5)) == pytest.approx(log(power) / 0.5, abs=1e-15)
    assert value("pearson_chi2") == pytest.approx(2 * 0.25**2 / 0.5, abs=1e-15)
    assert value("neyman_chi2") == pytest.approx(0.25**2 / 0.75 + 0.25**2 / 0.25, abs=1e-15)
    # d = log q - log p, and both laws' weights written out
    d, p = (-log(1.5), log(2)), (0.75, 0.25)
    score = sum(p[v] * 0.5 * (d[x] - d[v]) ** 2 / 2 for v in (0, 1) for x in (0, 1))
    assert value(D.concrete_score(("teacher", "student"))) == pytest.approx(score, abs=1e-15)


@every_pointwise
def test_pointwise_terms_sum_to_the_divergence(divergence):
    # the exact pointwise forms of tests/pointwise.py are themselves held by the row op
    student, teacher = logits(1, 12, 8, 1.5)
    lq, lp = (torch.log_softmax(x, -1)[0].tolist() for x in (student, teacher))
    total = math.fsum(exact_term(divergence, p, q) for p, q in zip(lp, lq, strict=True))
    loss = opk.divergence(student, teacher, divergence=divergence.public(), backend="reference")
    assert loss.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("divergence", [s for s in POINTWISE if has_slope(s)], ids=str)
def test_pointwise_dterm_is_the_slope_of_term(divergence):
    for lp, lq in entries():
        # the definitions have a kink at p = q (total variation) or are not finite
        if math.isinf(lp) or math.isinf(lq) or lp < -300 or lq < -300 or lp == lq:
            continue
        slope = exact_slope(divergence, lp, lq)
        assert exact_dterm(divergence, lp, lq) == pytest.approx(slope, rel=1e-14), (lp, lq)


def evaluate(divergence, pairs) -> list[tuple[float, float, float]]:
    """(term, dterm, dterm_teacher) of each entry, from the exported C function."""
    public = divergence.public()
    array = ctypes.c_double * len(pairs)
    lp, lq = (array(*column) for column in zip(*pairs, strict=True))
    outputs, value = (array(), array(), array()), ctypes.c_double()
    status = ctypes.CDLL(str(_library.PATH)).opd_divergence_eval(
        public.id,
        *(ctypes.c_double(param) for param in public.kernel_params),
        ctypes.c_int64(len(pairs)),
        lp,
        lq,
        *outputs,
        ctypes.byref(value),
    )
    assert status == 0
    return list(zip(*outputs, strict=True))


@every_pointwise
def test_pointwise_c_api_is_exact_float64(divergence):
    # the functors that every compiled kernel includes
    pairs = list(entries())
    if divergence.name == "alpha_beta":
        # it takes the row sum of q - p off the gaps: an entry and its mirror image have none
        every = [evaluate(divergence, [pair, pair[::-1]])[0] for pair in pairs]
    else:
        every = evaluate(divergence, pairs)
    for pair, got in zip(pairs, every, strict=True):
        exact = [of(divergence, *pair) for of in (exact_term, exact_dterm, exact_dterm_teacher)]
        # log p and log q are given to 1e-16 of themselves, and so is their difference
        size = 1 + max((abs(value) for value in pair if math.isfinite(value)), default=0.0)
        bound = 1e-13 if pair[0] == pair[1] else 4e-16 * size / abs(pair[0] - pair[1]) + 1e-13
        assert list(got) == pytest.approx(exact, rel=bound, abs=1e-40), (pair, exact)


def test_pointwise_grid_covers_the_special_values():
    assert {-math.inf, 0.0, -80.0, -1e4} <= set(GRID)


# -- names and parameters ------------------------------------------------------------------------


def test_parse_takes_a_name_or_a_divergence():
    assert D.parse("jsd") == D.jsd() == D.jsd(beta=0.5) == D.parse("jsd", beta=0.5)
    assert D.parse(D.jsd(0.2)) == D.jsd(beta=0.2)
    assert D.jsd(0.2) != D.jsd(0.3)
    assert len({D.jsd(0.2), D.jsd(0.2), D.reverse_kl(), D.concrete_score()}) == 3
    assert str(D.skew_reverse_kl(0.3)) == "skew_reverse_kl(alpha=0.3, detach_mixture=False)"
    assert str(D.concrete_score()) == "concrete_score(weights=('student', 'student'))"


def test_every_name_has_a_constructor_and_its_row():
    for name, row in D.DIVERGENCES.items():
        made = getattr(D, name)()
        assert made == D.parse(name)
        assert made.id == row.id
        assert name in D.__all__
        assert len(made.kernel_params) == 2
        assert row.citation and row.formula and row.upper_bound
    assert [row.id for row in D.DIVERGENCES.values()] == list(range(17))


def test_kernel_params_are_the_parameters_in_order():
    assert D.reverse_kl().kernel_params == (0.0, 0.0)
    assert D.jeffreys(0.3).kernel_params == (0.3, 0.0)
    assert D.alpha(1.5).kernel_params == (1.5, 0.0)
    assert D.renyi(2).kernel_params == (2.0, 0.0)
    assert D.adaptive_kl(0.7).kernel_params == (0.7, 0.0)
    assert D.alpha_beta(0.2, -0.7).kernel_params == (0.2, -0.7)
    assert D.skew_reverse_kl(0.3, detach_mixture=True).kernel_params == (0.3, 1.0)
    laws = {"student": 0.0, "teacher": 1.0, "uniform": 2.0}
    for first, number in laws.items():
        for second, other in laws.items():
            assert D.concrete_score((first, second)).kernel_params == (number, other)
    assert D.concrete_score(["teacher", "uniform"]).params[0][1] == ("teacher", "uniform")


def test_alpha_beta_rounds_onto_its_limit_cases():
    assert D.alpha_beta(0.3 - 0.1 - 0.2, 0.7) == D.alpha_beta(0.0, 0.7)
    assert D.alpha_beta(0.3, -0.1 - 0.2) == D.alpha_beta(0.3, -0.3)
    assert D.alpha_beta(1e-13, -1e-14).params == (("alpha", 0.0), ("beta", 0.0))
    assert D.alpha_beta(1e-3, 1e-3).kernel_params == (1e-3, 1e-3)
    # 1 - 0.999 is a little less than 1e-3
    assert D.alpha_beta(1 - 0.999, 0.5) and D.alpha(0.999) and D.renyi(1.001)


def test_parse_sum_is_a_tuple_of_coefficients_and_divergences():
    assert D.parse_sum("jsd") == ((1.0, D.jsd()),)
    assert D.parse_sum(D.todi()) == ((1.0, D.todi()),)
    assert D.parse_sum([(1, "jsd"), (-0.5, D.todi())]) == ((1.0, D.jsd()), (-0.5, D.todi()))
    assert D.parse_sum(((0.0, "jsd"),)) == ((0.0, D.jsd()),)
    gate = torch.ones(3)
    ((coefficient, divergence),) = D.parse_sum([[gate, "forward_kl"]])
    assert coefficient is gate and divergence == D.forward_kl()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: D.jsd(0.0), ValueError, r"jsd: beta must be in \(0, 1\), got 0.0.*forward_kl"),
        (lambda: D.jsd(1.0), ValueError, r"jsd: beta must be in \(0, 1\), got 1.0.*reverse_kl"),
        (lambda: D.jsd(math.nan), ValueError, r"jsd: beta must be in \(0, 1\), got nan"),
        (lambda: D.jsd("half"), TypeError, "jsd: beta must be a number, got 'half'"),
        (lambda: D.jsd(True), TypeError, "jsd: beta must be a number, got True"),
        (lambda: D.skew_forward_kl(0), ValueError, r"alpha must be in \(0, 1\).*forward_kl"),
        (lambda: D.skew_reverse_kl(1), ValueError, r"alpha must be in \(0, 1\).*reverse_kl"),
        (
            lambda: D.skew_reverse_kl(detach_mixture=1),
            TypeError,
            "detach_mixture must be True or False, got 1",
        ),
        (
            lambda: D.jeffreys(1),
            ValueError,
            r"jeffreys: weight must be in \(0, 1\), got 1.0. Use divergence='forward_kl' for "
            r"weight = 1 and 'reverse_kl' for weight = 0.",
        ),
        (lambda: D.jeffreys(0.0), ValueError, "weight must be in .*'reverse_kl' for weight = 0"),
        (
            lambda: D.alpha(1.0),
            ValueError,
            r"alpha: alpha must be in \(-1000, 1000\) and at least 0.001 away from 0 and 1, got "
            r"1.0. Use divergence='forward_kl' for alpha = 1 and 'reverse_kl' for alpha = 0.",
        ),
        (lambda: D.alpha(0.0), ValueError, "at least 0.001 away from 0 and 1, got 0.0"),
        (lambda: D.alpha(1.0001), ValueError, "at least 0.001 away from 0 and 1, got 1.0001"),
        (lambda: D.alpha(math.inf), ValueError, r"in \(-1000, 1000\).*got inf"),
        (lambda: D.alpha(math.nan), ValueError, r"in \(-1000, 1000\).*got nan"),
        (
            lambda: D.renyi(1),
            ValueError,
            r"renyi: alpha must be in \(0, 1000\) and at least 0.001 away from 1, got 1.0. Use "
            r"divergence='forward_kl' for alpha = 1.",
        ),
        (lambda: D.renyi(0.0), ValueError, r"renyi: alpha must be in \(0, 1000\).*got 0.0"),
        (lambda: D.renyi(-1.0), ValueError, r"renyi: alpha must be in \(0, 1000\).*got -1.0"),
        (
            lambda: D.adaptive_kl(1.0),
            ValueError,
            r"adaptive_kl: head_mass must be in \(0, 1\), got 1.0. .*divergence='jeffreys'",
        ),
        (lambda: D.adaptive_kl(0), ValueError, r"head_mass must be in \(0, 1\), got 0.0"),
        (
            lambda: D.alpha_beta(1e-4, 0.5),
            ValueError,
            "alpha_beta: alpha, beta and alpha \\+ beta must each be 0 or at least 0.001 in size, "
            "got alpha=0.0001 and beta=0.5. The limits are continuous: use 0.",
        ),
        (lambda: D.alpha_beta(0.5, -0.5001), ValueError, "must each be 0 or at least 0.001"),
        (lambda: D.alpha_beta(beta=2000), ValueError, r"beta must be in \(-1000, 1000\)"),
        (lambda: D.alpha_beta("a"), TypeError, "alpha_beta: alpha must be a number, got 'a'"),
        (
            lambda: D.concrete_score("student"),
            TypeError,
            r"concrete_score: weights must be a pair out of student, teacher, uniform, got "
            r"'student'. For example weights=\('student', 'student'\).",
        ),
        (lambda: D.concrete_score(("student",)), TypeError, "weights must be a pair out of"),
        (
            lambda: D.concrete_score(("student", "techer")),
            ValueError,
            "weights must be two of student, teacher, uniform, got 'techer'",
        ),
        (lambda: D.parse("jds"), ValueError, "must be one of .*, got 'jds'. Did you mean 'jsd'"),
        (lambda: D.parse("todi", w=1), ValueError, "todi: unknown parameter 'w'.*: none"),
        (lambda: D.parse("jsd", alpha=0.1), ValueError, "unknown parameter 'alpha'.*beta"),
        (lambda: D.parse(None), TypeError, "must be a name or a Divergence, got NoneType"),
        (lambda: D.parse(D.jsd(), beta=0.1), TypeError, "parameters go with a bare name"),
        (lambda: D.parse_sum([]), ValueError, "must have at least one"),
        (lambda: D.parse_sum(None), TypeError, "must be a name or a Divergence, got NoneType"),
        (
            lambda: D.parse_sum((0.5, "jsd")),
            TypeError,
            r"component 0 of a sum must be a pair \(coefficient, divergence\), got 0.5. Write "
            r"divergence=\[\(0.5, 'forward_kl'\), \(0.5, 'reverse_kl'\)\].",
        ),
        (lambda: D.parse_sum([(1, "jsd"), "todi"]), TypeError, "component 1 of a sum must be a"),
        (
            lambda: D.parse_sum([("jsd", 0.5)]),
            TypeError,
            "the coefficient of component 0 must be a number or a tensor .*, got 'jsd'",
        ),
        (lambda: D.parse_sum([(True, "jsd")]), TypeError, "component 0 must be a number .*True"),
        (
            lambda: D.parse_sum([(math.inf, "jsd")]),
            ValueError,
            "the coefficient of component 0 must be finite, got inf",
        ),
        (lambda: D.parse_sum([(1.0, "jds")]), ValueError, "got 'jds'. Did you mean 'jsd'"),
        (lambda: D.parse_sum([(1.0, 2.0)]), TypeError, "a name or a Divergence, got float"),
    ],
)
def test_divergences_reject_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_spec_of_the_tests_is_the_public_divergence():
    for divergence in EVERY:
        assert divergence.public().params == tuple(
            {**dict(D.parse(divergence.name).params), **dict(divergence.params)}.items()
        )
    assert {s.name for s in (*SPECS, *LABEL_SPECS)} == set(D.DIVERGENCES), spec
