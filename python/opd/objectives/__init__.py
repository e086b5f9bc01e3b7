# SPDX-License-Identifier: Apache-2.0
"""Objectives: callables (student law, teacher law, batch, tokens of the step) -> Signal.

To add one: a file with an `ObjectiveSection` that is callable, or binds to one, and a line in
`OBJECTIVES`.
"""

from typing import Protocol

from opd.batch import Batch, Law, Signal
from opd.objectives.alm import Alm
from opd.objectives.base import ObjectiveSection, Parts
from opd.objectives.dskd import Dskd
from opd.objectives.full_vocab import FullVocab
from opd.objectives.gold import Gold
from opd.objectives.mined import Mined
from opd.objectives.minillm import Minillm
from opd.objectives.multilevel_ot import MultilevelOt
from opd.objectives.overlap import Overlap
from opd.objectives.sampled_token import SampledToken
from opd.objectives.simct import Simct
from opd.objectives.teacher_samples import TeacherSamples
from opd.objectives.token_nll import TokenNll
from opd.objectives.topk import Topk
from opd.objectives.uld import Uld
from opd.sparse_law import DrawnLaw, SparseLaw

OBJECTIVES = {
    "alm": Alm,
    "dskd": Dskd,
    "full_vocab": FullVocab,
    "gold": Gold,
    "mined": Mined,
    "minillm": Minillm,
    "multilevel_ot": MultilevelOt,
    "overlap": Overlap,
    "sampled_token": SampledToken,
    "simct": Simct,
    "teacher_samples": TeacherSamples,
    "token_nll": TokenNll,
    "topk": Topk,
    "uld": Uld,
}

ObjectiveConfig = (
    Alm
    | Dskd
    | FullVocab
    | Gold
    | Mined
    | Minillm
    | MultilevelOt
    | Overlap
    | SampledToken
    | Simct
    | TeacherSamples
    | TokenNll
    | Topk
    | Uld
)


class Objective(Protocol):
    """What the loop asks of an objective.

    `asks` is what a teacher must have in its `tells`: `hidden`, `topk`, `given_tokens`,
    `token_logprobs` or `samples`; empty without a teacher.
    """

    kind: str
    needs_teacher: bool
    asks: str
    needs_behaviour_logprobs: bool

    def ask(self, teacher: Law | SparseLaw | DrawnLaw, batch: Batch) -> None: ...

    def __call__(
        self,
        student: Law,
        teacher: Law | SparseLaw | DrawnLaw | None,
        batch: Batch,
        num_step_tokens: int,
    ) -> Signal: ...


__all__ = [
    "OBJECTIVES",
    "Alm",
    "Dskd",
    "FullVocab",
    "Gold",
    "Mined",
    "Minillm",
    "MultilevelOt",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSection",
    "Overlap",
    "Parts",
    "SampledToken",
    "Simct",
    "TeacherSamples",
    "TokenNll",
    "Topk",
    "Uld",
]
