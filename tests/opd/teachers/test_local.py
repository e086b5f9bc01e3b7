# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from opd.teachers import LocalConfig


def _teacher(tokenizer, **settings):
    model = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    config = LocalConfig(config={**model, "attention_dropout": 0.5}, **settings)
    return config.build(tokenizer, device="cpu", vocab_size=None, workspace_bytes=1 << 20)


def test_is_frozen_and_in_eval_mode(tokenizer):
    teacher = _teacher(tokenizer)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_its_law_is_lazy_carries_no_graph_and_is_the_same_twice(tokenizer, batch, monkeypatch):
    teacher = _teacher(tokenizer)
    calls = []
    original = teacher.model.base_model.forward
    monkeypatch.setattr(
        teacher.model.base_model, "forward", lambda **k: (calls.append(1), original(**k))[1]
    )
    laws = [teacher.law(batch), teacher.law(batch)]
    assert not calls
    assert torch.equal(laws[0].hidden(), laws[1].hidden())
    assert not laws[0].hidden().requires_grad


def test_dtype_is_the_one_asked_for(tokenizer, batch):
    teacher = _teacher(tokenizer, dtype="bfloat16")
    assert teacher.law(batch).hidden().dtype == torch.bfloat16


def test_token_logprobs_match_whole_logits(teacher, batch):
    logits = teacher.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    law = (logits.flatten(0, 1)[batch.token_idx] / 1.5).log_softmax(-1)
    got = teacher.law(batch).token_logprobs(batch.token_ids, temperature=1.5)
    expected = law.gather(1, batch.token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(got.logprobs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.entropy, -(law.exp() * law).sum(-1), rtol=1e-4, atol=1e-5)
