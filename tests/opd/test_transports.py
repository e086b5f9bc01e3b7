# SPDX-License-Identifier: Apache-2.0
"""A run learns the same whatever brings the teacher's laws: memory, a server, or a store."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import threading
import time

import pytest
import torch

import opd.train
from opd.assembly import open_run
from opd.checkpoint import list_checkpoints
from opd.clients import ServerFault
from opd.clients.opd_server import OpdClient
from opd.config import parse_config
from opd.metrics import read_jsonl
from opd.rollouts.replay import ReplayRollouts
from opd.schema import ConfigError
from opd.server.engine import Engine
from opd.store import DrawsForm
from opd.store.build import build
from opd.tasks import TASKS
from opd.teachers import LocalTeacher, ServerTeacher
from opd.train import Interrupted, train
from tests.opd.server.live import running

VOCAB_SIZE = 45
TOPK = {"kind": "topk", "divergence": "forward_kl", "teacher_top_k": VOCAB_SIZE}
DRAWS = {"kind": "teacher_samples"}
DATASET = {"kind": "dataset", "max_completion_length": 60}


@pytest.fixture
def model_path(tmp_path, hf_model):
    """A teacher on the disk."""
    path = tmp_path / "teacher"
    hf_model(seed=2, hidden_size=24).save_pretrained(path)
    TASKS["chain_repair"]().load_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def url(model_path, tokenizer):
    """The same teacher behind a port."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path)
    engine = Engine(
        LocalTeacher(model, name="teacher"),
        name="tiny",
        tokenizer=tokenizer,
        max_request_tokens=4096,
    )
    with contextlib.ExitStack() as stack:
        # each sequence alone: one padded beside another's request differs in the last bits
        yield stack.enter_context(running(engine, max_batch_tokens=1))


@pytest.fixture
def run(values, tmp_path, model_path):
    """A factory: losses and the last weights of a short run with a teacher and changes."""

    def start(name, **changes):
        local = {"kind": "local", "model_name_or_path": model_path}
        mine = {**copy.deepcopy(values), "teacher": local, **changes}
        mine["output_dir"] = str(tmp_path / name)
        mine["max_steps"] = 3
        result = train(parse_config(mine), quiet=True)
        rows = read_jsonl(result.output_dir / "metrics.jsonl")
        from safetensors.torch import load_file

        weights = load_file(result.checkpoint / "model.safetensors")
        losses = [row["loss"] for row in rows if "loss" in row]
        return losses, torch.cat([weights[key].flatten() for key in sorted(weights)])

    return start


def _same(ours, theirs, *, rel):
    losses, weights = ours
    expected_losses, expected = theirs
    assert losses == pytest.approx(expected_losses, rel=rel)
    # what one step of Adam does to a weight is learning_rate, 1e-2: the sign of a gradient near 0
    # may differ, on few weights
    assert (weights - expected).abs().mean() < 1e-2 * rel
    assert expected.abs().mean() > 0.01


def test_hidden_states_from_a_server(run, url):
    local = run("local")
    served = run("served", teacher={"kind": "server", "url": url, "hidden_dtype": "float32"})
    _same(served, local, rel=1e-4)


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
def test_top_k_from_a_server(run, url, support):
    objective = {**TOPK, "teacher_top_k": 6, "support": support}
    local = run("local", objective=objective)
    teacher = {"kind": "server", "url": url, "signal": "topk"}
    served = run("served", objective=objective, teacher=teacher)
    _same(served, local, rel=1e-3)


def test_sampled_tokens_from_a_server(run, url):
    objective = {"kind": "sampled_token"}
    local = run("local", objective=objective)
    teacher = {"kind": "server", "url": url, "signal": "topk"}
    _same(run("served", objective=objective, teacher=teacher), local, rel=1e-3)


