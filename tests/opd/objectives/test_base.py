# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from opd.objectives import OBJECTIVES, ObjectiveSection, Parts, TokenNll


def test_every_objective_says_what_the_loop_asks_for():
    for kind, objective in OBJECTIVES.items():
        assert issubclass(objective, ObjectiveSection), kind
        assert objective.model_fields["kind"].default == kind
        assert isinstance(objective.crosses_tokenizers, bool), kind
        assert isinstance(objective.needs_teacher, bool), kind
        # whose tokens are others has a teacher
        assert objective.needs_teacher or not objective.crosses_tokenizers, kind


def test_an_objective_without_parts_is_bound_to_itself():
    objective = TokenNll()
    assert objective.bind(Parts(student=None, teacher=None)) is objective
    assert objective.module is None
