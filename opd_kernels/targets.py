# SPDX-License-Identifier: Apache-2.0
"""What stands in for the teacher's law: `targets.geometric(...)` or `targets.mixture(...)`.

P is the teacher's law and Q the student's; the divergence then compares Q with the target.
"""

from __future__ import annotations

import dataclasses
import math
import numbers

from torch import Tensor

__all__ = ["Geometric", "Mixture", "geometric", "mixture"]


@dataclasses.dataclass(frozen=True)
class Geometric:
    """softmax(student * z + teacher * y + reference * r); `detach`: no gradient through z in it.

    z, y, r: logits of student, teacher and reference model after scale, softcap and temperature.
    A model with coefficient 0 is not read.
    """

    student: float = 0.0
    teacher: float = 1.0
    reference: float = 0.0
    detach: bool = True

    def __post_init__(self) -> None:
        for name in ("student", "teacher", "reference"):
            object.__setattr__(self, name, _number("geometric", name, getattr(self, name)))
        _flag("geometric", self.detach)


# compared by identity: the weight may be a tensor
@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """teacher_weight * P + (1 - teacher_weight) * Q; `detach`: no gradient through Q in it.

    teacher_weight: a number in [0, 1], or a tensor [T] of them.
    """

    teacher_weight: float | Tensor
    detach: bool = True

    def __post_init__(self) -> None:
        weight = self.teacher_weight
        if isinstance(weight, Tensor):
            if weight.requires_grad:
                raise ValueError(
                    "mixture: teacher_weight must not require grad, got a tensor that does. It is "
                    "a constant of the loss; detach() it."
                )
        else:
            number = _number("mixture", "teacher_weight", weight, " or a tensor [T]")
            if not 0.0 <= number <= 1.0:
                raise ValueError(f"mixture: teacher_weight must be in [0, 1], got {number}.")
            object.__setattr__(self, "teacher_weight", number)
        _flag("mixture", self.detach)


def _number(owner: str, name: str, value: object, besides: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a number{besides}, got {value!r}.")
    # not math.isfinite, which torch.compile cannot trace for a number that changes
    if not -math.inf < value < math.inf:
        raise ValueError(f"{owner}: {name} must be finite, got {value}.")
    return float(value)


def _flag(owner: str, detach: object) -> None:
    if not isinstance(detach, bool):
        raise TypeError(f"{owner}: detach must be True or False, got {detach!r}.")


def geometric(
    student: float = 0.0, teacher: float = 1.0, reference: float = 0.0, detach: bool = True
) -> Geometric:
    """softmax(student * z + teacher * y + reference * r), any coefficients.

    TAID: (1 - t, t). Veto: (beta, 1). ExOPD: teacher=lam, reference=1 - lam.
    Source: TAID, arXiv:2501.16937; Veto, arXiv:2601.07155; G-OPD, arXiv:2602.12125.
    """
    return Geometric(student, teacher, reference, detach)


def mixture(teacher_weight: float | Tensor, detach: bool = True) -> Mixture:
    """teacher_weight * P + (1 - teacher_weight) * Q; the weight may differ by token ([T]).

    Source: DistiLLM, arXiv:2402.03898; per-sequence weights: DistiLLM-2, arXiv:2503.07067.
    """
    return Mixture(teacher_weight, detach)
