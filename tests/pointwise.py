# SPDX-License-Identifier: Apache-2.0
"""term and dterm of one vocabulary entry in 60 digits: what each port of a divergence is held to.

Written in probabilities, where the compiled code works in logarithms: a KL summand a log(a / b) in
its Bregman form is a log(a / b) - a + b, which is b where a = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import mpmath

from tests.cases import Spec

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


def _term(divergence: Spec, p, q, smallest=0):
    params = {key: mpmath.mpf(value) for key, value in divergence.params}
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
    raise AssertionError(f"tests/pointwise.py has no term for {divergence.name}")


def _dterm(divergence: Spec, p, q, smallest):
    """The derivative of _term by q, times q: written out, so that no differencing is needed."""
    if q < smallest:
        return -p if divergence.name == "forward_kl" else mpmath.mpf(0)
    params = {key: mpmath.mpf(value) for key, value in divergence.params}
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
