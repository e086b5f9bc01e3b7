# SPDX-License-Identifier: Apache-2.0
"""What must hold of any divergence on any laws: signs, zeros, invariances, limits, identities.

Each backend is held to the same mathematics here, in float64, without a second implementation to
compare it with. `pytest --hypothesis-profile=search` looks further than the fixed examples.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import opd_kernels as opk
from opd_kernels import divergences as D
from opd_kernels import targets
from tests.cases import F32, F64, INF, LIMIT_SPECS, SPECS, Spec
from tests.checks import leaf

BACKENDS = ("reference", "cpu")
EVERY = tuple(dict.fromkeys((*SPECS, *LIMIT_SPECS)))

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_divergence = pytest.mark.parametrize("divergence", EVERY, ids=str)
sizes, seeds = st.integers(1, 40), st.integers(0, 2**31)
scales = st.sampled_from([0.0, 1e-4, 0.1, 1.0, 10.0])
inner = st.floats(0.02, 0.98)


def logits(num_tokens: int, vocab_size: int, seed: int, scale: float, count: int = 2):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, vocab_size)
    return [torch.randn(shape, generator=generator, dtype=F64) * scale for _ in range(count)]


def solve(backend: str, student: Tensor, teacher: Tensor, divergence, **keywords):
    """(loss [T], gradient [T, V])."""
    z = leaf(student)
    public = divergence.public() if isinstance(divergence, Spec) else divergence
    loss = opk.divergence(z, teacher, divergence=public, backend=backend, **keywords)
    loss.sum().backward()
    return loss.detach(), z.grad


def assert_close(actual, expected, rtol=1e-10, atol=1e-12):
    """Losses and gradients, the latter by row: a small element of a large row is as exact as it."""
    for got, exact in zip(actual, expected, strict=True):
        size = exact.abs().reshape(len(exact), -1).amax(1)
        error = (got - exact).abs().reshape(len(exact), -1).amax(1)
        assert bool((error <= atol + rtol * size).all()), (got, exact)


# -- of every divergence -------------------------------------------------------------------------


@every_backend
@every_divergence
@given(vocab_size=sizes, seed=seeds, scale=scales)
def test_divergence_is_never_negative(backend, divergence, vocab_size, seed, scale):
    student, teacher = logits(3, vocab_size, seed, scale)
    loss, _ = solve(backend, student, teacher, divergence)
    # the kernels sum terms that are not negative; the reference subtracts
    assert bool((loss >= (-1e-12 if backend == "reference" else 0)).all()), loss
    if backend == "cpu":
        single, _ = solve(backend, student.to(F32), teacher.to(F32), divergence)
        assert bool((single >= 0).all()), single


@every_backend
@every_divergence
@given(vocab_size=sizes, seed=seeds, scale=scales)
def test_divergence_of_a_law_from_itself_is_zero(backend, divergence, vocab_size, seed, scale):
    student = logits(2, vocab_size, seed, scale)[0]
    loss, gradient = solve(backend, student, student, divergence)
    exact = backend == "cpu"
    assert loss.abs().max() <= (0 if exact else 1e-12)
    assert gradient.abs().max() <= (1e-15 if exact else 1e-12)


@every_backend
@every_divergence
@given(vocab_size=sizes, seed=seeds, scale=scales)
def test_gradient_sums_to_zero_over_the_vocabulary(backend, divergence, vocab_size, seed, scale):
    student, teacher = logits(3, vocab_size, seed, scale)
    loss, gradient = solve(backend, student, teacher, divergence, temperature=1.3)
    # each part carries eps |z|; what is subtracted is of the size of the loss
    size = 1 + gradient.abs().sum(1) + 4 * loss.abs()
    bound = 8 * torch.finfo(F64).eps * (1 + scale) ** 2 * size
    assert bool((gradient.sum(1).abs() <= bound).all())


@every_backend
@every_divergence
@given(seed=seeds, student_shift=st.floats(-50, 50), teacher_shift=st.floats(-50, 50))
def test_constants_added_to_rows_change_nothing(
    backend, divergence, seed, student_shift, teacher_shift
):
    student, teacher = logits(3, 20, seed, 2.0)
    expected = solve(backend, student, teacher, divergence)
    shifted = solve(backend, student + student_shift, teacher + teacher_shift, divergence)
    assert_close(shifted, expected)


@every_backend
@every_divergence
@given(vocab_size=sizes, seed=seeds)
def test_the_order_of_the_vocabulary_changes_nothing(backend, divergence, vocab_size, seed):
    student, teacher = logits(2, vocab_size, seed, 2.0)
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    loss, gradient = solve(backend, student, teacher, divergence)
    permuted = solve(
        backend, student[:, order].contiguous(), teacher[:, order].contiguous(), divergence
    )
    assert_close(permuted, (loss, gradient[:, order]))


@every_backend
@every_divergence
@given(vocab_size=sizes, seed=seeds)
def test_tokens_that_neither_model_has_change_nothing(backend, divergence, vocab_size, seed):
    student, teacher = logits(2, vocab_size, seed, 2.0)
    loss, gradient = solve(backend, student, teacher, divergence)
    absent = torch.full((2, 3), -INF, dtype=F64)
    wider = (torch.cat([absent[:, :1], x, absent[:, 1:]], dim=1) for x in (student, teacher))
    wide_loss, wide_gradient = solve(backend, *wider, divergence)
    assert_close((wide_loss, wide_gradient[:, 1:-2]), (loss, gradient))
    assert wide_gradient[:, [0, -2, -1]].abs().max() == 0


@every_backend
@every_divergence
@given(seed=seeds, temperature=st.floats(0.2, 5.0))
def test_temperature_divides_the_logits(backend, divergence, seed, temperature):
    student, teacher = logits(2, 20, seed, 2.0)
    loss, gradient = solve(backend, student / temperature, teacher / temperature, divergence)
    actual = solve(backend, student, teacher, divergence, temperature=temperature)
    assert_close(actual, (loss, gradient / temperature))


# -- bounds --------------------------------------------------------------------------------------


@every_backend
@given(seed=seeds, scale=scales, parameter=inner)
def test_bounded_divergences_stay_below_their_bounds(backend, seed, scale, parameter):
    student, teacher = logits(3, 30, seed, 10 * scale)
    entropy = -parameter * math.log(parameter) - (1 - parameter) * math.log1p(-parameter)
    for divergence, bound in (
        (D.jsd(parameter), entropy),
        (D.skew_forward_kl(parameter), -math.log(parameter)),
        (D.skew_reverse_kl(parameter), -math.log(parameter)),
        (D.total_variation(), 1.0),
        (D.squared_hellinger(), 1.0),
        (D.alpha(parameter), 1 / (parameter * (1 - parameter))),
    ):
        loss, _ = solve(backend, student, teacher, divergence)
        assert bool((loss <= bound * (1 + 1e-12)).all()), divergence


@every_backend
@given(seed=seeds, scale=scales)
def test_divergences_bound_each_other(backend, seed, scale):
    student, teacher = logits(3, 30, seed, scale)

    def value(divergence):
        return solve(backend, student, teacher, divergence)[0]

    variation, hellinger = value("total_variation"), value("squared_hellinger")
    slack = 1e-12
    assert bool((hellinger <= variation + slack).all())
    assert bool((variation <= (2 * hellinger.clamp_min(0)).sqrt() + slack).all())
    for name in ("forward_kl", "reverse_kl"):
        assert bool((value(name) >= 2 * variation**2 - slack).all())
    # Renyi's grows with its order, through forward KL at 1
    grown = [value(D.renyi(0.3)), value(D.renyi(0.8)), value("forward_kl"), value(D.renyi(2.0))]
    for smaller, larger in itertools.pairwise(grown):
        assert bool((smaller <= larger * (1 + 1e-12) + slack).all())


@every_backend
def test_jsd_of_laws_that_share_nothing_is_log_two(backend):
    student = torch.tensor([[0.0, -INF]], dtype=F64)
    teacher = torch.tensor([[-INF, 0.0]], dtype=F64)
    for divergence, bound in (
        ("jsd", math.log(2)),
        ("total_variation", 1.0),
        ("squared_hellinger", 1.0),
        (D.skew_forward_kl(0.1), -math.log(0.1)),
        (D.skew_reverse_kl(0.1), -math.log(0.1)),
        (D.alpha(0.5), 4.0),
        (D.renyi(0.5), INF),
    ):
        loss = opk.divergence(student, teacher, divergence=divergence, backend=backend)
        assert loss.item() == pytest.approx(bound, rel=1e-15), divergence


# -- limits --------------------------------------------------------------------------------------

# name -> (divergence at a distance from the limit, factor, limit, smallest distance in float32): a
# gradient that is a difference of logarithms of size beta is good to eps / beta
LIMITS = {
    "jsd-to-forward": (lambda e: D.jsd(beta=e), lambda e: 1 / e, "forward_kl", 1e-4),
    "jsd-to-reverse": (lambda e: D.jsd(beta=1 - e), lambda e: 1 / e, "reverse_kl", 1e-8),
    "skew_forward": (D.skew_forward_kl, None, "forward_kl", 1e-8),
    "skew_reverse": (D.skew_reverse_kl, None, "reverse_kl", 1e-8),
    "jeffreys-to-forward": (lambda e: D.jeffreys(1 - e), None, "forward_kl", 1e-8),
    "jeffreys-to-reverse": (D.jeffreys, None, "reverse_kl", 1e-8),
}


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "end"),
    [
        (backend, name, dtype, end)
        for backend in BACKENDS
        for name, (_, _, _, smallest) in LIMITS.items()
        for dtype in ((F64,) if backend == "reference" else (F64, F32))
        for end in (1e-4, 1e-6, 1e-8)
        if dtype == F64 or end >= smallest
    ],
)
def test_divergence_tends_to_its_limits(backend, name, dtype, end):
    near_end, scale, limit, _ = LIMITS[name]
    student, teacher = (x.to(dtype) for x in logits(4, 50, 11, 1.0))
    factor = 1.0 if scale is None else scale(end)
    near = solve(backend, student, teacher, near_end(end))
    far = solve(backend, student, teacher, limit)
    # the rate of convergence is that of the parameter
    bound = 200 * end + (0.0 if dtype == F64 else 1e-5)
    for close, exact in zip(near, far, strict=True):
        torch.testing.assert_close(close * factor, exact, rtol=bound, atol=bound)


# exponents are a limit case or at least 1e-3 away from it
EXPONENT_LIMITS = {
    "alpha-to-forward": (lambda e: D.alpha(1 - e), "forward_kl"),
    "alpha-beyond-forward": (lambda e: D.alpha(1 + e), "forward_kl"),
    "alpha-to-reverse": (D.alpha, "reverse_kl"),
    "alpha-beyond-reverse": (lambda e: D.alpha(-e), "reverse_kl"),
    "renyi-to-forward": (lambda e: D.renyi(1 - e), "forward_kl"),
    "renyi-beyond-forward": (lambda e: D.renyi(1 + e), "forward_kl"),
    "alpha_beta-to-forward": (lambda e: D.alpha_beta(1, e), "forward_kl"),
    "alpha_beta-to-reverse": (lambda e: D.alpha_beta(e, 1), "reverse_kl"),
    "alpha_beta-alpha": (lambda e: D.alpha_beta(-e, 0.7), D.alpha_beta(0, 0.7)),
    "alpha_beta-beta": (lambda e: D.alpha_beta(0.4, -e), D.alpha_beta(0.4, 0)),
    "alpha_beta-sum": (lambda e: D.alpha_beta(0.5, e - 0.5), D.alpha_beta(0.5, -0.5)),
    "alpha_beta-both": (lambda e: D.alpha_beta(e, e), D.alpha_beta(0, 0)),
    "alpha_beta-both-sum": (lambda e: D.alpha_beta(e, -e), D.alpha_beta(0, 0)),
    "alpha_beta-both-beta": (lambda e: D.alpha_beta(e, 0), D.alpha_beta(0, 0)),
}


@every_backend
@pytest.mark.parametrize("name", EXPONENT_LIMITS)
def test_exponents_tend_to_their_limits_at_the_rate_of_the_exponent(backend, name):
    near_end, limit = EXPONENT_LIMITS[name]
    student, teacher = logits(4, 50, 11, 1.0)
    far = solve(backend, student, teacher, limit)
    distances = (4e-3, 2e-3, 1e-3)
    # the limit lies on the parabola through the three
    weights = (1 / 3, -2.0, 8 / 3)
    near = [solve(backend, student, teacher, near_end(end)) for end in distances]
    for index, exact in enumerate(far):
        extrapolated = sum(w * values[index] for w, values in zip(weights, near, strict=True))
        torch.testing.assert_close(extrapolated, exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(near[2][index], exact, rtol=5e-2, atol=5e-2)


# -- identities ----------------------------------------------------------------------------------


def scaled(factor: float, pair):
    return tuple(factor * part for part in pair)


@every_backend
@given(seed=seeds, scale=scales, order=st.floats(0.05, 0.95))
def test_alpha_family_is_one_family(backend, seed, scale, order):
    student, teacher = logits(3, 30, seed, scale)

    def of(divergence):
        return solve(backend, student, teacher, divergence)

    half = of(D.alpha(0.5))
    assert_close(half, scaled(4, of("squared_hellinger")))
    assert_close(half, of(D.alpha_beta(0.5, 0.5)))
    assert_close(of(D.alpha_beta(order, 1 - order)), of(D.alpha(order)), rtol=1e-9)
    assert_close(of(D.alpha_beta(1.5, -0.5)), of(D.alpha(1.5)), rtol=1e-9)
    assert_close(scaled(2, of(D.alpha(2.0))), of("pearson_chi2"))
    assert_close(scaled(2, of(D.alpha(-1.0))), of("neyman_chi2"))
    assert_close(of(D.alpha_beta(1.0, 0.0)), of("forward_kl"))
    assert_close(of(D.alpha_beta(0.0, 1.0)), of("reverse_kl"))
    # D_2 = log(1 + chi2), D_1/2 = -2 log(1 - Hellinger^2)
    assert_close(of(D.renyi(2.0))[:1], (torch.log1p(of("pearson_chi2")[0]),))
    assert_close(of(D.renyi(0.5))[:1], (-2 * torch.log1p(-of("squared_hellinger")[0]),))


@every_backend
@given(seed=seeds, parameter=inner)
def test_exchanging_the_models_exchanges_the_divergences(backend, seed, parameter):
    student, teacher = logits(3, 30, seed, 2.0)
    for one, other in (
        ("forward_kl", "reverse_kl"),
        (D.skew_forward_kl(parameter), D.skew_reverse_kl(parameter)),
        (D.jsd(parameter), D.jsd(1 - parameter)),
        (D.jeffreys(parameter), D.jeffreys(1 - parameter)),
        (D.alpha(parameter), D.alpha(1 - parameter)),
        (D.alpha_beta(parameter, 0.3), D.alpha_beta(0.3, parameter)),
        ("pearson_chi2", "neyman_chi2"),
        ("total_variation", "total_variation"),
        ("squared_hellinger", "squared_hellinger"),
        ("todi", "todi"),
    ):
        forth = solve(backend, student, teacher, one)[:1]
        assert_close(forth, solve(backend, teacher, student, other)[:1])


@every_backend
@given(seed=seeds)
def test_what_is_held_constant_changes_the_gradient_and_not_the_value(backend, seed):
    student, teacher = logits(3, 30, seed, 2.0)

    def of(divergence):
        return solve(backend, student, teacher, divergence)

    jeffreys, todi = scaled(2, of(D.jeffreys(0.5))), of("todi")
    assert_close(todi[:1], jeffreys[:1])
    assert (todi[1] - jeffreys[1]).abs().max() > 1e-3
    live, detached = of(D.skew_reverse_kl(0.3)), of(D.skew_reverse_kl(0.3, detach_mixture=True))
    assert_close(detached[:1], live[:1])
    assert (detached[1] - live[1]).abs().max() > 1e-3
    # concrete score matching under the student's own law
    assert_close(of("concrete_score")[1:], scaled(2, of("reverse_kl"))[1:])


@every_backend
@given(seed=seeds, weight=inner)
def test_sums_are_linear(backend, seed, weight):
    student, teacher = logits(3, 30, seed, 2.0)
    parts = [(weight, "forward_kl"), (1 - weight, "reverse_kl")]
    assert_close(
        solve(backend, student, teacher, parts),
        solve(backend, student, teacher, D.jeffreys(weight)),
    )
    column = torch.tensor([0.0, -1.5, 2.0], dtype=F64)
    alone = solve(backend, student, teacher, D.jsd(weight))
    summed = solve(backend, student, teacher, [(column, D.jsd(weight)), (column, D.jsd(weight))])
    assert_close(summed, (2 * column * alone[0], 2 * column.unsqueeze(1) * alone[1]))


@every_backend
@given(seed=seeds)
def test_cross_entropy_with_the_teachers_law_is_forward_kl_and_its_entropy(backend, seed):
    student, teacher = logits(3, 12, seed, 2.0)
    probs = torch.softmax(teacher, dim=-1)
    labels = torch.arange(12).expand(3, 12).contiguous()
    soft = solve(backend, student, teacher, "cross_entropy", labels=labels, label_weights=probs)
    value, gradient = solve(backend, student, teacher, "forward_kl")
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    assert_close(soft, (value + entropy, gradient))


# -- targets -------------------------------------------------------------------------------------


@every_backend
@every_divergence
@given(seed=seeds)
def test_target_of_the_teacher_alone_is_no_target(backend, divergence, seed):
    student, teacher = logits(2, 30, seed, 2.0)
    expected = solve(backend, student, teacher, divergence)
    for target in (targets.geometric(0.0, 1.0), targets.mixture(1.0, detach=False)):
        assert_close(solve(backend, student, teacher, divergence, target=target), expected)


@every_backend
@given(seed=seeds, t=inner)
def test_taid_has_the_gradient_of_renyi(backend, seed, t):
    student, teacher = logits(3, 30, seed, 2.0)
    taid = solve(backend, student, teacher, "forward_kl", target=targets.geometric(1 - t, t))
    assert_close(taid[1:], solve(backend, student, teacher, D.renyi(t))[1:])


@every_backend
@given(seed=seeds, weight=inner)
def test_mixture_targets_are_the_skewed_divergences(backend, seed, weight):
    student, teacher = logits(3, 30, seed, 2.0)
    for detach in (False, True):
        mixed = solve(
            backend, student, teacher, "reverse_kl", target=targets.mixture(weight, detach=detach)
        )
        skewed = D.skew_reverse_kl(1 - weight, detach_mixture=detach)
        assert_close(mixed, solve(backend, student, teacher, skewed))
    live = targets.mixture(weight, detach=False)
    student_half = solve(backend, student, teacher, "reverse_kl", target=live)
    teacher_half = solve(backend, student, teacher, D.skew_forward_kl(weight))
    halves = zip(student_half, teacher_half, strict=True)
    jsd = solve(backend, student, teacher, D.jsd(weight))
    assert_close([(1 - weight) * s + weight * t for s, t in halves], jsd)


@every_backend
@given(seed=seeds, reward_scale=st.floats(0.2, 2.0))
def test_extrapolated_target_is_a_sum_of_two_reverse_kls(backend, seed, reward_scale):
    # lam KL(Q || P) + (1 - lam) KL(Q || R) = KL(Q || T) - log sum P^lam R^(1 - lam)
    student, teacher, reference = logits(3, 30, seed, 2.0, count=3)
    target = targets.geometric(teacher=reward_scale, reference=1 - reward_scale)
    value, gradient = solve(
        backend, student, teacher, "reverse_kl", target=target, reference_logits=reference
    )
    log_p, log_r = (torch.log_softmax(x, -1) for x in (teacher, reference))
    log_z = (reward_scale * log_p + (1 - reward_scale) * log_r).logsumexp(-1)
    to_teacher = solve(backend, student, teacher, "reverse_kl")
    to_reference = solve(backend, student, reference, "reverse_kl")
    both = [
        reward_scale * one + (1 - reward_scale) * other
        for one, other in zip(to_teacher, to_reference, strict=True)
    ]
    assert_close((value - log_z, gradient), both)


@every_backend
@given(seed=seeds, beta=st.floats(0.1, 0.9))
def test_veto_rests_where_the_student_is_the_sharpened_teacher(backend, seed, beta):
    # Q ~ P Q^beta at Q ~ P^(1 / (1 - beta)); its gradient vanishes there, detached or live
    teacher = logits(2, 20, seed, 1.0)[0]
    student = teacher / (1 - beta)
    for name in ("forward_kl", "reverse_kl"):
        for detach in (True, False):
            target = targets.geometric(beta, 1.0, detach=detach)
            loss, gradient = solve(backend, student, teacher, name, target=target)
            assert loss.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
