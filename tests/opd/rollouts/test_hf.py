# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from opd.batch import Prompt, collate
from opd.model import LanguageModel
from opd.rollouts import Sampling, sample
from opd.rollouts.hf import end_token_ids

PROMPTS = [
    Prompt(ids=torch.tensor(ids), group_id=number)
    for number, ids in enumerate([[4, 5, 6, 7], [8, 9], [10]])
]


def _sample(model, tokenizer, **settings):
    torch.manual_seed(0)
    sampling = Sampling(**{"max_completion_length": 12, **settings})
    return sample(model, tokenizer, PROMPTS, sampling, step=3)


def _warped(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The law that is drawn from, by the definitions."""
    logits = logits / temperature
    if top_k:
        limit = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < limit, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits.log_softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
def test_behaviour_logprobs_are_those_of_the_law_drawn_from(student, tokenizer, settings):
    trajectories = _sample(student, tokenizer, num_generations=3, **settings)
    for trajectory in trajectories:
        # one sequence alone: left padding and the cache must not show
        logits = student.model(input_ids=trajectory.ids[None]).logits[0]
        law = _warped(logits[trajectory.prompt_length - 1 : -1], **settings)
        expected = law.gather(1, trajectory.completion_ids[:, None]).squeeze(1)
        got = trajectory.behaviour_logprobs[trajectory.prompt_length :]
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)
        assert torch.isfinite(got).all()


def test_behaviour_equals_the_students_own_law_at_temperature_one(student, tokenizer):
    batch = collate(_sample(student, tokenizer), pad_id=0)
    own = student.law(batch).token_logprobs(batch.token_ids).logprobs
    torch.testing.assert_close(batch.behaviour_logprobs, own.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("qwen3", {"head_dim": 8, "num_key_value_heads": 1}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 2.0}),
        ("cohere", {"num_key_value_heads": 1, "logit_scale": 0.4}),
        ("granite", {"num_key_value_heads": 1, "logits_scaling": 2.5}),
        ("phi", {"num_key_value_heads": 1}),
    ],
)
def test_left_padding_and_the_cache_do_not_show_in_any_family(tokenizer, family, own):
    values = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, **own}
    values |= {"max_position_embeddings": 64, "initializer_range": 0.4}
    config = AutoConfig.for_model(
        family, vocab_size=45, pad_token_id=0, bos_token_id=1, eos_token_id=3, **values
    )
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(config))
    trajectories = _sample(model, tokenizer, num_generations=2)
    model.model.eval()
    batch = collate(trajectories, pad_id=0)
    own = model.law(batch).token_logprobs(batch.token_ids).logprobs
    torch.testing.assert_close(batch.behaviour_logprobs, own.detach(), rtol=1e-4, atol=1e-4)


def test_a_completion_stops_at_its_first_end_token_which_is_trained(student, tokenizer):
    trajectories = _sample(student, tokenizer, num_generations=16, max_completion_length=30)
    assert {t.is_terminated for t in trajectories} == {True, False}
    for trajectory in trajectories:
        ends = (trajectory.completion_ids == tokenizer.eos_token_id).nonzero().flatten()
        assert len(ends) == int(trajectory.is_terminated)
        if trajectory.is_terminated:
            assert int(ends[0]) == trajectory.completion_length - 1
        else:
            assert trajectory.completion_length == 30
        assert trajectory.loss_mask[trajectory.prompt_length :].all()
        assert not trajectory.loss_mask[: trajectory.prompt_length].any()


def test_generations_of_a_prompt_are_next_to_each_other(student, tokenizer):
    trajectories = _sample(student, tokenizer, num_generations=2)
    assert [t.group_id for t in trajectories] == [0, 0, 1, 1, 2, 2]
    for trajectory in trajectories:
        prompt = PROMPTS[trajectory.group_id].ids
        assert torch.equal(trajectory.ids[: trajectory.prompt_length], prompt)
        assert (trajectory.origin, trajectory.step) == ("student", 3)


def test_greedy_takes_the_likeliest_and_has_no_behaviour(student, tokenizer):
    for trajectory in _sample(student, tokenizer, temperature=0):
        logits = student.model(input_ids=trajectory.ids[None]).logits[0]
        likeliest = logits[trajectory.prompt_length - 1 : -1].argmax(-1)
        assert torch.equal(trajectory.completion_ids, likeliest)
        assert trajectory.behaviour_logprobs is None


def test_greedy_in_parts_is_the_same(student, tokenizer):
    whole = _sample(student, tokenizer, temperature=0)
    parts = _sample(student, tokenizer, temperature=0, generation_batch_size=2)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(whole, parts, strict=True))


def test_the_models_own_generation_config_is_neither_used_nor_lost(student, tokenizer):
    plain = _sample(student, tokenizer)
    own = GenerationConfig(repetition_penalty=5.0, top_k=1, eos_token_id=3)
    student.model.generation_config = own
    again = _sample(student, tokenizer)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(plain, again, strict=True))
    assert student.model.generation_config is own


def test_end_tokens_of_the_generation_config_count(student, tokenizer):
    student.model.generation_config.eos_token_id = [7, 9]
    assert end_token_ids(student.model, tokenizer) == [tokenizer.eos_token_id, 7, 9]


def test_sampling_keeps_no_graph_and_restores_train_mode(student, tokenizer):
    student.model.train()
    trajectories = _sample(student, tokenizer)
    assert student.model.training
    assert not any(t.behaviour_logprobs.requires_grad for t in trajectories)


def test_no_more_than_one_law_is_held_at_a_time(student, tokenizer, monkeypatch):
    from opd.rollouts import hf

    held = []
    original = hf.BehaviourRecorder.__call__

    def watching(self, input_ids, scores):
        out = original(self, input_ids, scores)
        held.append(sum(t.numel() for t in [self._law, *self._drawn]))
        return out

    monkeypatch.setattr(hf.BehaviourRecorder, "__call__", watching)
    _sample(student, tokenizer)
    assert max(held) < 2 * len(PROMPTS) * 45
