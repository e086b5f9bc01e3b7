# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from opd.assembly import claim_output_dir
from opd.config import parse_config
from opd.metrics import read_jsonl
from opd.schema import ConfigError
from opd.train import Interrupted, train

REPLAY = {
    "rollouts": {
        "kind": "replay",
        "init_threshold": 0.6,
        "loss_eps": 0.0,
        "capacity": 8,
        "max_completion_length": 8,
    },
    "evaluation": {"eval_steps": 2, "num_prompts": 4, "temperature": [1.0]},
}
POLICY_GRADIENT = {"objective": {"kind": "sampled_token"}, "gradient_accumulation_steps": 2}
CASES = {"replay": REPLAY, "sampled_token": POLICY_GRADIENT}

# what a child process does to itself: die by SIGKILL at the n-th call of a function
CHILD = """
import os, signal, sys
import opd.assembly, opd.checkpoint, opd.train
from opd.config import load_config
module, name, count = sys.argv[2].split(":")
target = sys.modules[module]
owner, calls = getattr(target, name), [0]
def dying(*arguments, **keywords):
    calls[0] += 1
    if calls[0] == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return owner(*arguments, **keywords)
setattr(target, name, dying)
opd.train.train(load_config(sys.argv[1]), quiet=True)
"""


def _weights(result):
    return (result.checkpoint / "model.safetensors").read_bytes()


def _losses(output_dir):
    rows = read_jsonl(Path(output_dir) / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def _run(values, **changes):
    return train(parse_config({**values, **changes}), quiet=True)


def _environment():
    import opd

    root = Path(opd.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])}


