# SPDX-License-Identifier: Apache-2.0
"""opd cache: what it scores, that it goes on after a stop, and what it says."""

from __future__ import annotations

import pytest
import torch
import yaml

import opd_kernels as opk
from opd.assembly import load_run_tokenizer, load_student, load_teacher
from opd.batch import Trajectory, collate
from opd.cli import main
from opd.config import parse_config
from opd.store import DrawsForm, TeacherStore, TopkForm
from opd.store.build import build as build_store
from opd.store.writer import StoreWriter

TOPK = 6
DATA = {"kind": "dataset", "max_completion_length": 8}


@pytest.fixture
def settings(values):
    """A run on the data's completions."""
    objective = {"kind": "full_vocab", "divergence": "forward_kl", "temperature": 2.0}
    return {**values, "rollouts": dict(DATA), "objective": objective}


@pytest.fixture
def run_file(settings, tmp_path):
    """The same as a file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def truth(config, record):
    """Log-probs [C, V] of a record's laws from the dense logits."""
    tokenizer = load_run_tokenizer(config)
    teacher = load_teacher(config, tokenizer, load_student(config, tokenizer))
    ids = torch.cat([record.prompt_ids, record.completion_ids])
    prompt = len(record.prompt_ids)
    mask = torch.arange(len(ids)) >= prompt
    batch = collate([Trajectory(ids=ids, prompt_length=prompt, loss_mask=mask)], pad_id=0)
    law = teacher.law(batch)
    logits = law.head.logits(law.hidden()).double() / config.objective.temperature
    return torch.log_softmax(logits, 1)


