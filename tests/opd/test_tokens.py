# SPDX-License-Identifier: Apache-2.0
"""Runs whose teacher has another tokenizer, from the configuration to the checkpoint."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch

from opd.assembly import open_run
from opd.checkpoint import newest_checkpoint
from opd.cli import main
from opd.config import parse_config
from opd.metrics import read_jsonl
from opd.schema import ConfigError
from opd.train import Interrupted, train
from tests.opd.conftest import make_hf_model
from tests.opd.crossing import byte_level, pieces, save_pair


@pytest.fixture
def values(tmp_path):
    return save_pair(tmp_path)


def _run(values, **changes):
    return train(parse_config({**values, **changes}), quiet=True)


def _losses(output_dir):
    rows = read_jsonl(output_dir / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_two_lines_change_a_run_to_a_teacher_with_other_tokens(values, tmp_path):
    evaluation = {"num_prompts": 4, "temperature": [1.0], "num_samples": 0}
    own = {"teacher": values["student"], "objective": {"kind": "full_vocab"}}
    base = {**values, **own, "evaluation": evaluation, "max_steps": 2}
    same = _run(base, output_dir=str(tmp_path / "same")).metrics
    lines = {key: values[key] for key in ("teacher", "objective")}
    result = _run(base, **lines)
    crossing = result.metrics
    assert "eval/data_states/reverse_kl" in same
    assert not any(name.endswith("_kl") for name in crossing)
    for states in ("student_states", "data_states"):
        assert crossing[f"eval/{states}/chunk_gap_abs"] > 0
    for found in (same, crossing):
        assert found["eval/data_states/bits_per_byte"] > 0
        assert found["eval/data_states/teacher_bits_per_byte"] > 0
    row = next(row for row in read_jsonl(result.output_dir / "metrics.jsonl") if "loss" in row)
    assert row["chunks/aligned_ratio"] == 1.0 and row["chunks/unaligned_bytes"] == 0
    assert row["chunks/student_tokens"] >= 1 and row["time/translate_s"] > 0
    assert row["ledger/teacher_tokens_forward"] != row["ledger/student_tokens_forward"]


def test_the_teachers_law_is_over_its_own_tokens_whatever_its_padding(values):
    run = open_run(parse_config(values))
    assert run.student.lm_head_weight.shape[0] == len(byte_level())
    assert run.teacher.lm_head_weight.shape[0] == len(pieces()) + 12
    assert run.teacher.vocab_size == len(pieces())
    assert not run.translator.has_one_vocabulary


@pytest.mark.parametrize("teacher", ["teacher", "student"])
def test_ids_of_a_padded_head_are_not_sampled(values, teacher):
    path = values["student"]["model_name_or_path"]
    make_hf_model(vocab_size=len(byte_level()) + 200).save_pretrained(path)
    values["teacher"] = values[teacher]
    assert _run(values, max_steps=1).step == 1


def test_evaluation_is_the_same_in_batches_of_any_size(values):
    evaluation = {"num_prompts": 5, "temperature": [0.0], "num_samples": 0}
    found = []
    for size in (2, 64):
        one = {"evaluation": {**evaluation, "batch_size": size}, "max_steps": 1}
        found.append(_run(values, **one, output_dir=values["output_dir"] + str(size)).metrics)
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4), name


def test_bits_per_byte_are_the_nats_of_all_tokens_over_the_bytes_of_the_text(values):
    import math

    from opd.evaluation import EvaluationConfig, evaluate, load_held_out

    run = open_run(parse_config({**values, "evaluation": {"num_prompts": 6}}))
    config = EvaluationConfig(num_prompts=6, temperature=[0.0])
    held_out = load_held_out(config, None, run.config.data, run.tokenizer)
    found = evaluate(
        run.student,
        run.teacher,
        run.tokenizer,
        held_out,
        config,
        # of samples only
        max_completion_length=3,
        student_bytes=run.student_bytes,
        translator=run.translator,
    ).metrics
    num_bytes = sum(len(prompt.row["completion"].encode()) for prompt in held_out.prompts)
    num_tokens = sum(len(prompt.completion_ids) for prompt in held_out.prompts)
    expected = found["eval/data_states/nll"] * num_tokens / (math.log(2) * num_bytes)
    assert found["eval/data_states/bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_held_out_rows_beyond_the_positions_are_counted(values, tmp_path):
    row = {"prompt": "apple", "completion": "apple and " * 100}
    with open(values["data"]["eval_file"], "a") as file:
        file.write(json.dumps(row) + "\n")
    values["data"] = {**values["data"], "train_file": str(tmp_path / "train.jsonl")}
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "apple", "completion": "b"}))
    evaluation = {"num_prompts": 64, "temperature": [0.0], "num_samples": 0}
    found = _run(values, evaluation=evaluation, max_steps=1).metrics
    assert found["eval/data_states/dropped_rows"] == 1
    assert found["eval/data_states/bits_per_byte"] > 0


def test_eval_counts_in_bytes_without_a_section_of_its_own(values, tmp_path):
    _run(values, max_steps=1)
    config, output = tmp_path / "run.yaml", tmp_path / "eval.json"
    config.write_text(json.dumps({**values, "max_steps": 1}))
    assert main(["eval", "--config", str(config), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["eval/data_states/bits_per_byte"] > 0


def test_a_step_that_hardly_aligns_is_told_once(values, caplog):
    ids = byte_level()("apple and 1234")["input_ids"]
    # a chunk with a part of its tokens trained is not aligned
    row = {"prompt": "x", "completion": "apple and 1234"}
    row["completion_mask"] = [i % 2 for i in range(len(ids) + 1)]
    with open(values["data"]["train_file"], "w") as file:
        file.write(json.dumps(row))
    rollouts = {"kind": "dataset", "max_completion_length": 64}
    _run(values, max_steps=2, rollouts=rollouts)
    said = [line for line in caplog.messages if "of the chunks are aligned" in line]
    assert len(said) == 1 and said[0].startswith("step 1: only")


def test_an_objective_of_one_vocabulary_names_those_that_cross(values):
    values["objective"] = {"kind": "full_vocab"}
    with pytest.raises(ConfigError, match=r"token 0 is '<unk>' there and '<\|end\|>'.*alm.*cross"):
        open_run(parse_config(values))


def test_rollouts_that_mix_both_models_tokens_are_refused(values):
    values["rollouts"] = {"kind": "mixture", "seq_kd": True, "max_completion_length": 8}
    with pytest.raises(ConfigError, match=r"rollouts: the teacher's vocabulary differs, .*seq_kd"):
        open_run(parse_config(values))


def test_what_such_a_teacher_writes_is_read_in_the_students_tokens(values):
    """SeqKD goes through bytes, and the teacher's end becomes the student's."""
    values["rollouts"] = {"kind": "dataset", "seq_kd": True, "max_completion_length": 12}
    values["objective"] = {"kind": "token_nll"}
    run = open_run(parse_config(values))
    prompts = run.data.take(0, 4)
    # a teacher that ends its texts soon
    run.teacher.model.get_output_embeddings().weight.data[pieces().eos_token_id] *= 4
    torch.manual_seed(3)
    found = run.rollouts.collect(prompts, 0)
    torch.manual_seed(3)
    written = run.rollouts._writing.collect(
        [replace(p, ids=torch.tensor(pieces()(p.row["prompt"])["input_ids"])) for p in prompts], 0
    )
    for side, text, prompt in zip(found, written, prompts, strict=True):
        assert torch.equal(side.ids[: side.prompt_length], prompt.ids)
        said = run.translator.teacher_bytes.join(text.completion_ids)
        heard = run.translator.student_bytes.join(side.completion_ids)
        assert said.startswith(heard) and side.origin == "teacher"
        assert side.completion_length <= 12
        if side.is_terminated:
            assert heard == said and int(side.ids[-1]) == byte_level().eos_token_id
    assert any(side.is_terminated for side in found)
    assert _run(values, max_steps=2).step == 2


def test_supervised_runs_may_be_compared_with_such_a_teacher(values):
    values |= {"objective": {"kind": "token_nll"}, "max_steps": 1}
    values["rollouts"] = {"kind": "dataset", "max_completion_length": 64}
    found = _run(values, evaluation={"num_prompts": 2, "temperature": [0.0]}).metrics
    assert "eval/data_states/chunk_gap_abs" in found


def test_a_tokenizer_can_lie_elsewhere(values, tmp_path):
    pieces().save_pretrained(tmp_path / "elsewhere")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "teacher" / name).unlink()
    values["teacher"]["tokenizer_name_or_path"] = str(tmp_path / "elsewhere")
    assert open_run(parse_config(values)).teacher.vocab_size == len(pieces())
    values["teacher"]["tokenizer_name_or_path"] = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"teacher\.tokenizer_name_or_path: no tokenizer at"):
        open_run(parse_config(values))
    values["teacher"]["tokenizer_name_or_pth"] = values["teacher"].pop("tokenizer_name_or_path")
    with pytest.raises(ConfigError, match="did you mean 'tokenizer_name_or_path'"):
        parse_config(values)


def test_another_tokenizer_of_the_teacher_is_not_gone_on_with(values, tmp_path):
    _run(values, max_steps=1)
    words = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="trained with another tokenizer of the teacher"):
        _run(values, max_steps=1)


def test_a_server_is_asked_about_the_teachers_own_tokens(values, live, tmp_path):
    """Hidden states and log-probabilities over the wire teach what the teacher in memory does."""
    from transformers import AutoModelForCausalLM

    from opd.server.engine import Engine
    from opd.teachers import LocalTeacher

    local = _losses(_run(values, max_steps=2).output_dir)
    model = AutoModelForCausalLM.from_pretrained(values["teacher"]["model_name_or_path"])
    teacher = LocalTeacher(model, name="teacher")
    url = live(Engine(teacher, name="tiny", tokenizer=pieces()))
    for signal_kind in ("hidden", "topk"):
        values["teacher"] = {
            "kind": "server",
            "url": url,
            "signal": signal_kind,
            "tokenizer_name_or_path": str(tmp_path / "teacher"),
        }
        out = str(tmp_path / signal_kind)
        served = _losses(_run(values, max_steps=2, output_dir=out).output_dir)
        for (_, there), (_, here) in zip(local, served, strict=True):
            assert there == pytest.approx(here, rel=1e-3), signal_kind


def _at_the_third_step(monkeypatch, what):
    from opd import train as loop

    collate, calls = loop.collate_step, []

    def collating(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            what()
        return collate(*arguments, **keywords)

    monkeypatch.setattr(loop, "collate_step", collating)


def _die():
    raise MemoryError


@pytest.mark.parametrize(
    ("what", "how"),
    [(_die, MemoryError), (lambda: signal.raise_signal(signal.SIGINT), Interrupted)],
    ids=["killed", "ctrl_c"],
)
def test_a_run_that_stopped_goes_on_bit_for_bit(values, tmp_path, monkeypatch, what, how):
    values |= {"save_steps": 1}
    whole = _run(values, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        _at_the_third_step(patch, what)
        with pytest.raises(how):
            _run(values)
    done = 2 if how is MemoryError else 3
    assert newest_checkpoint(values["output_dir"]).name == f"checkpoint-{done}"
    result = _run(values)
    assert _losses(result.output_dir) == _losses(whole.output_dir)
    weights = [(run.checkpoint / "model.safetensors").read_bytes() for run in (whole, result)]
    assert weights[0] == weights[1]