def test_a_run_leaves_config_metrics_and_a_loadable_model(values, config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(config, quiet=True)
    assert parse_config(yaml.safe_load((result.output_dir / "config.yaml").read_text())) == config
    assert [step for step, _ in _losses(result.output_dir)] == [1, 2, 3, 4]
    model = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    assert model.config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(result.checkpoint).eos_token == "E"


def test_metrics_have_the_names_of_the_design(config):
    result = train(config, quiet=True)
    row = read_jsonl(result.output_dir / "metrics.jsonl")[-1]
    names = [
        "loss",
        "reverse_kl",
        "forward_kl",
        "entropy",
        "teacher_entropy",
        "top1_agreement",
        "num_tokens",
        "completions/mean_length",
        "completions/clipped_ratio",
        "tokens_per_s",
        "time/rollout_s",
        "time/teacher_s",
        "time/student_s",
        "time/optim_s",
        "mem/peak_rss_bytes",
        "grad_norm",
        "learning_rate",
        "ledger/student_tokens_trained",
        "ledger/teacher_tokens_forward",
        "ledger/cost_units",
    ]
    assert set(names) <= set(row)


def test_same_seed_gives_bitwise_the_same_losses_and_weights(values, tmp_path):
    results = [_run(values, output_dir=str(tmp_path / name), max_steps=5) for name in "ab"]
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")
    assert _weights(results[0]) == _weights(results[1])


def test_another_seed_gives_other_losses(values, tmp_path):
    for seed in (0, 1):
        _run(values, output_dir=str(tmp_path / str(seed)), seed=seed)
    assert _losses(tmp_path / "0") != _losses(tmp_path / "1")


def test_accumulation_does_not_change_the_losses(values, tmp_path):
    losses = []
    for size, count in ((8, 1), (2, 4), (1, 8)):
        output_dir = str(tmp_path / f"{size}x{count}")
        _run(
            values,
            output_dir=output_dir,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            max_steps=1,
        )
        losses.append(_losses(output_dir)[0][1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_distilling_from_the_teacher_brings_the_student_closer(values):
    settings = {"max_steps": 40, "learning_rate": 2e-2, "per_device_train_batch_size": 16}
    losses = _losses(_run(values, **settings).output_dir)
    assert losses[-1][1] < 0.8 * losses[0][1]


def test_a_gradient_tolerance_learns_the_same(values, tmp_path):
    # a student whose laws are peaked; given tokens, or the first that falls differently would make
    # another run of it
    values["student"] = {"model_name_or_path": "builtin:chain_repair_teacher"}
    values["teacher"] = values["student"]
    values["rollouts"] = {"kind": "dataset", "max_completion_length": 24}
    losses, dropped = {}, {}
    for tolerance in (None, 1e-4, 1e-2):
        objective = {
            **values["objective"],
            "teacher_temperature": 0.7,
            "gradient_tolerance": tolerance,
        }
        output_dir = tmp_path / str(tolerance)
        changes = {"objective": objective, "learning_rate": 1e-3, "max_steps": 8}
        _run(values, output_dir=str(output_dir), **changes)
        losses[tolerance] = [loss for _, loss in _losses(output_dir)]
        rows = read_jsonl(output_dir / "metrics.jsonl")
        dropped[tolerance] = [row.get("gradient_dropped_l1") for row in rows if "loss" in row]
    exact = sum(losses[None])
    assert abs(losses[1e-4][-1] - losses[None][-1]) < 1e-4
    # most of 45 words are needed by some token even so, and yet
    assert min(dropped[1e-2]) > 1e-3
    assert abs(sum(losses[1e-2]) - exact) < 0.05 * exact


def test_evaluation_does_not_change_the_training(values, tmp_path):
    plain = _run(values, output_dir=str(tmp_path / "plain"))
    evaluation = {"eval_steps": 1, "num_prompts": 3, "lengths": [1, 2]}
    watched = _run(values, output_dir=str(tmp_path / "watched"), evaluation=evaluation)
    assert _weights(plain) == _weights(watched)
    assert "eval/accuracy/greedy/n2" in watched.metrics


def test_saving_does_not_change_the_training(values, tmp_path):
    plain = _run(values, output_dir=str(tmp_path / "plain"))
    saved = _run(values, output_dir=str(tmp_path / "saved"), save_steps=1)
    assert _weights(plain) == _weights(saved)


def test_the_teacher_does_not_change(config, monkeypatch):
    import opd.train
    from opd.assembly import open_run

    run = open_run(config)
    before = [p.clone() for p in run.teacher.model.parameters()]
    monkeypatch.setattr(opd.train, "open_run", lambda config: run)
    train(config, quiet=True)
    pairs = zip(before, run.teacher.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and b.grad is None for a, b in pairs)


@pytest.mark.parametrize(
    ("case", "death"),
    [
        ("replay", "opd.train:apply_gradients:6"),
        ("sampled_token", "opd.train:apply_gradients:6"),
        # 9 files and directories are flushed for a checkpoint: this is within the second
        ("replay", "opd.checkpoint:_flush:13"),
        # called before and after each: the third is written, and the first is to go
        ("replay", "opd.checkpoint:remove_leftovers:6"),
    ],
    ids=["in_a_step", "in_a_policy_gradient_step", "writing_a_checkpoint", "wrote_a_checkpoint"],
)
def test_killed_and_rerun_is_bitwise_the_run_that_was_not_killed(values, tmp_path, case, death):
    values = {**values, **CASES[case], "max_steps": 8, "save_steps": 2, "save_total_limit": 2}
    whole = _run(values, output_dir=str(tmp_path / "whole"))
    values["output_dir"] = str(tmp_path / "killed")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), death], env=_environment(), check=False
    )
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoint-8").exists()
    again = _run(values)
    assert _weights(again) == _weights(whole)
    assert _losses(again.output_dir) == _losses(whole.output_dir)


