# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from opd.batch import Prompt
from opd.config import parse_config
from opd.rollouts import MixtureConfig
from opd.schema import ConfigError

PROMPTS = [
    Prompt(
        ids=torch.tensor([4, 5]),
        completion_ids=torch.tensor([6, 3]),
        completion_mask=torch.tensor([True, True]),
    )
] * 2


def _origins(config, student, teacher, tokenizer, num_steps=40, seed=0):
    engine = config.build(student, teacher, tokenizer, seed=seed)
    return [{t.origin for t in engine.collect(PROMPTS, step)} for step in range(num_steps)]


@pytest.mark.parametrize(("lmbda", "origin"), [(0.0, "data"), (1.0, "student")])
def test_the_ends_are_pure(student, teacher, tokenizer, lmbda, origin):
    config = MixtureConfig(lmbda=lmbda, max_completion_length=2)
    assert _origins(config, student, teacher, tokenizer, 5) == [{origin}] * 5


def test_a_step_is_of_one_kind_and_the_share_is_lmbda(student, teacher, tokenizer):
    config = MixtureConfig(lmbda=0.5, max_completion_length=1)
    origins = _origins(config, student, teacher, tokenizer)
    assert all(len(kinds) == 1 for kinds in origins)
    assert 10 <= sum(kinds == {"student"} for kinds in origins) <= 30


def test_the_coin_depends_on_seed_and_step_alone(student, teacher, tokenizer):
    config = MixtureConfig(lmbda=0.5, max_completion_length=1)
    engine = config.build(student, teacher, tokenizer, seed=0)
    late = engine.collect(PROMPTS, 17)[0].origin
    assert {late} == _origins(config, student, teacher, tokenizer)[17]
    other = _origins(config, student, teacher, tokenizer, seed=1)
    assert other != _origins(config, student, teacher, tokenizer)


def test_with_seq_kd_the_teacher_writes_the_rest(student, teacher, tokenizer):
    config = MixtureConfig(lmbda=0.0, seq_kd=True, max_completion_length=2)
    assert config.needs_teacher and not config.needs_completions
    assert _origins(config, student, teacher, tokenizer, 2) == [{"teacher"}] * 2


@pytest.mark.parametrize("seq_kd", [True, False])
def test_every_kind_of_step_has_the_same_number_of_completions(student, teacher, tokenizer, seq_kd):
    config = MixtureConfig(lmbda=0.5, seq_kd=seq_kd, num_generations=3, max_completion_length=1)
    engine = config.build(student, teacher, tokenizer, seed=0)
    assert {len(engine.collect(PROMPTS, step)) for step in range(8)} == {6}


def test_two_models_may_write_in_the_students_place(student, teacher, tokenizer):
    config = MixtureConfig(
        lmbda=0.5,
        max_completion_length=2,
        num_generations=2,
        on_policy={"kind": "speculative", "mode": "topk", "num_topk": 3},
    )
    assert config.needs_teacher
    engine = config.build(student, teacher, tokenizer, seed=0)
    kinds = set()
    for step in range(8):
        trajectories = engine.collect(PROMPTS, step)
        (origin,) = {t.origin for t in trajectories}
        kinds.add(origin)
        assert len(trajectories) == 4
        assert max(t.completion_length for t in trajectories) <= 2
        # a step without drafts has none to count
        assert bool(engine.metrics()) == (origin == "mixed")
    assert kinds == {"mixed", "data"}


def test_what_both_sides_share_is_said_once():
    message = r"on_policy.num_generations: must equal rollouts.num_generations, 1.*got 3; leave it"
    with pytest.raises(ValidationError, match=message):
        MixtureConfig(on_policy={"kind": "teacher_mixed", "num_generations": 3})


def test_a_resolved_section_reads_back_as_it_is():
    config = MixtureConfig(num_generations=2, on_policy={"kind": "teacher_mixed"})
    assert config.on_policy.num_generations == 2
    assert MixtureConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_mistake_in_the_nested_section_is_one_sentence(values):
    on_policy = {"kind": "speculative", "num_drafts": 3}
    values["rollouts"] = {"kind": "mixture", "lmbda": 1, "on_policy": on_policy}
    with pytest.raises(ConfigError, match=r"num_drafts.*did you mean 'num_draft'"):
        parse_config(values)
    with pytest.raises(ConfigError, match=r"teacher: is required by rollouts.on_policy"):
        on_policy.pop("num_drafts")
        parse_config({**values, "teacher": None, "objective": {"kind": "token_nll"}})


@pytest.mark.parametrize("key", ["temperature", "top_k", "top_p"])
def test_sampling_keys_that_nobody_draws_by_are_refused(key):
    on_policy = {"kind": "teacher_mixed", key: 1}
    law = {key: 1 if key == "top_k" else 0.5}
    with pytest.raises(ValidationError, match=f"{key}: means nothing beside on_policy.*on_policy"):
        MixtureConfig(on_policy=on_policy, **law)
    # the teacher that writes the other steps, or the student that writes alone, draws by it
    assert getattr(MixtureConfig(on_policy=on_policy, seq_kd=True, **law), key) == law[key]
    assert getattr(MixtureConfig(**law), key) == law[key]
