# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from opd import checkpoint as ckpt
from opd.schema import ConfigError


def _save(root, step, text="weights", **settings):
    return ckpt.save_checkpoint(
        root,
        save_model=lambda path: (path / "model.txt").write_text(text),
        state={"step": step},
        tensors={"x": torch.arange(3)},
        **settings,
    )


def test_round_trip(tmp_path):
    path = _save(tmp_path, 3)
    found = ckpt.load_checkpoint(path)
    assert found.state["step"] == 3
    assert torch.equal(found.tensors["x"], torch.arange(3))
    assert ckpt.load_checkpoint(tmp_path).path == path


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (9, 10, 100):
        _save(tmp_path, step)
    assert ckpt.newest_checkpoint(tmp_path).name == "checkpoint-100"


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        _save(tmp_path, step, save_total_limit=2)
    names = [path.name for path in ckpt.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_same_step_again_replaces(tmp_path):
    _save(tmp_path, 1, "old")
    assert (_save(tmp_path, 1, "new") / "model.txt").read_text() == "new"


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    _save(tmp_path, 1, "good")

    def fail(path):
        (path / "model.txt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ckpt.save_checkpoint(tmp_path, save_model=fail, state={"step": 2}, tensors={})
    assert ckpt.newest_checkpoint(tmp_path).name == "checkpoint-1"
    ckpt.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_killed_between_the_two_renames_of_a_replacement_keeps_the_old_one(tmp_path):
    _save(tmp_path, 1, "old").rename(tmp_path / ".trash-checkpoint-1")
    ckpt.remove_leftovers(tmp_path)
    assert (tmp_path / "checkpoint-1" / "model.txt").read_text() == "old"


def test_a_directory_without_state_is_not_a_checkpoint(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    assert ckpt.newest_checkpoint(tmp_path) is None
    with pytest.raises(ConfigError, match="no checkpoint at"):
        ckpt.load_checkpoint(tmp_path / "checkpoint-7")


def test_loading_runs_no_code(tmp_path):
    path = _save(tmp_path, 1)
    torch.save({"evil": _Evil()}, path / "training_state.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        ckpt.load_checkpoint(path)


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_random_state_round_trip(tmp_path):
    state = ckpt.random_state()
    torch.save(state, tmp_path / "state.pt")
    first = (random.random(), np.random.rand(), torch.rand(2).tolist())
    ckpt.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == first


def test_set_aside_moves_and_deletes_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("x")
    _save(tmp_path, 1)
    aside = ckpt.set_aside(tmp_path, ["metrics.jsonl", "config.yaml"])
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-1", "metrics.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["previous-1"]
    assert ckpt.set_aside(tmp_path, ["metrics.jsonl"]) is None


@pytest.mark.parametrize("name", ["state.json", "training_state.pt"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, name, content):
    path = _save(tmp_path, 3)
    (path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"checkpoint-3' is damaged, ") as caught:
        ckpt.load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_module_round_trip(tmp_path):
    module, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    ckpt.save_module(module, tmp_path)
    ckpt.load_module(other, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True)
    )


def test_no_module_leaves_no_file(tmp_path):
    ckpt.save_module(None, tmp_path)
    ckpt.load_module(None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_module_that_is_not_there_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "objective.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"objective\.safetensors cannot be read") as caught:
        ckpt.load_module(torch.nn.Linear(3, 2), tmp_path)
    assert "\n" not in str(caught.value)
