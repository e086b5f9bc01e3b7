# SPDX-License-Identifier: Apache-2.0
"""What every objective has, and the parts of a run that some are bound to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

import opd_kernels as opk
from opd.batch import Batch
from opd.schema import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an objective may want to know of a run before its first step.

    Attributes:
        student, teacher: with a `head`; the teacher None where there is none.
        student_bytes, teacher_bytes: of both tokenizers, for objectives that cross them; the same
            object where the tokenizers are the same.
        seed: of the run, for what an objective starts from random numbers.
    """

    student: Any
    teacher: Any
    student_bytes: opk.TokenBytes | None = None
    teacher_bytes: opk.TokenBytes | None = None
    seed: int = 0


class ObjectiveSection(Section):
    """An objective's keys, which are the objective itself unless `bind` returns another object.

    `crosses_tokenizers`: the teacher's tokens may be other ones; its law is then over the rows of
    `batch.translation.batch`. `module`: what the objective itself has to train, None for nothing;
    `module_learning_rate`: of that, None for the model's.
    """

    crosses_tokenizers: ClassVar[bool] = False
    module: ClassVar[nn.Module | None] = None
    module_learning_rate: ClassVar[float | None] = None

    def bind(self, parts: Parts) -> Any:
        """What is called in the loop: itself, or an object that knows the parts of the run."""
        return self


class OfHiddenStates:
    """What objectives on the teacher's hidden states say of themselves."""

    needs_teacher: ClassVar[bool] = True
    asks: ClassVar[str] = "hidden"
    needs_behaviour_logprobs: ClassVar[bool] = False

    def ask(self, teacher: Any, batch: Batch) -> None:
        """What does not wait for the student, on the teacher's time."""
        teacher.hidden()


def teacher_divergence(name: str, params: Mapping[str, Any]) -> Any:
    """The divergence of that name, with its parameters.

    Raises:
        ValueError: there is none, or it has no teacher.
    """
    divergence = opk.divergences.parse(name, **params)
    if divergence.name == "cross_entropy":
        raise ValueError("divergence: cross_entropy has no teacher; use kind: token_nll")
    return divergence
