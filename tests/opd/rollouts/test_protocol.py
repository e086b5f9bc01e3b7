# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import get_args

import pytest
import torch

from opd.batch import Prompt
from opd.objectives import OBJECTIVES, ObjectiveConfig
from opd.rollouts import ROLLOUTS, RolloutConfig
from opd.teachers import TEACHERS

PROMPT = Prompt(
    ids=torch.tensor([4, 5]),
    completion_ids=torch.tensor([6, 3]),
    completion_mask=torch.tensor([True, True]),
)


@pytest.mark.parametrize(
    ("registry", "union"), [(ROLLOUTS, RolloutConfig), (OBJECTIVES, ObjectiveConfig)]
)
def test_the_registry_and_the_union_name_the_same(registry, union):
    assert set(registry.values()) == set(get_args(union))


@pytest.mark.parametrize("registry", [ROLLOUTS, OBJECTIVES, TEACHERS])
def test_each_kind_is_called_what_it_is_filed_under(registry):
    for name, section in registry.items():
        assert section.model_fields["kind"].default == name


@pytest.mark.parametrize("kind", ROLLOUTS)
def test_every_engine_collects_in_order_and_keeps_its_state(student, teacher, tokenizer, kind):
    config = ROLLOUTS[kind](max_completion_length=2)
    engine = config.build(
        student, teacher if config.needs_teacher else None, tokenizer, seed=0, max_steps=4
    )
    trajectories = engine.collect([PROMPT, PROMPT], 0)
    assert len(trajectories) == 2
    assert all(torch.equal(t.ids[: t.prompt_length], PROMPT.ids) for t in trajectories)
    engine.observe(1.0)
    state = engine.state_dict()
    engine.load_state_dict(state)
    assert engine.state_dict() == state
    assert all(isinstance(value, float) for value in engine.metrics().values())