def test_build_keeps_the_teachers_laws_of_every_completion(settings, tmp_path):
    config = parse_config(settings)
    built = build_store(config, tmp_path / "store", num_topk=TOPK, quiet=True)
    store = TeacherStore.open(built.path)
    assert built.num_new + built.num_known == 32
    assert len(store) == built.num_new
    assert store.manifest.fingerprint.temperature == 2.0
    record = next(iter(store))
    dense = truth(config, record)
    assert len(dense) == len(record.completion_ids) > 1
    expected = dense.topk(TOPK).values
    torch.testing.assert_close(record.logprobs.double(), expected, rtol=0, atol=0.02)
    inside = dense.gather(1, record.ids.long())
    torch.testing.assert_close(record.logprobs.double(), inside, rtol=0, atol=0.02)
    tail = torch.log(-torch.expm1(expected.logsumexp(1)))
    torch.testing.assert_close(record.tail_logprob.double(), tail, rtol=1e-4, atol=1e-5)
    entropy = -(dense.exp() * dense).sum(1)
    torch.testing.assert_close(record.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("proposal", [1.0, 3.0])
def test_draws_are_those_of_the_law_whoever_makes_them(settings, tmp_path, proposal):
    """In whatever order and batches completions come, each gets the same tokens of its laws."""
    config = parse_config(settings)
    form = DrawsForm(num_draws=9, proposal_temperature=proposal, seed=3)
    build_store(config, tmp_path / "one", draws=form, quiet=True)
    others = parse_config({**settings, "per_device_train_batch_size": 3, "seed": 5})
    build_store(others, tmp_path / "two", draws=form, quiet=True)
    one, two = TeacherStore.open(tmp_path / "one"), TeacherStore.open(tmp_path / "two")
    assert len(one) == len(two) > 10
    for record in one:
        same = two[record.prompt_ids, record.completion_ids]
        assert torch.equal(same.ids, record.ids) and torch.equal(same.weights, record.weights)
    dense = truth(config, record)
    uniforms = form.uniforms(one.key(record.prompt_ids, record.completion_ids), len(dense))
    drawn = opk.sample_tokens(dense, uniforms, proposal_temperature=proposal)
    width = record.ids.shape[1]
    assert torch.equal(record.ids, drawn.ids[:, :width])
    torch.testing.assert_close(
        record.weights.double(), drawn.weights[:, :width], rtol=6e-4, atol=1e-6
    )
    known = -(drawn.weights * drawn.logprobs.clamp_min(-100)).sum(1)
    torch.testing.assert_close(record.entropy.double(), known, rtol=1e-4, atol=1e-5)


def test_a_second_build_scores_nothing(settings, tmp_path):
    config = parse_config(settings)
    first = build_store(config, tmp_path / "store", num_topk=TOPK, quiet=True)
    again = build_store(config, tmp_path / "store", num_topk=TOPK, quiet=True)
    assert (again.num_new, again.num_known) == (0, 32)
    # without the note of what is done, every completion is looked up
    for note in first.path.glob("build-*.json"):
        note.write_text("{")
    third = build_store(config, tmp_path / "store", num_topk=TOPK, quiet=True)
    assert (third.num_new, third.num_known) == (0, 32)
    assert len(TeacherStore.open(first.path)) == first.num_new
    # a shard that was damaged and removed is made again
    next(first.path.glob("shard-*")).unlink()
    last = build_store(config, tmp_path / "store", num_topk=TOPK, quiet=True)
    assert last.num_new == first.num_new


@pytest.mark.parametrize("kind", ["dataset", "hf"])
def test_a_stopped_build_goes_on(settings, tmp_path, monkeypatch, kind):
    config = parse_config({**settings, "rollouts": {**DATA, "kind": kind}})
    whole = build_store(config, tmp_path / "whole", num_topk=TOPK, quiet=True)
    append, calls = StoreWriter.append, 0

    def stop(self, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return append(self, *arguments, **options)

    monkeypatch.setattr(StoreWriter, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        build_store(config, tmp_path / "parts", num_topk=TOPK, shard_bytes=600, quiet=True)
    done = len(TeacherStore.open(tmp_path / "parts"))
    assert 0 < done <= 8
    rest = build_store(config, tmp_path / "parts", num_topk=TOPK, shard_bytes=600, quiet=True)
    assert 0 < rest.num_new <= whole.num_new - done
    one, two = TeacherStore.open(tmp_path / "parts"), TeacherStore.open(whole.path)
    assert len(one) == len(two)
    for record in two:
        same = one[record.prompt_ids, record.completion_ids]
        assert torch.equal(same.logprobs, record.logprobs)


def test_student_completions_are_scored(settings, tmp_path):
    rollouts = {"kind": "hf", "max_completion_length": 5, "num_generations": 2}
    config = parse_config({**settings, "rollouts": rollouts})
    built = build_store(config, tmp_path / "store", num_topk=TOPK, quiet=True)
    assert built.num_new + built.num_known == config.max_steps * config.num_trajectories
    assert all(1 <= len(record.completion_ids) <= 5 for record in TeacherStore.open(built.path))


def test_another_teacher_does_not_fit_the_store(settings, tmp_path, run_file, capsys):
    arguments = ["--config", str(run_file), "--store", str(tmp_path / "s"), "--num-topk", "6"]
    assert main(["cache", "build", *arguments, "--quiet"]) == 0
    assert main(["cache", "build", *arguments, "teacher.config.initializer_range=0.1"]) == 2
    assert "differs in the model's configuration" in capsys.readouterr().err
    assert main(["cache", "build", *arguments, "objective.temperature=1.0"]) == 2
    assert "the temperature (2.0 there, 1.0 here)" in capsys.readouterr().err


def test_cache_info_and_verify_say_what_is_there(tmp_path, run_file, capsys):
    path = tmp_path / "run" / "teacher_store"
    assert main(["cache", "build", "--config", str(run_file), "--num-topk", "6"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(path)
    assert "step 8/8" in captured.err and "completions of" in captured.err
    assert main(["cache", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "random weights" in out and "the 6 likeliest tokens, 10 bits each" in out
    assert main(["cache", "verify", str(path)]) == 0
    assert "records in 1 shards are whole" in capsys.readouterr().out
    shard = next(path.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(bytes(data))
    assert main(["cache", "verify", str(path)]) == 1
    assert "is damaged" in capsys.readouterr().out
    assert main(["cache", "info", str(tmp_path)]) == 2
    assert "no teacher store at" in capsys.readouterr().err


def test_what_a_store_keeps_follows_the_options_and_the_objective(run_file, capsys, tmp_path):
    def build(name, *words):
        path = tmp_path / name
        arguments = ["--config", str(run_file), "--store", str(path), "--quiet", *words]
        assert main(["cache", "build", *arguments]) == 0
        return TeacherStore.open(path).manifest.form

    objective = "objective={kind: teacher_samples, num_draws: 7, proposal_temperature: 2.0}"
    assert build("a", "--num-draws", "4") == DrawsForm(num_draws=4)
    expected = DrawsForm(num_draws=7, proposal_temperature=2.0, seed=6)
    assert build("b", objective, "seed=6") == expected
    assert build("c", objective, "--num-draws", "3").proposal_temperature == 2.0
    assert build("d", objective, "--num-topk", "5") == TopkForm(num_topk=5)
    capsys.readouterr()
    assert main(["cache", "info", str(tmp_path / "b")]) == 0
    assert "7 draws at proposal temperature 2, seed 6" in capsys.readouterr().out
    # and is what another objective cannot train on
    train = [
        "train",
        "--config",
        str(run_file),
        "--quiet",
        "objective={kind: topk, teacher_top_k: 3}",
    ]
    assert main([*train, f"teacher={{kind: cached, path: {tmp_path / 'b'}}}"]) == 2
    words = "objective.kind: must be one that asks for tokens that it draws, which is what the"
    assert words in capsys.readouterr().err


def test_what_cannot_be_cached_is_refused_in_words(settings, run_file, capsys, tmp_path):
    arguments = ["--config", str(run_file), "--store", str(tmp_path / "s")]
    assert main(["cache", "build", *arguments, "--num-topk", "46"]) == 2
    assert "--num-topk: must be in [1, 45]" in capsys.readouterr().err
    assert main(["cache", "build", *arguments, "--num-topk", "6", "--bits", "3"]) == 2
    assert "bits must be in [4, 16]" in capsys.readouterr().err
    assert main(["cache", "build", *arguments, "--num-topk", "6", "--num-draws", "3"]) == 2
    assert "--num-draws: a store holds draws or the likeliest" in capsys.readouterr().err
    assert main(["cache", "build", *arguments, "--num-draws", "5000"]) == 2
    assert "num_draws must be in [1, 4096], got 5000" in capsys.readouterr().err
    evaluation = "evaluation={eval_steps: 2}"
    assert main(["cache", "build", *arguments, "rollouts={kind: replay}", evaluation]) == 2
    assert "follows a student that trains" in capsys.readouterr().err
