# SPDX-License-Identifier: Apache-2.0
"""One list of option sets that the divergence ops are checked with, on top of `tests.cases`.

An option names keyword arguments as a function of the shape; `options_of(option, T, V)` builds
them, the same numbers each time. Divergences inside are `Spec`s: `tests.checks.public` turns them
into the public API's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels import targets
from tests.cases import F64, Spec, spec

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Option:
    """`keywords(uniform, num_tokens, vocab_size)`; `uniform(low, high, *shape)` draws float32."""

    name: str
    keywords: Callable[[Draw, int, int], dict]
    # what it is run with; None: the option brings its own sum
    divergences: tuple[Spec, ...] | None = (spec("jsd", beta=0.3),)
    # needs logits (or hidden states and a head) of a reference model
    reads_reference: bool = False

    def __str__(self) -> str:
        return self.name

    def is_settled(self, divergence: Spec | None, dtype: torch.dtype) -> bool:
        """False where rounding decides, in float64 as well: which tokens the head of adaptive_kl
        holds, when logits of 16 bits make exact ties in a target that is computed from them."""
        is_16_bit = dtype in (torch.bfloat16, torch.float16)
        makes_target = "target" in options_of(self, 3, 3)
        is_head = divergence is not None and divergence.name == "adaptive_kl"
        return not (is_16_bit and makes_target and is_head)


_KLS = (spec("forward_kl"), spec("reverse_kl"))
# one of each kind that a target or a temperature can go wrong in
_KINDS = (
    *_KLS,
    spec("skew_forward_kl", alpha=0.1),
    spec("skew_reverse_kl", alpha=0.3, detach_mixture=True),
    spec("total_variation"),
    spec("renyi", alpha=0.5),
    spec("todi"),
    spec("adaptive_kl", head_mass=0.5),
    spec("alpha_beta", alpha=0.2, beta=0.7),
    spec("concrete_score", weights=("teacher", "student")),
)
# smooth in the target, so that a live one has a gradient of its own
_LIVE = (*_KLS, spec("jsd", beta=0.3), spec("squared_hellinger"), spec("todi"), spec("adaptive_kl"))


def _capped(_: Draw, num_tokens: int, vocab_size: int) -> dict:
    return {"student_softcap": 30.0, "teacher_softcap": 20.0}


def _gate(uniform: Draw, num_tokens: int, vocab_size: int) -> dict:
    """EOPD's shape: reverse KL everywhere, forward KL behind a gate of zeros and ones."""
    gate = (uniform(0, 1, num_tokens) > 0.5).float()
    return {"divergence": [(1.0, spec("reverse_kl")), (gate, spec("forward_kl"))]}


def _sum(uniform: Draw, num_tokens: int, vocab_size: int) -> dict:
    coefficients = uniform(-1, 2, num_tokens)
    coefficients[::4] = 0.0
    return {
        "divergence": [
            (0.7, spec("forward_kl")),
            (coefficients, spec("squared_hellinger")),
            (-0.2, spec("concrete_score", weights=("student", "student"))),
            (uniform(0, 1, num_tokens), spec("jsd", beta=0.1)),
        ]
    }


def _labels(uniform: Draw, num_tokens: int, vocab_size: int) -> dict:
    labels = uniform(0, vocab_size, num_tokens).long().clamp_max(vocab_size - 1)
    labels[1::3] = -100
    return {
        "divergence": [(0.5, spec("cross_entropy")), (0.5, spec("reverse_kl"))],
        "labels": labels,
    }


def _sparse_labels(uniform: Draw, num_tokens: int, vocab_size: int) -> dict:
    labels = uniform(-3, vocab_size, num_tokens, 5).floor().long().clamp_max(vocab_size - 1)
    weights = uniform(-0.2, 1, num_tokens, 5)
    weights[:, 2] = 0.0
    return {
        "divergence": [(1.0, spec("cross_entropy"))],
        "labels": labels,
        "label_weights": weights,
    }


def _everything(uniform: Draw, num_tokens: int, vocab_size: int) -> dict:
    return {
        **_sum(uniform, num_tokens, vocab_size),
        "target": targets.geometric(0.3, 0.9, -0.2, detach=False),
        "temperature": (uniform(0.5, 2, num_tokens), 1.3),
        "student_softcap": 30.0,
        "reference_softcap": 25.0,
        "student_logit_scale": 0.9,
        "teacher_logit_scale": 1.2,
        "reference_logit_scale": 0.8,
    }


