# SPDX-License-Identifier: Apache-2.0
"""Models that cap, scale or shift their logits: the loop's losses are those of their own logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from opd.config import parse_config
from opd.evaluation import _Reader
from opd.model import LanguageModel
from opd.objectives import FullVocab, SampledToken, TokenNll
from opd.teachers import LocalTeacher
from opd.train import train

_SHAPE = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    # logits large enough that laws are not uniform and caps bend them
    "initializer_range": 0.4,
}
FAMILIES = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.4},
    "granite": {"logits_scaling": 2.5},
    # the only one here whose head has a bias
    "phi": {},
    "llama": {},
}
# student and teacher
PAIRS = [
    ("gemma2", "phi"),
    ("phi", "gemma2"),
    ("cohere", "granite"),
    ("granite", "cohere"),
    ("llama", "gemma2"),
    ("phi", "phi"),
]
every_pair = pytest.mark.parametrize("families", PAIRS, ids="-".join)


def hf_model(family: str, *, seed: int, hidden_size: int, dtype: torch.dtype = torch.float32):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=45,
        hidden_size=hidden_size,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
        **{**_SHAPE, **FAMILIES[family]},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if family == "phi":
        nn.init.normal_(model.lm_head.bias)
    return model.to(dtype)


@pytest.fixture
def pair(families):
    """A student, and a wider teacher of another kind."""
    student = hf_model(families[0], seed=1, hidden_size=16)
    teacher = hf_model(families[1], seed=2, hidden_size=24)
    return LanguageModel(student.eval()), LocalTeacher(teacher, name="teacher")


def logits_of(model, batch):
    """The model's own, float64."""
    out = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return out.logits.flatten(0, 1)[batch.token_idx].double()


def gradients_of(loss, model) -> dict[str, torch.Tensor]:
    model.model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(signal, dense, student) -> None:
    ours, theirs = gradients_of(signal.loss, student), gradients_of(dense, student)
    assert signal.loss.item() == pytest.approx(dense.item(), rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=2e-6, msg=name)
    has_bias = student.head.bias is not None
    assert has_bias == ("lm_head.bias" in ours)
    assert not has_bias or bool(ours["lm_head.bias"].abs().sum() > 1e-3)


@every_pair
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "squared_hellinger"])
def test_full_vocab_is_the_divergence_of_the_models_own_logits(pair, batch, divergence):
    student, teacher = pair
    objective = FullVocab(divergence=divergence, temperature=0.8, teacher_temperature=1.3)
    signal = objective(student.law(batch), teacher.law(batch), batch, batch.num_tokens)
    q = (logits_of(student, batch) / 0.8).log_softmax(-1)
    p = (logits_of(teacher, batch).detach() / 1.3).log_softmax(-1)
    dense = {
        "forward_kl": (p.exp() * (p - q)).sum(-1),
        "reverse_kl": (q.exp() * (q - p)).sum(-1),
        "squared_hellinger": 1 - (0.5 * (p + q)).exp().sum(-1),
    }[divergence].mean()
    assert_same_loss_and_gradients(signal, dense, student)


@every_pair
def test_sampled_token_is_that_of_the_models_own_logits(pair, batch):
    student, teacher = pair
    objective = SampledToken(temperature=0.7)
    signal = objective(student.law(batch), teacher.law(batch), batch, batch.num_tokens)
    ours, theirs = (
        (logits_of(model, batch) / 0.7).log_softmax(-1).gather(1, batch.token_ids[:, None])[:, 0]
        for model in pair
    )
    ratio = (ours - batch.behaviour_logprobs).exp()
    dense = -(ratio * (theirs - batch.behaviour_logprobs).detach()).mean()
    assert_same_loss_and_gradients(signal, dense, student)


@pytest.mark.parametrize("families", [(name, "llama") for name in FAMILIES], ids="-".join)
def test_token_nll_is_that_of_the_models_own_logits(pair, batch):
    student, _ = pair
    signal = TokenNll()(student.law(batch), None, batch, batch.num_tokens)
    dense = nn.functional.cross_entropy(logits_of(student, batch), batch.token_ids)
    assert_same_loss_and_gradients(signal, dense, student)


@pytest.mark.parametrize("families", [("gemma2", "phi"), ("phi", "cohere")], ids="-".join)
def test_evaluation_compares_the_models_own_logits(pair, trajectories, batch):
    student, teacher = pair
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    config = type("Config", (), {"batch_size": 2})
    with torch.no_grad():
        found = _Reader(student, teacher, tokenizer, config.batch_size, None, None).compare(
            trajectories, "s"
        )
        q, p = (logits_of(model, batch).log_softmax(-1) for model in pair)
    chosen = q.gather(1, batch.token_ids[:, None]).mean()
    assert found["eval/s/nll"] == pytest.approx(-chosen.item(), rel=1e-5)
    assert found["eval/s/forward_kl"] == pytest.approx(
        (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5
    )
    assert found["eval/s/teacher_entropy"] == pytest.approx(
        -(p.exp() * p).sum(-1).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_a_twin_of_16_bit_is_near_the_student(batch, family):
    model = LanguageModel(hf_model(family, seed=1, hidden_size=16, dtype=torch.bfloat16).eval())
    twin = LocalTeacher(hf_model(family, seed=1, hidden_size=16), name="teacher")
    signal = FullVocab()(model.law(batch), twin.law(batch), batch, batch.num_tokens)
    signal.loss.backward()
    assert 0 <= signal.loss.item() < 0.02
    assert all(p.grad.dtype == torch.bfloat16 for p in model.model.parameters())


@pytest.mark.parametrize(
    ("objective", "families"),
    [("full_vocab", ("gemma2", "phi")), ("sampled_token", ("phi", "cohere"))],
)
def test_a_run_trains_and_evaluates(values, objective, families):
    for role, family, hidden_size in zip(("student", "teacher"), families, (16, 24), strict=True):
        settings = {"model_type": family, "hidden_size": hidden_size, **_SHAPE, **FAMILIES[family]}
        values[role] = {"config": settings}
    values["objective"] = {"kind": objective}
    values["evaluation"] = {"num_prompts": 4, "lengths": [1]}
    values["max_steps"] = 6
    train(parse_config(values), quiet=True)
    lines = Path(values["output_dir"], "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == 6
    assert all(torch.tensor(losses).isfinite())
    if objective == "full_vocab":
        assert losses[-1] < losses[0]