def test_a_store_is_the_teacher_of_an_offline_stage(run, values, tmp_path, model_path):
    local = run("local", objective=TOPK, rollouts=DATASET)
    config = parse_config(
        {
            **copy.deepcopy(values),
            "teacher": {"kind": "local", "model_name_or_path": model_path},
            "objective": TOPK,
            "rollouts": DATASET,
        }
    )
    build(config, tmp_path / "store", num_topk=VOCAB_SIZE, bits=16, quiet=True)
    teacher = {"kind": "cached", "path": str(tmp_path / "store")}
    cached = run("cached", objective=TOPK, rollouts=DATASET, teacher=teacher)
    _same(cached, local, rel=1e-3)


def test_other_draws_than_a_store_has_are_refused_at_load(values, tmp_path, model_path):
    values |= {
        "teacher": {"kind": "local", "model_name_or_path": model_path},
        "objective": {**DRAWS, "num_draws": 3},
        "rollouts": DATASET,
    }
    build(parse_config(copy.deepcopy(values)), tmp_path / "store", draws=DrawsForm(), quiet=True)
    values["teacher"] = {"kind": "cached", "path": str(tmp_path / "store")}
    with pytest.raises(ConfigError, match=r"objective\.num_draws: must be 50, with .* got 3"):
        open_run(parse_config(values))
    values["objective"] = {**DRAWS, "proposal_temperature": 2.0}
    with pytest.raises(ConfigError, match=r"proposal_temperature: must be 1, with .* got 2"):
        open_run(parse_config(values))


@pytest.mark.parametrize("how", ["signal", "fault"])
def test_a_teacher_that_dies_costs_no_step(run, values, tmp_path, url, monkeypatch, how):
    teacher = {"kind": "server", "url": url, "hidden_dtype": "float32"}
    _, expected = run("whole", teacher=teacher)
    original, asked, closed = OpdClient._score_part, [], []
    signalled = threading.Event()

    def dies(*arguments):
        asked.append(1)
        if len(asked) < 9:
            return original(*arguments)
        if how == "fault":
            raise ServerFault("teacher http://x: /v1/hidden_states failed 8 times in a row")
        if len(asked) == 9:
            signalled.at = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        # as one that takes connections and says nothing
        signalled.wait(30)

    with monkeypatch.context() as patch:
        patch.setattr(OpdClient, "_score_part", dies)
        patch.setattr(ServerTeacher, "close", lambda self: closed.append(1))
        with pytest.raises(Interrupted if how == "signal" else ServerFault):
            run("cut", teacher=teacher)
    if how == "signal":
        assert time.monotonic() - signalled.at < 3
        signalled.set()
    # four requests a step: the third step's first was not answered, save_steps is far away
    assert closed == [1]
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    losses, weights = run("cut", teacher=teacher)
    assert len(losses) == 3 and torch.equal(weights, expected)


def test_a_teacher_that_dies_in_the_first_step_leaves_nothing(values, url, monkeypatch, capsys):
    def dies(*arguments):
        raise ServerFault("teacher http://x: /v1/hidden_states failed 8 times in a row")

    monkeypatch.setattr(OpdClient, "_score_part", dies)
    values["teacher"] = {"kind": "server", "url": url}
    with pytest.raises(ServerFault):
        train(parse_config(values))
    said = "".join(capsys.readouterr())
    assert "the run cannot go on; no step was done" in said and "is kept" not in said
    assert not list_checkpoints(values["output_dir"])