def test_kill_minus_nine_from_outside_and_the_same_command_again(values, tmp_path):
    values |= {"max_steps": 200, "save_steps": 20, "evaluation": {"num_prompts": 4}}
    whole = _run(values, output_dir=str(tmp_path / "whole"))
    values["output_dir"] = str(tmp_path / "killed")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "opd", "train", "--config", str(path), "--quiet"]
    child = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    # the step that this falls in is whatever the machine is at
    while not (metrics.exists() and metrics.read_text().count("\n") >= 27):
        assert child.poll() is None
        time.sleep(0.002)
    child.kill()
    child.wait()
    assert not (tmp_path / "killed" / "checkpoint-200").exists()
    subprocess.run(command, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    again = tmp_path / "killed" / "checkpoint-200" / "model.safetensors"
    assert again.read_bytes() == _weights(whole)
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")


def test_resuming_a_finished_run_does_nothing(values):
    evaluated = {**values, "evaluation": {"num_prompts": 2}}
    first = _run(evaluated)
    written = first.checkpoint.stat().st_mtime_ns
    second = _run(evaluated)
    assert second.metrics == first.metrics
    assert second.checkpoint.stat().st_mtime_ns == written


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(values):
    first = _run(values, save_steps=1)
    older = first.output_dir / "checkpoint-2"
    again = _run(values, resume_from_checkpoint=str(older), learning_rate=0.5)
    aside = first.output_dir / "previous-1" / "checkpoint-4" / "model.safetensors"
    assert _weights(again) != aside.read_bytes()
    assert (first.output_dir / "previous-1" / "checkpoint-3").is_dir()
    assert not (first.output_dir / "checkpoint-3").exists()
    assert [step for step, _ in _losses(first.output_dir)] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["hf", "speculative"])
def test_sigint_saves_after_the_step_and_the_rerun_goes_on(values, tmp_path, monkeypatch, kind):
    import opd.train

    values["rollouts"]["kind"] = kind
    whole = _run(values, output_dir=str(tmp_path / "whole"))
    original, calls = opd.train.apply_gradients, []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(opd.train, "apply_gradients", interrupting)
    with pytest.raises(Interrupted) as stop:
        _run(values)
    assert (stop.value.signum, stop.value.step) == (signal.SIGINT, 2)
    assert (Path(values["output_dir"]) / "checkpoint-2").is_dir()
    assert _weights(_run(values)) == _weights(whole)


def test_ledger_adds_up(values):
    result = _run(values, max_steps=3, rollouts={"kind": "hf", "max_completion_length": 5})
    ledger = result.ledger
    assert ledger["student_tokens_sampled"] == ledger["student_tokens_trained"]
    # 3 steps of 4 prompts with 4 tokens each
    prompt_tokens = 3 * 4 * 4
    expected = ledger["student_tokens_trained"] + prompt_tokens
    assert ledger["student_tokens_forward"] == ledger["teacher_tokens_forward"] == expected
    row = json.loads((result.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["num_tokens"] == expected


def test_a_second_run_in_the_same_output_dir_is_refused_until_the_first_ends(values, tmp_path):
    refused = pytest.raises(ConfigError, match=r"output_dir: another run is at work in '.*run'; ")
    with claim_output_dir(parse_config(values)), refused:
        _run(values)
    assert _run(values).step == 4


def test_nothing_left_to_do_still_leaves_a_checkpoint(values, tmp_path):
    done = _run(values)
    other = str(tmp_path / "other")
    again = _run(values, output_dir=other, resume_from_checkpoint=str(done.checkpoint))
    assert again.checkpoint.parent == tmp_path / "other"
    assert _weights(again) == _weights(done)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_projectors_are_trained_kept_and_resumed_bit_for_bit(values, tmp_path, version):
    objective = {"kind": "dskd", "version": version, "projector_learning_rate": 1e-2}
    values = {**values, "objective": objective, "save_steps": 2}
    values["rollouts"] = {"kind": "dataset", "max_completion_length": 8}
    whole = _run(values, output_dir=str(tmp_path / "whole"))
    values["output_dir"] = str(tmp_path / "killed")
    first = _run(values)
    trained = (first.checkpoint / "objective.safetensors").read_bytes()
    assert trained == (whole.checkpoint / "objective.safetensors").read_bytes()
    middle = first.checkpoint.with_name("checkpoint-2")
    assert trained != (middle / "objective.safetensors").read_bytes()
    # as if killed before the second checkpoint
    shutil.rmtree(first.checkpoint)
    again = _run(values)
    assert again.step == 4
    assert _weights(again) == _weights(whole)
    assert _losses(again.output_dir) == _losses(whole.output_dir)
    assert (again.checkpoint / "objective.safetensors").read_bytes() == trained
    # without them nothing goes on from there
    shutil.rmtree(again.checkpoint)
    (middle / "objective.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"objective\.safetensors cannot be read"):
        _run(values)
