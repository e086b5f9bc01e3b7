# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import pytest
import torch

from opd.batch import Prompt
from opd.config import parse_config
from opd.rollouts import TeacherMixedConfig
from opd.rollouts.writing import STUDENT, TEACHER
from tests.chi_squared import chi_squared_p


def _collect(pair, tokenizer, prompts, *, step=0, **settings):
    config = TeacherMixedConfig(**{"max_completion_length": 12, **settings})
    engine = config.build(*pair, tokenizer, seed=0)
    return engine.collect(prompts, step), engine.metrics()


@pytest.mark.parametrize("law", [{}, {"temperature": 0.8, "top_p": 0.8}], ids=["whole", "cut"])
def test_behaviour_is_the_mixture_and_its_parts_are_known(pair, tokenizer, prompts, law_of, law):
    student, teacher = pair()
    trajectories, metrics = _collect(
        (student, teacher), tokenizer, prompts, alpha=0.3, num_generations=4, **law
    )
    writers = torch.cat([t.token_origin[t.prompt_length :] for t in trajectories])
    share = float((writers == TEACHER).float().mean())
    assert metrics == {"speculative/teacher_token_share": pytest.approx(share)}
    assert 0.1 < share < 0.5
    for t in trajectories:
        logprobs = {}
        for name, model in (("student", student), ("teacher", teacher)):
            expected = law_of(model, t, **law).gather(1, t.completion_ids[:, None])[:, 0]
            found = getattr(t, f"{name}_logprobs")[t.prompt_length :]
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
            logprobs[name] = found
        expected = (0.3 * logprobs["teacher"].exp() + 0.7 * logprobs["student"].exp()).log()
        found = t.behaviour_logprobs[t.prompt_length :]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(found).all()


def test_tokens_have_the_mixtures_law(pair, tokenizer, law_of):
    student, teacher = pair(vocab_size=8, distance=0.5)
    prompt = Prompt(ids=torch.tensor([4, 1]))
    trajectories, _ = _collect(
        (student, teacher),
        tokenizer,
        [prompt],
        alpha=0.4,
        max_completion_length=1,
        num_generations=4000,
    )
    p, q = (law_of(model, trajectories[0])[0].exp() for model in (teacher, student))
    law = dict(enumerate((0.4 * p + 0.6 * q).tolist()))
    counts = Counter(int(t.ids[-1]) for t in trajectories)
    assert chi_squared_p(counts, law) > 1e-3
    assert chi_squared_p(counts, dict(enumerate(p.tolist()))) < 1e-3


@pytest.mark.parametrize(("alpha", "writer"), [(0.0, STUDENT), (1.0, TEACHER)])
def test_the_ends_are_pure(pair, tokenizer, prompts, alpha, writer):
    trajectories, _ = _collect(pair(), tokenizer, prompts, alpha=alpha)
    for t in trajectories:
        own = t.student_logprobs if writer == STUDENT else t.teacher_logprobs
        assert set(t.token_origin[t.prompt_length :].tolist()) == {writer}
        torch.testing.assert_close(t.behaviour_logprobs, own)


def test_a_batch_of_one_writes_what_a_batch_of_many_does(pair, tokenizer, prompts):
    both = pair(dtype=torch.float64)
    whole, _ = _collect(both, tokenizer, prompts, alpha=0.5)
    parts, _ = _collect(both, tokenizer, prompts, alpha=0.5, generation_batch_size=1)
    assert [t.ids.tolist() for t in whole] == [t.ids.tolist() for t in parts]
    assert len({t.completion_length for t in whole}) > 1


def test_policy_gradients_may_learn_from_it(values):
    values["rollouts"] = {"kind": "teacher_mixed"}
    values["objective"] = {"kind": "sampled_token"}
    assert parse_config(values).rollouts.tells_behaviour


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_broken_model_is_said_so_also_where_the_other_draws(pair, tokenizer, prompts, name):
    both = dict(zip(("student", "teacher"), pair(), strict=True))
    engine = TeacherMixedConfig(max_completion_length=2, alpha=float(name == "student")).build(
        *both.values(), tokenizer, seed=0
    )
    with torch.no_grad():
        both[name].lm_head_weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"^{name}: its logits are not finite"):
        engine.collect(prompts, 0)
