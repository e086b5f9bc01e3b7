# SPDX-License-Identifier: Apache-2.0
"""The catalogue of divergences: one row each, with what its parameters may be.

`opd_kernels.divergences` is its public face. P is the teacher, Q the student.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from types import MappingProxyType

# a real parameter that a kernel raises probabilities to stays inside; beyond, everything overflows
LARGEST_EXPONENT = 1000.0
# an exponent is a limit case or this far from it: what lies between loses its digits in float32
LEAST_EXPONENT = 1e-3
# closer than this is meant to be equal: 0.3 - 0.1 - 0.2 is 0
CLOSE = 1e-12

LAWS = ("student", "teacher", "uniform")

Value = float | bool | tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its default, its open range less the excluded points, what to use there."""

    default: Value
    low: float = -LARGEST_EXPONENT
    high: float = LARGEST_EXPONENT
    at_ends: str = ""
    excluded: tuple[float, ...] = ()

    def checked(self, owner: str, key: str, value: object) -> Value:
        """The value in its canonical type.

        Raises:
            TypeError, ValueError: in words that name the owner and the way out.
        """
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{owner}: {key} must be True or False, got {value!r}.")
            return value
        if isinstance(self.default, tuple):
            return _pair_of_laws(owner, key, value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{owner}: {key} must be a number, got {value!r}.")
        number = float(value)
        # at least this far inside, or float32 would put it on the end itself
        inside = self.low + 1e-30 < number < self.high - CLOSE
        for point in self.excluded:
            # a little less, so that 1 - 0.999 passes
            inside = inside and abs(number - point) > LEAST_EXPONENT - CLOSE
        if not inside:
            besides = " and ".join(f"{point:g}" for point in self.excluded)
            away = f" and at least {LEAST_EXPONENT:g} away from {besides}" if besides else ""
            raise ValueError(
                f"{owner}: {key} must be in ({self.low:g}, {self.high:g}){away}, got {number}. "
                f"{self.at_ends}".rstrip()
            )
        return number


def _pair_of_laws(owner: str, key: str, value: object) -> tuple[str, str]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"{owner}: {key} must be a pair out of {', '.join(LAWS)}, got {value!r}. "
            f"For example {key}=('student', 'student')."
        )
    for law in value:
        if law not in LAWS:
            raise ValueError(f"{owner}: {key} must be two of {', '.join(LAWS)}, got {law!r}.")
    return value[0], value[1]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A row of the catalogue; `id` is the one of csrc/include/opd/divergences.h."""

    id: int
    formula: str
    parameters: Mapping[str, Parameter]
    upper_bound: str
    citation: str


_KL_ENDS = "Use divergence='forward_kl' for {0} = 1 and 'reverse_kl' for {0} = 0."

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
        "jeffreys": Spec(
            6,
            "weight KL(P || Q) + (1 - weight) KL(Q || P)",
            {"weight": Parameter(0.5, 0.0, 1.0, _KL_ENDS.format("weight"))},
            "inf",
            "Jeffreys 1946, doi:10.1098/rspa.1946.0056",
        ),
        "squared_hellinger": Spec(
            7,
            "1 - sum sqrt(P Q) = sum (sqrt P - sqrt Q)^2 / 2",
            {},
            "1",
            "Hellinger 1909; as a divergence Csiszar and Shields 2004, doi:10.1561/0100000004",
        ),
        "alpha": Spec(
            8,
            "(sum P^alpha Q^(1 - alpha) - 1) / (alpha (alpha - 1))",
            {"alpha": Parameter(0.5, at_ends=_KL_ENDS.format("alpha"), excluded=(0.0, 1.0))},
            "1 / (alpha (1 - alpha)) for alpha in (0, 1), else inf",
            "Amari 2009, doi:10.1109/TIT.2009.2030485",
        ),
        "renyi": Spec(
            9,
            "log(sum P^alpha Q^(1 - alpha)) / (alpha - 1)",
            {
                "alpha": Parameter(
                    0.5, 0.0, at_ends="Use divergence='forward_kl' for alpha = 1.", excluded=(1.0,)
                )
            },
            "inf",
            "Renyi 1961; van Erven and Harremoes 2014, arXiv:1206.2459",
        ),
        "pearson_chi2": Spec(10, "sum (P - Q)^2 / Q", {}, "inf", "Pearson 1900"),
        "neyman_chi2": Spec(11, "sum (P - Q)^2 / P", {}, "inf", "Neyman 1949"),
        "todi": Spec(
            12,
            "sum w P log(P / Q) + (1 - w) Q log(Q / P), w = P / (P + Q) detached",
            {},
            "inf",
            "ToDi, arXiv:2505.16297",
        ),
        "adaptive_kl": Spec(
            13,
            "(g_head KL(P || Q) + g_tail KL(Q || P)) / (g_head + g_tail), g = sum |P - Q| detached",
            {
                "head_mass": Parameter(
                    0.5,
                    0.0,
                    1.0,
                    "It is the most probability that the teacher's head may hold; for fixed "
                    "weights use divergence='jeffreys'.",
                )
            },
            "inf",
            "AKL, arXiv:2404.02657",
        ),
        "alpha_beta": Spec(
            14,
            "-sum(P^alpha Q^beta - alpha/s P^s - beta/s Q^s) / (alpha beta), s = alpha + beta",
            {"alpha": Parameter(0.2), "beta": Parameter(0.7)},
            "inf",
            "ABKD, arXiv:2505.04560; Cichocki et al. 2011, doi:10.3390/e13010134",
        ),
        "concrete_score": Spec(
            15,
            "sum_xv w1(v) w2(x) (d_x - d_v)^2 / 2, d = log Q - log P, weights detached",
            {"weights": Parameter(("student", "student"))},
            "inf",
            "CSD, arXiv:2509.25837",
        ),
        "cross_entropy": Spec(
            16,
            "-sum_k label_weights_k log Q(labels_k)",
            {},
            "inf",
            "SeqKD, arXiv:1606.07947; sparse targets: RS-KD, arXiv:2503.16870",
        ),
    }
)


def validated(name: str, given: Mapping[str, object]) -> tuple[tuple[str, Value], ...]:
    """The parameters of the divergence `name`, every one of them, checked and in order."""
    parameters = DIVERGENCES[name].parameters
    for key in given:
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"{name}: unknown parameter {key!r}; its parameters: {known}.")
    params: dict = {
        key: parameter.checked(name, key, given.get(key, parameter.default))
        for key, parameter in parameters.items()
    }
    if name == "alpha_beta":
        params = _onto_limit_cases(params)
    return tuple(params.items())


def _onto_limit_cases(params: dict[str, float]) -> dict[str, float]:
    """alpha, beta or alpha + beta within CLOSE of 0 become exactly 0.

    Raises:
        ValueError: one of them is neither 0 nor LEAST_EXPONENT in size.
    """
    alpha, beta = (0.0 if abs(value) < CLOSE else value for value in params.values())
    if abs(alpha + beta) < CLOSE:
        beta = 0.0 - alpha
    for value in (alpha, beta, alpha + beta):
        if value != 0 and abs(value) < LEAST_EXPONENT - CLOSE:
            raise ValueError(
                f"alpha_beta: alpha, beta and alpha + beta must each be 0 or at least "
                f"{LEAST_EXPONENT:g} in size, got alpha={alpha} and beta={beta}. The limits are "
                "continuous: use 0."
            )
    return {"alpha": alpha, "beta": beta}