OPTIONS = (
    Option("temperature_per_token", lambda u, t, v: {"temperature": u(0.3, 3, t)}, _KINDS),
    Option(
        "temperatures_per_token",
        lambda u, t, v: {"temperature": (u(0.3, 3, t), u(0.3, 3, t))},
        _KLS,
    ),
    Option("softcap", _capped, _KINDS),
    Option(
        "logit_scale",
        lambda u, t, v: {"student_logit_scale": 0.5, "teacher_logit_scale": 1.5},
        _KLS,
    ),
    Option(
        "softcap_of_scaled",
        lambda u, t, v: {**_capped(u, t, v), "student_logit_scale": 2.0, "temperature": (0.7, 2.0)},
    ),
    Option("taid", lambda u, t, v: {"target": targets.geometric(0.6, 0.4)}, _KINDS),
    Option("taid_live", lambda u, t, v: {"target": targets.geometric(0.6, 0.4, 0, False)}, _LIVE),
    Option("veto", lambda u, t, v: {"target": targets.geometric(0.8, 1.0)}, _KLS),
    Option("veto_live", lambda u, t, v: {"target": targets.geometric(0.8, 1.0, 0, False)}, _KLS),
    Option(
        "exopd",
        lambda u, t, v: {"target": targets.geometric(teacher=1.25, reference=-0.25)},
        _KINDS,
        reads_reference=True,
    ),
    Option(
        "three_models",
        lambda u, t, v: {
            "target": targets.geometric(0.2, 0.5, 0.3, False),
            "reference_softcap": 25.0,
            "reference_logit_scale": 1.1,
            "temperature": (0.8, 1.6),
        },
        _LIVE,
        reads_reference=True,
    ),
    Option("mixture", lambda u, t, v: {"target": targets.mixture(0.7)}, _KINDS),
    Option("mixture_live", lambda u, t, v: {"target": targets.mixture(0.3, False)}, _LIVE),
    Option(
        "mixture_per_token", lambda u, t, v: {"target": targets.mixture(_with_ends(u, t))}, _KINDS
    ),
    Option(
        "mixture_per_token_live",
        lambda u, t, v: {"target": targets.mixture(_with_ends(u, t), False)},
        _LIVE,
    ),
    Option("gate", _gate, None),
    Option("sum", _sum, None),
    Option("labels", _labels, None),
    Option("sparse_labels", _sparse_labels, None),
    Option("everything", _everything, None, reads_reference=True),
)


def _law_everything(uniform: Draw, num_tokens: int) -> dict:
    return {"softcap": 6.0, "logit_scale": -1.3, "temperature": uniform(0.5, 2, num_tokens)}


# what turns one model's logits into a law, for the ops that see a single model
LAW_OPTIONS: dict[str, Callable[[Draw, int], dict]] = {
    "temperature_per_token": lambda u, t: {"temperature": u(0.3, 3, t)},
    "softcap": lambda u, t: {"softcap": 5.0},
    "wide_softcap": lambda u, t: {"softcap": 30.0, "temperature": 0.6},
    "logit_scale": lambda u, t: {"logit_scale": 0.0625},
    "law_everything": _law_everything,
}


def law_options_of(name: str, num_tokens: int) -> dict:
    """The keyword arguments of one of LAW_OPTIONS; float32, the same numbers each time."""
    return LAW_OPTIONS[name](_uniform_of(name), num_tokens)


def option_cases(*dtypes: torch.dtype) -> list[tuple[Option, Spec | None, torch.dtype]]:
    """What the tests of an op run: every option with each of its divergences in each dtype."""
    return [
        (option, divergence, dtype)
        for option in OPTIONS
        for divergence in (option.divergences or (None,))
        for dtype in dtypes
        if option.is_settled(divergence, dtype)
    ]


def _with_ends(uniform: Draw, num_tokens: int) -> Tensor:
    """Weights in [0, 1] that include both ends."""
    weights = uniform(0, 1, num_tokens)
    weights[1::5], weights[2::5] = 0.0, 1.0
    return weights


def options_of(option: Option, num_tokens: int, vocab_size: int) -> dict:
    """The keyword arguments; float32, so that every backend reads the same numbers."""
    return option.keywords(_uniform_of(option.name), num_tokens, vocab_size)


def _uniform_of(name: str) -> Draw:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=generator, dtype=F64) * (high - low) + low
        return drawn.to(torch.float32)

    return uniform


def reference_model_of(teacher: Tensor, seed: int) -> Tensor:
    """The teacher's logits (or head) plus noise: what the teacher was before its last training."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(teacher.shape, generator=generator, dtype=F64)
    return (teacher.to(F64) + 0.5 * noise).to(teacher.dtype)
