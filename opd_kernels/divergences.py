# SPDX-License-Identifier: Apache-2.0
"""The divergences by name: parameters with ranges, limits, citations.

`D.jsd(beta=0.3)`, `D.reverse_kl()`; wherever an op takes a divergence, a bare name is its default,
and a sequence of (coefficient, divergence) is their weighted sum. P is the teacher, Q the student;
formulas, gradients and limits are in docs/divergences.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Sequence

from torch import Tensor

from ._catalogue import DIVERGENCES, LAWS, Value, validated

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "adaptive_kl",
    "alpha",
    "alpha_beta",
    "concrete_score",
    "cross_entropy",
    "forward_kl",
    "jeffreys",
    "jsd",
    "neyman_chi2",
    "parse",
    "parse_sum",
    "pearson_chi2",
    "renyi",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "todi",
    "total_variation",
]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters set. Compare, hash and print it; make one by name."""

    name: str
    params: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            close = difflib.get_close_matches(self.name, DIVERGENCES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"divergence: must be one of {', '.join(DIVERGENCES)}, got {self.name!r}.{hint}"
            )
        object.__setattr__(self, "params", validated(self.name, dict(self.params)))

    @property
    def id(self) -> int:
        """Number of the divergence in the compiled kernels."""
        return DIVERGENCES[self.name].id

    @property
    def kernel_params(self) -> tuple[float, float]:
        """The parameters as the two floats that the kernels take; a law is its place in LAWS."""
        values: list[float] = []
        for _, value in self.params:
            if isinstance(value, tuple):
                values += [float(LAWS.index(law)) for law in value]
            else:
                values.append(float(value))
        return (values[0] if values else 0.0, values[1] if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={value}" for name, value in self.params)
        return f"{self.name}({inside})"


def parse(divergence: str | Divergence, **params: Value) -> Divergence:
    """The divergence of this name, with defaults for what `params` leaves out.

    Raises:
        ValueError: no such divergence or parameter, or a value out of its range.
        TypeError: neither a name nor a Divergence, or a parameter of the wrong type.
    """
    if isinstance(divergence, Divergence):
        if params:
            raise TypeError(
                f"divergence: parameters go with a bare name, got {divergence} and {params}."
            )
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence: must be a name or a Divergence, got {type(divergence).__name__}."
        )
    return Divergence(divergence, tuple(params.items()))


def parse_sum(
    divergence: str | Divergence | Sequence[tuple[float | Tensor, str | Divergence]],
) -> tuple[tuple[float | Tensor, Divergence], ...]:
    """sum_j c_j D_j as ((c_1, D_1), ...); one divergence is ((1.0, D),).

    Tensor coefficients ([T], one per token) are passed on as they are: the op checks them.

    Raises:
        ValueError: an empty sum, a coefficient that is not finite, or what `parse` refuses.
        TypeError: an element that is not a pair, a coefficient that is neither number nor tensor,
            or what `parse` refuses.
    """
    if isinstance(divergence, (str, Divergence)) or not isinstance(divergence, (tuple, list)):
        return ((1.0, parse(divergence)),)  # type: ignore[arg-type]
    if not divergence:
        raise ValueError("divergence: a sum must have at least one (coefficient, divergence).")
    return tuple(_component(position, item) for position, item in enumerate(divergence))


def _component(position: int, item: object) -> tuple[float | Tensor, Divergence]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"divergence: component {position} of a sum must be a pair (coefficient, divergence), "
            f"got {item!r}. Write divergence=[(0.5, 'forward_kl'), (0.5, 'reverse_kl')]."
        )
    coefficient, divergence = item
    if isinstance(coefficient, Tensor):
        return coefficient, parse(divergence)
    if isinstance(coefficient, bool) or not isinstance(coefficient, numbers.Real):
        raise TypeError(
            f"divergence: the coefficient of component {position} must be a number or a tensor of "
            f"one number per token, got {coefficient!r}."
        )
    if not -math.inf < coefficient < math.inf:
        raise ValueError(
            f"divergence: the coefficient of component {position} must be finite, "
            f"got {coefficient}."
        )
    return float(coefficient), parse(divergence)


def forward_kl() -> Divergence:
    """KL(P || Q), P the teacher: sum_v p_v (log p_v - log q_v). Source: arXiv:1503.02531."""
    return Divergence("forward_kl")


def reverse_kl() -> Divergence:
    """KL(Q || P), Q the student: sum_v q_v (log q_v - log p_v). Source: arXiv:2306.08543."""
    return Divergence("reverse_kl")


