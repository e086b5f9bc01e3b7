# SPDX-License-Identifier: Apache-2.0
"""term and dterm of one vocabulary entry in 60 digits: what each port of a divergence is held to.

Written in probabilities, where the compiled code works in logarithms: a KL summand a log(a / b) in
its Bregman form is a log(a / b) - a + b, which is b where a = 0. dterm is fixed up to a multiple of
q only, since such a multiple leaves every gradient unchanged; here it is the one that vanishes at
p = q, as in csrc/include/opd/divergences.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import mpmath

from tests.cases import Spec, spec

GRID = (
    0.0, -1e-7, -1e-3, -0.1, -0.4, -0.6, -0.9, -1.1, -2.0, -5.0, -20.0, -80.0, -86.0, -200.0,
    -1e4, -math.inf,
)  # fmt: skip


def entries() -> Iterator[tuple[float, float]]:
    """(teacher_logprob, student_logprob) on the grid, and pairs that nearly coincide."""
    for lp in GRID:
        for lq in GRID:
            yield lp, lq
        for gap in (1e-6, 1e-4, 1e-2):
            if math.isfinite(lp):
                yield lp, lp - gap
                yield lp - gap, lp


# their terms need sums over the row first, so an entry alone is not enough
ROW_SUMS = frozenset(("renyi", "adaptive_kl", "concrete_score"))
# no gradient of their value: a part of it is held constant
DETACHED = frozenset(("todi", "adaptive_kl", "concrete_score"))


def is_pointwise(divergence: Spec) -> bool:
    """Whether exact_term and exact_dterm know it: D is the sum of its terms, entry by entry."""
    return divergence.name not in ROW_SUMS


def has_slope(divergence: Spec) -> bool:
    """Whether exact_dterm is the derivative of exact_term."""
    return divergence.name not in DETACHED and not dict(divergence.params).get("detach_mixture")


# below these a probability is 0 to the kernels of that width: what it weighs is left out
SMALLEST_FLOAT64 = 5e-324
SMALLEST_FLOAT32 = math.exp(-87.33)


def exact_term(divergence: Spec, lp: float, lq: float, smallest: float = SMALLEST_FLOAT64) -> float:
    """The summand, as a float64."""
    with mpmath.workdps(60):
        p, q = mpmath.exp(mpmath.mpf(lp)), mpmath.exp(mpmath.mpf(lq))
        return float(_term(divergence, p, q, smallest))


def exact_dterm(
    divergence: Spec, lp: float, lq: float, smallest: float = SMALLEST_FLOAT64
) -> float:
    """d term / d log q, as a float64; 0 where q = 0."""
    with mpmath.workdps(60):
        p, q = mpmath.exp(mpmath.mpf(lp)), mpmath.exp(mpmath.mpf(lq))
        return float(_dterm(divergence, p, q, smallest))


def exact_dterm_teacher(
    divergence: Spec, lp: float, lq: float, smallest: float = SMALLEST_FLOAT64
) -> float:
    """d term / d log p, as a float64, up to a multiple of p."""
    if dict(divergence.params).get("detach_mixture"):
        return 0.0
    return exact_dterm(_mirrored(divergence), lq, lp, smallest)


def _mirrored(divergence: Spec) -> Spec:
    """The divergence whose value is the same with teacher and student exchanged."""
    params = dict(divergence.params)
    match divergence.name:
        case "jsd":
            return spec("jsd", beta=1 - params["beta"])
        case "jeffreys":
            return spec("jeffreys", weight=1 - params["weight"])
        case "alpha":
            return spec("alpha", alpha=1 - params["alpha"])
        case "alpha_beta":
            return spec("alpha_beta", alpha=params["beta"], beta=params["alpha"])
    pairs = (
        ("forward_kl", "reverse_kl"),
        ("skew_forward_kl", "skew_reverse_kl"),
        ("pearson_chi2", "neyman_chi2"),
    )
    other = dict(pairs) | {second: first for first, second in pairs}
    return Spec(other.get(divergence.name, divergence.name), divergence.params)


def exact_slope(divergence: Spec, lp: float, lq: float) -> float:
    """d term / d log q by differencing in 60 digits: the check of exact_dterm itself."""
    with mpmath.workdps(60):
        p = mpmath.exp(mpmath.mpf(lp))
        step = mpmath.mpf(10) ** -20
        above, below = (
            _term(divergence, p, mpmath.exp(mpmath.mpf(lq) + sign * step)) for sign in (1, -1)
        )
        return float((above - below) / (2 * step))


def _bregman(a, b, smallest):
    if a < smallest:
        return b
    return mpmath.inf if b == 0 else a * mpmath.log(a / b) - a + b


def _power(base, exponent):
    """base^exponent, with 0^0 = 1 and 0 to a negative power infinite."""
    if base == 0:
        return mpmath.mpf(1) if exponent == 0 else mpmath.inf if exponent < 0 else mpmath.mpf(0)
    return base**exponent


def _gap(p, q):
    """log q - log p of entries that are not both 0."""
    if p == 0 or q == 0:
        return mpmath.inf if p == 0 else -mpmath.inf
    return mpmath.log(q / p)


# name -> (alpha, scale): multiples of alpha divergences
_ALPHA_FAMILY = {
    "squared_hellinger": (mpmath.mpf(1) / 2, mpmath.mpf(1) / 4),
    "pearson_chi2": (mpmath.mpf(2), mpmath.mpf(2)),
    "neyman_chi2": (mpmath.mpf(-1), mpmath.mpf(2)),
}


def _alpha_and_scale(name: str, params: dict):
    return (params["alpha"], mpmath.mpf(1)) if name == "alpha" else _ALPHA_FAMILY[name]


def _numbers(divergence: Spec) -> dict:
    return {key: mpmath.mpf(value) for key, value in divergence.params}


def _alpha_beta_term(alpha, beta, p, q, smallest):
    total = alpha + beta
    # a logarithm, of a ratio that may be infinite, is weighed by this
    if beta == 0 and alpha > 0 and p**alpha < smallest:
        return q**alpha / alpha**2
    if alpha == 0 and beta > 0 and q**beta < smallest:
        return p**beta / beta**2
    if p == 0:
        # any power of 0 but a positive one is infinite, and so is its logarithm
        return mpmath.inf if alpha <= 0 or total <= 0 else q**total / (alpha * total)
    if q == 0:
        return mpmath.inf if beta <= 0 or total <= 0 else p**total / (beta * total)
    log_ratio = mpmath.log(q / p)
    if alpha == 0 and beta == 0:
        return log_ratio**2 / 2
    if alpha == 0:
        return (q**beta * (beta * log_ratio - 1) + p**beta) / beta**2
    if beta == 0:
        return (q**alpha - p**alpha * (alpha * log_ratio + 1)) / alpha**2
    if total == 0:
        return (alpha * log_ratio + (p / q) ** alpha - 1) / alpha**2
    mixed = p**alpha * q**beta
    return -(mixed - (alpha * p**total + beta * q**total) / total) / (alpha * beta)


def _alpha_beta_dterm(alpha, beta, p, q, smallest):
    if alpha == 0:
        if beta > 0 and q**beta < smallest:
            return mpmath.mpf(0)
        return -mpmath.inf if q == 0 else q**beta * _gap(p, q)
    mixed = mpmath.mpf(0) if 0 in (p, q) else p**alpha * q**beta
    if p == 0:
        mixed = _power(p, alpha) * q**beta
    elif q == 0:
        mixed = p**alpha * _power(q, beta)
    own = _power(q, alpha + beta)
    if mpmath.isinf(mixed) and mpmath.isinf(own):
        # q = 0: the larger power of 1 / q decides
        return -mixed / alpha if beta < alpha + beta else own / alpha
    return (own - mixed) / alpha


def _term(divergence: Spec, p, q, smallest=0):
    params = _numbers(divergence)
    if p == 0 and q == 0:
        return mpmath.mpf(0)
    match divergence.name:
        case "forward_kl":
            return _bregman(p, q, smallest)
        case "reverse_kl":
            return _bregman(q, p, smallest)
        case "jsd":
            beta = params["beta"]
            m = beta * p + (1 - beta) * q
            return beta * _bregman(p, m, smallest) + (1 - beta) * _bregman(q, m, smallest)
        case "skew_forward_kl":
            return _bregman(p, params["alpha"] * p + (1 - params["alpha"]) * q, smallest)
        case "skew_reverse_kl":
            return _bregman(q, (1 - params["alpha"]) * p + params["alpha"] * q, smallest)
        case "total_variation":
            return abs(p - q) / 2
        case "jeffreys":
            forward, reverse = _bregman(p, q, smallest), _bregman(q, p, smallest)
            return params["weight"] * forward + (1 - params["weight"]) * reverse
        case "alpha" | "squared_hellinger" | "pearson_chi2" | "neyman_chi2":
            alpha, scale = _alpha_and_scale(divergence.name, params)
            product = _power(p, alpha) * _power(q, 1 - alpha)
            return scale * (product - alpha * p - (1 - alpha) * q) / (alpha * (alpha - 1))
        case "todi":
            return (q - p) * _gap(p, q) if max(p, q) >= smallest else mpmath.mpf(0)
        case "alpha_beta":
            return _alpha_beta_term(params["alpha"], params["beta"], p, q, smallest)
    raise AssertionError(f"tests/pointwise.py has no term for {divergence.name}")


def _dterm(divergence: Spec, p, q, smallest):
    """The derivative of _term by q, times q: written out, so that no differencing is needed."""
    params = _numbers(divergence)
    if p == 0 and q == 0:
        return mpmath.mpf(0)
    match divergence.name:
        case "alpha" | "squared_hellinger" | "pearson_chi2" | "neyman_chi2":
            alpha, scale = _alpha_and_scale(divergence.name, params)
            return scale * (q - _power(p, alpha) * _power(q, 1 - alpha)) / alpha
        case "alpha_beta":
            return _alpha_beta_dterm(params["alpha"], params["beta"], p, q, smallest)
        case "jeffreys":
            forward, reverse = (
                _dterm(Spec(name), p, q, smallest) for name in ("forward_kl", "reverse_kl")
            )
            return params["weight"] * forward + (1 - params["weight"]) * reverse
        case "todi":
            if max(p, q) < smallest:
                return mpmath.mpf(0)
            return q - p + (q * _gap(p, q) * q / (p + q) if q >= smallest else 0)
    if q < smallest:
        return -p if divergence.name == "forward_kl" else mpmath.mpf(0)
    match divergence.name:
        case "forward_kl":
            return q - p
        case "reverse_kl":
            return mpmath.inf if p == 0 else q * mpmath.log(q / p)
        case "jsd":
            beta = params["beta"]
            return (1 - beta) * q * mpmath.log(q / (beta * p + (1 - beta) * q))
        case "skew_forward_kl":
            alpha = params["alpha"]
            m = alpha * p + (1 - alpha) * q
            return q * (1 - alpha) * (1 - p / m)
        case "skew_reverse_kl":
            alpha = params["alpha"]
            m = (1 - alpha) * p + alpha * q
            through_mixture = 0 if params.get("detach_mixture") else alpha * q * (1 - q / m)
            return q * mpmath.log(q / m) + through_mixture
        case "total_variation":
            return q * mpmath.sign(q - p) / 2
    raise AssertionError(f"tests/pointwise.py has no dterm for {divergence.name}")
