# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from opd.batch import collate
from opd.checkpoint import save_checkpoint
from opd.model import (
    LanguageModel,
    StudentConfig,
    load_model,
    load_tokenizer,
    read_head,
    resolve_device,
    resolve_model_path,
)
from opd.schema import ConfigError

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": TINY,
    "qwen2": TINY,
    "qwen3": {**TINY, "head_dim": 8},
    "mistral": TINY,
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "gpt_neox": {k: v for k, v in TINY.items() if k != "num_key_value_heads"},
}


_MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "head_dim": 8,
}


def _load(tokenizer, seed=0, **config):
    source = StudentConfig(config=config)
    return load_model(source, tokenizer, name="student", seed=seed, device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_times_head_is_the_logits_of_any_family(tokenizer, trajectories, family):
    model = LanguageModel(_load(tokenizer, model_type=family, **FAMILIES[family]))
    model.model.eval()
    batch = collate(trajectories, pad_id=0)
    ours = model.head.logits(model.hidden(batch))
    for row, trajectory in enumerate(trajectories):
        # one sequence alone, without any padding
        alone = model.model(input_ids=trajectory.ids[None]).logits[0]
        is_here = batch.token_idx // batch.input_ids.shape[1] == row
        positions = batch.token_idx[is_here] % batch.input_ids.shape[1]
        torch.testing.assert_close(ours[is_here], alone[positions], rtol=1e-4, atol=1e-5)


def test_weights_depend_on_the_seed_alone(tokenizer):
    torch.manual_seed(123)
    first = _load(tokenizer, model_type="llama", **TINY)
    before = torch.rand(1)
    torch.manual_seed(123)
    again = _load(tokenizer, model_type="llama", **TINY)
    assert torch.equal(before, torch.rand(1))
    other = _load(tokenizer, seed=1, model_type="llama", **TINY)
    weights = [m.get_output_embeddings().weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_vocabulary_and_special_ids_come_from_the_tokenizer(tokenizer):
    model = _load(tokenizer, model_type="llama", **TINY)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "settings", "softcap", "logit_scale"),
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 4.0}, 4.0, 1.0),
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 4.0}, 4.0, 1.0),
        ("nanochat", {"final_logit_softcapping": 15.0}, 15.0, 1.0),
        ("cohere", {"logit_scale": 0.25}, None, 0.25),
        ("cohere2", {"logit_scale": 0.25}, None, 0.25),
        ("granite", {"logits_scaling": 8.0}, None, 0.125),
        ("hyperclovax", {"logits_scaling": 8.0}, None, 8.0),
        ("phi", {}, None, 1.0),
        ("falcon_h1", {"lm_head_multiplier": 0.5, **_MAMBA}, None, 0.5),
        ("llama", {}, None, 1.0),
    ],
)
def test_a_head_is_read_from_the_configuration(
    tokenizer, trajectories, dtype, family, settings, softcap, logit_scale
):
    config = {"model_type": family, **TINY, "initializer_range": 0.4, **settings}
    source = StudentConfig(config=config, dtype=dtype)
    model = load_model(source, tokenizer, name="student", seed=0, device="cpu").eval()
    head = model.get_output_embeddings()
    if family == "phi":
        nn.init.normal_(head.bias)
    read = LanguageModel(model).head
    assert (read.softcap, read.logit_scale) == (softcap, logit_scale)
    assert read.weight is head.weight and read.bias is getattr(head, "bias", None)
    batch = collate(trajectories, pad_id=0)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    own = out.logits.flatten(0, 1)[batch.token_idx].float()
    got = read.logits(LanguageModel(model).hidden(batch))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.03, "atol": 0.1}
    torch.testing.assert_close(got, own, **tolerance)


def test_a_bend_that_nobody_declared_is_found_by_the_probe(hf_model):
    model = hf_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.tanh())
    with pytest.raises(ConfigError, match=r"student: LlamaForCausalLM has logits that are off by"):
        read_head(model, "student")


@pytest.mark.parametrize("declared", [{"logit_scale": 0.9}, {"final_logit_softcapping": 3.0}])
def test_a_bend_that_is_declared_but_not_made_is_found_by_the_probe(hf_model, declared):
    (name, value), *_ = declared.items()
    model = hf_model()
    setattr(model.config, name, value)
    with pytest.raises(ConfigError, match=rf"with the softcap .*{value}.* would be wrong"):
        read_head(model, "student")


def test_a_model_without_a_head_matrix_is_refused(hf_model):
    model = hf_model()
    model.lm_head = nn.Identity()
    with pytest.raises(ConfigError, match="has no output embedding matrix"):
        read_head(model, "student")


def test_bfloat16_passes_the_probe(tokenizer):
    source = StudentConfig(config={"model_type": "llama", **TINY}, dtype="bfloat16")
    model = LanguageModel(load_model(source, tokenizer, name="student", seed=0, device="cpu"))
    assert model.lm_head_weight.dtype == torch.bfloat16


def test_the_law_of_a_model_has_its_gradient(student, batch):
    student.law(batch).token_logprobs(batch.token_ids).logprobs.sum().backward()
    assert all(p.grad is not None for p in student.model.parameters())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "lama"}, "student.config: "),
        ({**TINY, "model_type": "llama", "num_attention_heads": "two"}, "student.config"),
    ],
)
def test_a_bad_model_config_is_one_sentence(tokenizer, config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        _load(tokenizer, **config)


def test_a_missing_directory_suggests_its_neighbour(tokenizer, tmp_path):
    (tmp_path / "teacher").mkdir()
    source = StudentConfig(model_name_or_path=str(tmp_path / "teahcer"))
    with pytest.raises(ConfigError, match=r"no such directory .* did you mean .*teacher'"):
        load_model(source, tokenizer, name="student", seed=0, device="cpu")


def test_pickled_weights_are_refused(tokenizer, hf_model, tmp_path):
    hf_model().config.save_pretrained(tmp_path)
    torch.save(hf_model().state_dict(), tmp_path / "pytorch_model.bin")
    source = StudentConfig(model_name_or_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"no model at .*safetensors"):
        load_model(source, tokenizer, name="student", seed=0, device="cpu")


def test_an_output_dir_stands_for_its_newest_checkpoint(hf_model, tmp_path):
    for step in (1, 2):
        save_checkpoint(
            tmp_path, save_model=hf_model().save_pretrained, state={"step": step}, tensors={}
        )
    assert resolve_model_path(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_a_builtin_name_that_does_not_exist_suggests_one():
    with pytest.raises(ConfigError, match="did you mean 'chain_repair_teacher'"):
        resolve_model_path("builtin:chain_repair_techer")


def test_a_device_that_does_not_exist_is_one_sentence():
    with pytest.raises(ConfigError, match="device: cannot use 'gpu'"):
        resolve_device("gpu")


def test_a_tokenizer_is_needed_without_a_task():
    with pytest.raises(ConfigError, match=r"student.tokenizer_name_or_path: is required"):
        load_tokenizer(StudentConfig(config={"model_type": "llama"}))
