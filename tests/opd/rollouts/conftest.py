# SPDX-License-Identifier: Apache-2.0
"""Tiny models of several families, alike enough that one's drafts are often the other's choice."""

from __future__ import annotations

import pytest
import torch

from opd.batch import Prompt
from opd.model import LanguageModel
from opd.teachers import LocalTeacher

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {},
    "mistral": {"sliding_window": 4},
    "bloom": {},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
}


def make_model(family, *, seed, vocab_size=45, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        # the longest prompt below, and 20 tokens: not one more may be read
        "max_position_embeddings": 28,
        "initializer_range": 0.4,
        **FAMILIES.get(family, {}),
        **settings,
    }
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=3, **values
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def family_model():
    """A factory of models: family_model("gpt2", seed=1)."""
    return make_model


@pytest.fixture
def pair():
    """A factory of a student and a teacher: pair("gpt2", distance=0.1); 0: equal weights."""

    def make(family="llama", *, distance=0.1, seed=1, dtype=torch.float32, **settings):
        ours, theirs = (make_model(family, seed=seed + i, **settings) for i in range(2))
        with torch.no_grad():
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                mine.copy_(torch.lerp(other, mine, distance))
        return LanguageModel(ours.to(dtype)), LocalTeacher(theirs.to(dtype), name="teacher")

    return make


@pytest.fixture
def prompts():
    """Four, of 1 to 8 tokens."""
    ids = [[4, 5, 6, 7], [8, 9], [10], [11, 12, 13, 14, 15, 16, 17, 18]]
    return [Prompt(ids=torch.tensor(row), group_id=number) for number, row in enumerate(ids)]


@pytest.fixture
def cut_law():
    """A function (logits [..., V] float64, law) -> log-probabilities, by the definitions."""

    def law(logits, *, temperature=1.0, top_k=0, top_p=1.0):
        logits = logits / temperature
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float("-inf"))
        if top_p < 1.0:
            ordered, order = logits.softmax(-1).sort(descending=True)
            drop = ordered.cumsum(-1) - ordered >= top_p
            drop = torch.zeros_like(drop).scatter(-1, order, drop)
            logits = logits.masked_fill(drop, float("-inf"))
        return logits.log_softmax(-1)

    return law


@pytest.fixture
def law_of(cut_law):
    """A function (model, trajectory, law) -> [C, V] float64: what each token of a completion is
    drawn from, from the model's own logits of the sequence alone."""

    def law(model, trajectory, **settings):
        with torch.no_grad():
            logits = model.model(input_ids=trajectory.ids[None]).logits[0].double()
        return cut_law(logits[trajectory.prompt_length - 1 : -1], **settings)

    return law
