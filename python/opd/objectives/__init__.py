# SPDX-License-Identifier: Apache-2.0
"""Objectives: callables (student law, teacher law, batch, tokens of the step) -> Signal.

To add one: a file with a `Section` that is callable, and a line in `OBJECTIVES`.
"""

from typing import Protocol

from opd.batch import Batch, Law, Signal
from opd.objectives.full_vocab import FullVocab
from opd.objectives.sampled_token import SampledToken
from opd.objectives.token_nll import TokenNll

OBJECTIVES = {
    "full_vocab": FullVocab,
    "sampled_token": SampledToken,
    "token_nll": TokenNll,
}

ObjectiveConfig = FullVocab | SampledToken | TokenNll


class Objective(Protocol):
    """What the loop asks of an objective."""

    kind: str
    needs_teacher: bool
    needs_behaviour_logprobs: bool

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal: ...


__all__ = ["OBJECTIVES", "FullVocab", "Objective", "ObjectiveConfig", "SampledToken", "TokenNll"]
