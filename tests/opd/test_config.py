# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import yaml

from opd.config import (
    apply_override,
    config_hash,
    differences,
    dump_config,
    load_config,
    parse_config,
    read_yaml,
)
from opd.schema import ConfigError


@pytest.fixture
def path(values, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_dumped_config_loads_to_an_equal_one(config, tmp_path):
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_config_is_frozen(config):
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective.divergance=jsd", "objective.divergance: unknown key, did you mean 'diverg"),
        ("objective.kind=full_vocal", "got 'full_vocal', did you mean 'full_vocab'?"),
        ("learning_rate=fast", "learning_rate: must be a number, got 'fast'"),
        ("max_steps=1.5", "max_steps: must be an integer, got 1.5"),
        ("rollouts.temperature=-1", "rollouts.temperature: must be > 0, got -1"),
        ("student=3", "student: must be a mapping, got 3"),
        ("lmbda=0.5", "lmbda: unknown key, did you mean 'rollouts.lmbda'?"),
        ("evaluation={temperature: [-1]}", "evaluation.temperature.0: must be >= 0, got -1"),
        ("objective={kind: sampled_token, temperature: 2}", "must equal rollouts.temperature 1.0"),
        ("teacher=null", "teacher: is required by objective.kind 'full_vocab'"),
        ("task=null", "data.train_file: is required when there is no task"),
        ("task.kind=chain_repear", "task.kind: must be one of chain_repair"),
        ("rollouts.num_generations=3", "rollouts.num_generations: must divide the 4 completions"),
        ("objective.beta=0.3", "objective: reverse_kl"),
        ("objective.gradient_tolerance=0", "objective.gradient_tolerance: must be > 0, got 0"),
        ("objective={kind: full_vocab, divergence: jsd, beta: 1.0}", "jsd: beta must be in (0, 1)"),
        ("objective.divergence=jds", "did you mean 'jsd'"),
        ("warmup_steps=3", "did you mean lr_scheduler_type 'constant_with_warmup'?"),
        ("report_to=[html]", "report_to: must have 'jsonl' for 'html'"),
        ("report_to=[wandb]", "report_to.0: must be 'jsonl', 'tensorboard' or 'html', got 'wandb'"),
        ("rollouts={kind: replay}", "evaluation.eval_steps: is required by rollouts.kind 'replay'"),
        ("rollouts={kind: dataset, top_k: 3}", "top_k means something only with seq_kd: true"),
        ("student.dtype=float16", "student.dtype: must be float32 or bfloat16 for a student"),
        ("student={dtype: float32}", "student: must have model_name_or_path, or config"),
    ],
)
def test_a_bad_value_is_one_sentence(path, override, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert sentence.lower() in message.lower()
    assert len(message.splitlines()) == 1


def test_policy_gradient_needs_the_samplers_logprobs(path):
    overrides = ["objective={kind: sampled_token}", "rollouts={kind: mixture}"]
    with pytest.raises(ConfigError, match=r"rollouts.kind: must be 'hf'"):
        load_config(path, overrides)


@pytest.mark.parametrize("override", ["max_steps", "=3", "a..b=1"])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match="must look like key=value"):
        apply_override({}, override)


def test_an_override_through_a_value_is_refused():
    with pytest.raises(ConfigError, match="'seed' is not a section"):
        apply_override({"seed": 1}, "seed.x=1")


def test_overrides_are_yaml_and_numbers_may_lack_the_dot(path):
    config = load_config(path, ["learning_rate=1e-4", "task.lengths=[1, 2]", "--seed=7"])
    assert (config.learning_rate, config.task.lengths, config.seed) == (1e-4, [1, 2], 7)


@pytest.mark.parametrize(
    ("text", "names"), [("none", ()), ("jsonl", ("jsonl",)), ("[jsonl]", ("jsonl",))]
)
def test_report_to_is_read_as_in_hf(path, text, names):
    assert load_config(path, [f"report_to={text}"]).report_to == names


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "train.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"no such file or recipe, did you mean '.*train.yaml'"):
        load_config(tmp_path / "trian.yaml")


def test_a_missing_recipe_suggests_one():
    with pytest.raises(ConfigError, match="did you mean 'seqkd'"):
        load_config("seqdk")


def test_bad_yaml_names_line_and_column(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: [1\nb: 2\n")
    with pytest.raises(ConfigError, match=r"x.yaml:2:\d+: is not valid YAML"):
        read_yaml(path)


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: !!python/object/apply:os.getpid []")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_yaml(path)


def test_hash_is_over_what_changes_the_weights(values, config):
    assert config_hash(parse_config({**values, "output_dir": "x"})) == config_hash(config)
    assert config_hash(parse_config({**values, "logging_steps": 9})) == config_hash(config)
    watched = {**values, "evaluation": {"num_prompts": 3}}
    assert config_hash(parse_config(watched)) == config_hash(config)
    assert config_hash(parse_config({**values, "seed": 9})) != config_hash(config)


def test_hash_is_over_the_evaluation_where_the_rollouts_follow_it(values):
    values["rollouts"] = {"kind": "replay", "max_completion_length": 8}
    hashes = [
        config_hash(parse_config({**values, "evaluation": {"eval_steps": 1, "num_prompts": n}}))
        for n in (2, 3)
    ]
    assert hashes[0] != hashes[1]


def test_differences_name_the_path_and_both_values(values, config):
    other = parse_config({**values, "rollouts": {**values["rollouts"], "top_k": 5}})
    found = differences(config, other.model_dump(mode="json"))
    assert found == ["rollouts.top_k (5 there, 0 here)"]


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "student:\n  dtype: a\n  dtype: b"])
def test_a_key_that_is_there_twice_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x.yaml:[23]:\d: .* the key '\w+' is there twice"):
        read_yaml(path)


def test_merge_keys_still_work(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


def test_a_file_that_is_not_utf8_is_one_sentence(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"x.yaml: cannot be read as UTF-8"):
        read_yaml(path)
