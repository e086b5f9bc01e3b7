# SPDX-License-Identifier: Apache-2.0
"""The divergences by name: parameters with ranges, limits, citations.

`D.jsd(beta=0.3)`, `D.reverse_kl()`; wherever an op takes a divergence, a bare name is its default.
P is the teacher, Q the student; formulas, gradients and limits are in docs/divergences.md.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "forward_kl",
    "jsd",
    "parse",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a divergence: its default, its open range, and what to use at the ends."""

    default: float | bool
    low: float | None = None
    high: float | None = None
    at_ends: str = ""


@dataclasses.dataclass(frozen=True)
class Spec:
    """A row of the catalogue; `id` is the one of csrc/include/opd/divergences.h."""

    id: int
    formula: str
    parameters: Mapping[str, Parameter]
    upper_bound: str
    citation: str


DIVERGENCES: Mapping[str, Spec] = MappingProxyType(
    {
        "forward_kl": Spec(0, "KL(P || Q)", {}, "inf", "Hinton et al. 2015, arXiv:1503.02531"),
        "reverse_kl": Spec(1, "KL(Q || P)", {}, "inf", "MiniLLM, arXiv:2306.08543"),
        "jsd": Spec(
            2,
            "beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q",
            {
                "beta": Parameter(
                    0.5,
                    0.0,
                    1.0,
                    "The value tends to 0 at both ends; use divergence='forward_kl' or "
                    "'reverse_kl' for the KLs.",
                )
            },
            "H(beta), the binary entropy",
            "GKD, arXiv:2306.13649",
        ),
        "skew_forward_kl": Spec(
            3,
            "KL(P || alpha P + (1 - alpha) Q)",
            {"alpha": Parameter(0.1, 0.0, 1.0, "Use divergence='forward_kl' for alpha = 0.")},
            "-log alpha",
            "DistiLLM, arXiv:2402.03898",
        ),
        "skew_reverse_kl": Spec(
            4,
            "KL(Q || (1 - alpha) P + alpha Q)",
            {
                "alpha": Parameter(0.1, 0.0, 1.0, "Use divergence='reverse_kl' for alpha = 0."),
                "detach_mixture": Parameter(False),
            },
            "-log alpha",
            "DistiLLM, arXiv:2402.03898; detached in DistiLLM-2, arXiv:2503.07067",
        ),
        "total_variation": Spec(5, "sum |P - Q| / 2", {}, "1", "f-distill, arXiv:2307.15190"),
    }
)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters set. Compare, hash and print it; make one by name."""

    name: str
    params: tuple[tuple[str, float | bool], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", _validated(self.name, dict(self.params)))

    @property
    def id(self) -> int:
        """Number of the divergence in the compiled kernels."""
        return DIVERGENCES[self.name].id

    @property
    def kernel_params(self) -> tuple[float, float]:
        """The parameters as the two floats that the kernels take."""
        values = [float(value) for _, value in self.params]
        return (values[0] if values else 0.0, values[1] if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={value}" for name, value in self.params)
        return f"{self.name}({inside})"


def _validated(
    name: str, given: Mapping[str, float | bool]
) -> tuple[tuple[str, float | bool], ...]:
    if name not in DIVERGENCES:
        close = difflib.get_close_matches(name, DIVERGENCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"divergence: must be one of {', '.join(DIVERGENCES)}, got {name!r}.{hint}"
        )
    parameters = DIVERGENCES[name].parameters
    for key in given:
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"{name}: unknown parameter {key!r}; its parameters: {known}.")
    params = []
    for key, parameter in parameters.items():
        value = given.get(key, parameter.default)
        if isinstance(parameter.default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: {key} must be True or False, got {value!r}.")
        else:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: {key} must be a number, got {value!r}.")
            value = float(value)
            # at least this far inside, or float32 would put it on the end itself
            if not parameter.low + 1e-30 < value < parameter.high - 1e-12:
                raise ValueError(
                    f"{name}: {key} must be in ({parameter.low:g}, {parameter.high:g}), "
                    f"got {value}. {parameter.at_ends}"
                )
        params.append((key, value))
    return tuple(params)


def parse(divergence: str | Divergence, **params: float | bool) -> Divergence:
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