def test_a_teacher_that_dies_after_an_evaluation_keeps_what_it_changed(
    run, tmp_path, url, monkeypatch
):
    changes = {
        "teacher": {"kind": "server", "url": url, "hidden_dtype": "float32"},
        "rollouts": {"kind": "replay", "max_completion_length": 60},
        "evaluation": {"eval_steps": 1, "num_prompts": 2},
    }
    judge, observe, observed = opd.train._judge, ReplayRollouts.observe, []

    def rises(self, value):
        observed.append(value)
        # phi follows from the second one on
        observe(self, 1.0 + (self._reference_nll or 0.0))

    def dies(*arguments):
        if len(observed) == 3:
            raise ServerFault("teacher http://x: /v1/hidden_states failed 8 times in a row")
        return judge(*arguments)

    monkeypatch.setattr(ReplayRollouts, "observe", rises)
    _, expected = run("whole", **changes)
    observed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(opd.train, "_judge", dies)
        with pytest.raises(ServerFault):
            run("cut", **changes)
    _, weights = run("cut", **changes)
    phis = [
        [
            row["replay/phi"]
            for row in read_jsonl(tmp_path / name / "metrics.jsonl")
            if "loss" in row
        ]
        for name in ("whole", "cut")
    ]
    assert phis[0] == phis[1] and phis[0][1] < phis[0][2]
    # which requests the server scores together moves the last bits
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_an_evaluation_that_a_teacher_cut_off_is_made_on_the_rerun(run, tmp_path, url, monkeypatch):
    changes = {
        "teacher": {"kind": "server", "url": url, "hidden_dtype": "float32"},
        "rollouts": {"kind": "replay", "max_completion_length": 60},
        "evaluation": {
            "eval_steps": 1,
            "num_prompts": 2,
            "temperature": [1.0],
            "max_completion_length": 4,
        },
    }
    evaluate, evaluated = opd.train.evaluate, []

    def dies(*arguments, **keywords):
        evaluated.append(1)
        if len(evaluated) in (3, 5):
            raise ServerFault("teacher http://x: /v1/hidden_states failed 8 times in a row")
        return evaluate(*arguments, **keywords)

    run("whole", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(opd.train, "evaluate", dies)
        # of step 2, and of step 3, after which no step is left that could bring it
        for step in (2, 3):
            with pytest.raises(ServerFault):
                run("cut", **changes)
            kept = [path.name for path in list_checkpoints(tmp_path / "cut")]
            assert kept[-1] == f"checkpoint-{step}"
        run("cut", **changes)
        # made once: 0, 1, 2 in vain, 2, 3 in vain, 3
        run("cut", **changes)
    assert len(evaluated) == 6
    whole, cut = (
        [
            (row["step"], row.get("replay/phi", -1), row.get("eval/data_states/nll", -1))
            for row in read_jsonl(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert [row[0] for row in cut] == [0, 1, 1, 2, 2, 3, 3]
    for ours, theirs in zip(cut, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("transport", ["local", "hidden", "topk", "store", "draws"])
def test_a_student_that_is_the_teacher_has_no_loss(
    run, values, tmp_path, model_path, url, transport
):
    twin = {"model_name_or_path": model_path}
    rollouts = DATASET if transport in ("store", "draws") else values["rollouts"]
    changes = {"student": twin, "rollouts": rollouts, "learning_rate": 1e-12}
    if transport == "local":
        losses, _ = run("run", **changes)
    elif transport == "hidden":
        teacher = {"kind": "server", "url": url, "hidden_dtype": "float32"}
        losses, _ = run("run", teacher=teacher, **changes)
    elif transport == "topk":
        teacher = {"kind": "server", "url": url, "signal": "topk"}
        losses, _ = run("run", teacher=teacher, objective={**TOPK, "teacher_top_k": 6}, **changes)
    else:
        changes["objective"] = {**TOPK, "teacher_top_k": 8} if transport == "store" else DRAWS
        config = {**copy.deepcopy(values), **changes, "teacher": {"kind": "local", **twin}}
        path = tmp_path / "store"
        forms = {"num_topk": 8, "bits": 16} if transport == "store" else {"draws": DrawsForm()}
        build(parse_config(config), path, **forms, quiet=True)
        losses, _ = run("run", teacher={"kind": "cached", "path": str(path)}, **changes)
    assert max(abs(loss) for loss in losses) < 1e-6
