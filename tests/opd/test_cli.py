# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import opd
from opd.cli import main


@pytest.fixture
def path(values, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def _fails(capsys, *arguments):
    """The one line on the standard error of a command that ends with code 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_train_then_eval_then_report(path, tmp_path, capsys):
    evaluation = "evaluation={num_prompts: 3, lengths: [1, 2], temperature: [1.0]}"
    assert main(["train", "--config", path, "--quiet", evaluation]) == 0
    assert "checkpoint-4" in capsys.readouterr().out
    output = tmp_path / "new" / "eval.json"
    command = ["eval", "--config", path, evaluation, "--output", str(output)]
    assert main(command) == 0
    assert "eval/accuracy/t1/n2" in capsys.readouterr().out
    from opd.metrics import last_evaluation

    assert json.loads(output.read_text()) == last_evaluation(tmp_path / "run")
    assert (
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "also/new/r.html")]) == 0
    )
    assert (tmp_path / "also/new/r.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective.divergance=jsd", "command line: objective.divergance: unknown key, did you"),
        ("learning_rate=[]", "command line: learning_rate: must be a number, got []"),
        ("learning_rate", "override 'learning_rate': must look like key=value"),
        ("data.train_file=nothing.jsonl", "data.train_file: no such file 'nothing.jsonl'"),
        ("teacher.config.vocab_size=50", "the teacher's head has 50 tokens and the student's 45"),
        ("teacher.model_name_or_path=builtin:chain", "teacher.model_name_or_path: no builtin"),
        ("rollouts.max_completion_length=99", "must be at most 60 with prompts of up to 4 tokens"),
        (
            "teacher.config.max_position_embeddings=8",
            "rollouts.max_completion_length: must be at most 4 with prompts of up to 4 tokens and "
            "a teacher of 8 positions, got 8",
        ),
        (
            "evaluation={max_completion_length: 61}",
            "evaluation.max_completion_length: must be at most 60 with prompts of up to 4 tokens",
        ),
        ("output_dir=/proc/here", "output_dir: cannot make '/proc/here'"),
        ("resume_from_checkpoint=nowhere", "resume_from_checkpoint: no checkpoint at 'nowhere'"),
        ("device=tpu9", "device: cannot use 'tpu9'"),
        ("student.config.model_type=lama", "student.config: "),
        ("student.config.vocab_size=10", "student: its head has 10 tokens, fewer than the 45"),
    ],
)
def test_a_bad_setting_is_one_sentence_and_code_2(path, capsys, override, sentence):
    assert sentence in _fails(capsys, "train", "--config", path, "--quiet", override)


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "PATH", "--max_steps=2", "--quiet", "seed=3"],
        ["max_steps=9", "seed=3", "--config", "PATH", "max_steps=2", "--quiet"],
        ["max_steps=9", "--quiet", "--max_steps=2", "--config", "PATH", "--seed=3"],
        ["--seed=3", "max_steps=2", "--quiet", "--config", "PATH"],
    ],
    ids=" ".join,
)
def test_overrides_stand_anywhere_and_the_last_counts(path, tmp_path, monkeypatch, words):
    seen = []
    monkeypatch.setattr("opd.train.train", lambda config, quiet: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", *[path if word == "PATH" else word for word in words]])
    assert (seen[0].max_steps, seen[0].seed) == (2, 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max_steps", "3"], "unknown option '--max_steps', did you mean 'max_steps=3'?"),
        (["--quite"], "unknown option '--quite', did you mean '--quiet'?"),
        (["--max_step=3"], "max_step: unknown key, did you mean 'max_steps'?"),
        (["-seed=3"], "unknown option '-seed=3', did you mean 'seed=3'?"),
    ],
)
def test_an_unknown_option_is_one_sentence_and_code_2(path, capsys, words, sentence):
    assert sentence in _fails(capsys, "train", "--config", path, *words)


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys):
    line = _fails(capsys, "report", "nowhere", "--output", str(tmp_path))
    assert line == f"--output: '{tmp_path}' is a directory, a file is wanted"
    assert "--output: cannot make '/proc/x'" in _fails(
        capsys, "report", "nowhere", "--output", "/proc/x/y"
    )


def test_the_options_of_a_command_are_the_ones_that_are_meant(path, capsys):
    line = _fails(capsys, "cache", "build", "--config", path, "--stroe", "x")
    assert line == "unknown option '--stroe', did you mean '--store'?"
    assert "'--stroe', did you mean 'stroe=x'?" in _fails(
        capsys, "train", "--config", path, "--stroe", "x"
    )


@pytest.mark.parametrize("temperature", ["0.2", "4.1", "nan"])
def test_draws_that_tell_little_are_refused_before_the_work(path, capsys, temperature):
    line = _fails(capsys, "cache", "build", "--config", path, "--proposal-temperature", temperature)
    assert line.startswith("--proposal-temperature: must be in [0.25, 4]: far below 1 the draws")
    assert line.endswith(f"got {temperature}")


def test_a_missing_config_is_one_sentence_and_code_2(path, capsys):
    assert "did you mean" in _fails(capsys, "train", "--config", path.replace("x.y", "y.y"))


def test_a_teacher_with_other_words_is_one_sentence_and_code_2(path, tmp_path, capsys, hf_model):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(45)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))
    tokenizer.save_pretrained(tmp_path / "other")
    hf_model().save_pretrained(tmp_path / "other")
    override = f"teacher.model_name_or_path={tmp_path / 'other'}"
    line = _fails(capsys, "train", "--config", path, "--quiet", override)
    assert "the teacher's vocabulary differs, token 0 is 'w0' there and 'PAD'" in line


def test_other_settings_in_the_same_output_dir_are_refused_with_the_way_out(path, capsys):
    assert main(["train", "--config", path, "--quiet"]) == 0
    capsys.readouterr()
    line = _fails(capsys, "train", "--config", path, "--quiet", "learning_rate=0.5")
    assert "learning_rate (0.01 there, 0.5 here)" in line
    assert "resume_from_checkpoint=none" in line


def test_starting_afresh_keeps_the_earlier_run(path, tmp_path):
    assert main(["train", "--config", path, "--quiet"]) == 0
    again = ["train", "--config", path, "--quiet", "seed=1", "resume_from_checkpoint=none"]
    assert main(again) == 0
    assert (tmp_path / "run" / "previous-1" / "checkpoint-4").is_dir()
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_eval_without_a_checkpoint_says_so(path, capsys):
    assert "--checkpoint: is required" in _fails(capsys, "eval", "--config", path)


def test_eval_checks_positions_too(path, capsys):
    assert main(["train", "--config", path, "--quiet", "max_steps=1"]) == 0
    capsys.readouterr()
    line = _fails(capsys, "eval", "--config", path, "evaluation={max_completion_length: 99}")
    assert line.startswith("evaluation.max_completion_length: must be at most 60")


def test_eval_of_a_checkpoint_that_does_not_exist_says_so(path, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    line = _fails(capsys, "eval", "--config", path, "--checkpoint", str(tmp_path / "rnus"))
    assert line.startswith("--checkpoint: no such directory")
    assert "did you mean" in line


def test_training_that_diverges_is_one_sentence_and_code_1(path, capsys):
    command = ["train", "--config", path, "--quiet", "learning_rate=1e30", "max_grad_norm=0"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "a lower learning_rate" in err


def test_report_of_no_run_says_so(tmp_path, capsys):
    assert "has no metrics.jsonl of a run" in _fails(capsys, "report", str(tmp_path))


def test_recipes_are_listed_with_their_sources(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name in ("seqkd", "gkd", "opd_reverse_kl", "opd_sampled", "distillm", "skd", "2306.13649"):
        assert name in out


def test_kernels_are_listed_with_reasons(capsys):
    assert main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert "fused_linear_divergence" in out
    assert "cpu" in out


def test_help_is_light():
    root = Path(opd.__file__).parents[1]
    code = "import sys, opd.cli; opd.cli._parser(); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"


def test_ctrl_c_is_one_line_a_checkpoint_and_code_130(path, tmp_path):
    root = Path(opd.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])}
    command = [sys.executable, "-m", "opd", "train", "--config", path, "--quiet", "max_steps=5000"]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(2)
    _, err = child.communicate()
    assert child.returncode == 130
    assert len(err.strip().splitlines()) == 1
    assert "stopped after step" in err
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