def jsd(beta: float = 0.5) -> Divergence:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, 0 < beta < 1.

    beta is the weight on the teacher. Source: GKD, arXiv:2306.13649, eq. (1).
    """
    return Divergence("jsd", (("beta", beta),))


def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """KL(P || alpha P + (1 - alpha) Q), 0 < alpha < 1. Source: DistiLLM, arXiv:2402.03898."""
    return Divergence("skew_forward_kl", (("alpha", alpha),))


def skew_reverse_kl(alpha: float = 0.1, detach_mixture: bool = False) -> Divergence:
    """KL(Q || (1 - alpha) P + alpha Q), 0 < alpha < 1; optionally no gradient through the mixture.

    Source: DistiLLM, arXiv:2402.03898; detached: DistiLLM-2, arXiv:2503.07067.
    """
    params = (("alpha", alpha), ("detach_mixture", detach_mixture))
    return Divergence("skew_reverse_kl", params)


def total_variation() -> Divergence:
    """sum_v |p_v - q_v| / 2. Source: f-distill, arXiv:2307.15190."""
    return Divergence("total_variation")


def jeffreys(weight: float = 0.5) -> Divergence:
    """weight KL(P || Q) + (1 - weight) KL(Q || P), 0 < weight < 1.

    Source: Jeffreys 1946, doi:10.1098/rspa.1946.0056.
    """
    return Divergence("jeffreys", (("weight", weight),))


def squared_hellinger() -> Divergence:
    """1 - sum_v sqrt(p_v q_v), in [0, 1].

    Source: Csiszar and Shields 2004, doi:10.1561/0100000004.
    """
    return Divergence("squared_hellinger")


def alpha(alpha: float = 0.5) -> Divergence:
    """(sum_v p_v^alpha q_v^(1 - alpha) - 1) / (alpha (alpha - 1)), alpha neither 0 nor 1.

    alpha -> 1 is forward KL, alpha -> 0 reverse KL; alpha stays 1e-3 away from both.

    Source: Amari 2009, doi:10.1109/TIT.2009.2030485.
    """
    return Divergence("alpha", (("alpha", alpha),))


def renyi(alpha: float = 0.5) -> Divergence:
    """log(sum_v p_v^alpha q_v^(1 - alpha)) / (alpha - 1), alpha > 0 and not 1.

    alpha -> 1 is forward KL; alpha stays 1e-3 away from it.

    Source: van Erven and Harremoes 2014, arXiv:1206.2459.
    """
    return Divergence("renyi", (("alpha", alpha),))


def pearson_chi2() -> Divergence:
    """sum_v (p_v - q_v)^2 / q_v: the student in the denominator. Source: Pearson 1900."""
    return Divergence("pearson_chi2")


def neyman_chi2() -> Divergence:
    """sum_v (p_v - q_v)^2 / p_v: the teacher in the denominator. Source: Neyman 1949."""
    return Divergence("neyman_chi2")


def todi() -> Divergence:
    """sum_v w_v p_v log(p_v / q_v) + (1 - w_v) q_v log(q_v / p_v), w = p / (p + q) detached.

    Its value is KL(P || Q) + KL(Q || P), its gradient is not. Source: ToDi, arXiv:2505.16297.
    """
    return Divergence("todi")


def adaptive_kl(head_mass: float = 0.5) -> Divergence:
    """(g_head KL(P || Q) + g_tail KL(Q || P)) / (g_head + g_tail), 0 < head_mass < 1.

    g is sum |p - q|, detached, over the head and over the rest; the head are the teacher's most
    probable tokens of at most head_mass together, equal probabilities staying together, and the
    most probable alone if it exceeds that. Source: AKL, arXiv:2404.02657.
    """
    return Divergence("adaptive_kl", (("head_mass", head_mass),))


def alpha_beta(alpha: float = 0.2, beta: float = 0.7) -> Divergence:
    """-sum_v (p^alpha q^beta - alpha/s p^s - beta/s q^s) / (alpha beta), s = alpha + beta.

    alpha, beta and s are each 0 or at least 1e-3 in size; at 0 it is the continuous limit: (1, 0)
    is forward KL, (0, 1) reverse KL. Source: ABKD, arXiv:2505.04560; Cichocki et al. 2011,
    doi:10.3390/e13010134.
    """
    return Divergence("alpha_beta", (("alpha", alpha), ("beta", beta)))


def concrete_score(weights: tuple[str, str] = ("student", "student")) -> Divergence:
    """sum_xv w1(v) w2(x) (d_x - d_v)^2 / 2, d = log q - log p; weights detached.

    Each weight is the law "student", "teacher" or "uniform". Source: CSD, arXiv:2509.25837.
    """
    return Divergence("concrete_score", (("weights", weights),))


def cross_entropy() -> Divergence:
    """-sum_k label_weights[k] log q(labels[k]): needs the op's `labels`; no teacher in it.

    Source: SeqKD, arXiv:1606.07947; sparse targets: RS-KD, arXiv:2503.16870.
    """
    return Divergence("cross_entropy")
