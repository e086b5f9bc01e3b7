# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.batch import Signal
from opd.metrics import (
    Clock,
    Meter,
    MetricsWriter,
    last_evaluation,
    memory_metrics,
    read_jsonl,
    truncate_jsonl,
)


def test_statistics_are_means_over_tokens_and_losses_sums_over_batches():
    signals = [
        Signal(loss=torch.tensor(0.25), statistics={"kl": torch.tensor([1.0, 2.0, 3.0])}),
        Signal(loss=torch.tensor(0.5), statistics={"kl": torch.tensor([10.0])}),
    ]
    meter = Meter()
    meter.add_signals(signals)
    assert meter.flush() == {"loss": 0.75, "kl": 4.0}
    assert meter.flush() == {}


def test_steps_between_two_lines_are_averaged():
    meter = Meter()
    for value in (1.0, 2.0):
        meter.add({"grad_norm": value})
    assert meter.flush() == {"grad_norm": 1.5}


def test_completion_metrics(trajectories):
    meter = Meter()
    cut = replace(trajectories[0], is_terminated=False, origin="data")
    meter.add_trajectories([cut, *trajectories[1:]], step=0)
    found = meter.flush()
    assert found["completions/mean_length"] == pytest.approx(19 / 5)
    assert found["completions/clipped_ratio"] == 0.2
    assert found["completions/on_policy_ratio"] == 0.8
    assert (found["completions/min_length"], found["completions/max_length"]) == (1, 6)


def test_of_completions_by_two_models_the_students_tokens_are_on_policy(trajectories):
    # tokens of the prompt are nobody's
    mixed = [
        replace(t, origin="mixed", token_origin=torch.full_like(t.ids, 2, dtype=torch.uint8))
        for t in trajectories[:2]
    ]
    for t in mixed:
        t.token_origin[: t.prompt_length] = 0
    mixed[0].token_origin[-1] = 1
    meter = Meter()
    meter.add_trajectories([*mixed, replace(trajectories[2], step=-1)], step=0)
    share = 1 / mixed[0].completion_length
    assert meter.flush()["completions/on_policy_ratio"] == pytest.approx(share / 3)


def test_clock_adds_up_by_phase():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock("rollout"):
            pass
    assert set(clock.flush()) == {"rollout"}
    assert clock.flush() == {}


def test_writing_after_a_resume_takes_back_later_lines(tmp_path):
    writer = MetricsWriter(tmp_path, ["jsonl"])
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    writer = MetricsWriter(tmp_path, ["jsonl"], step=2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_starting_at_step_0_starts_the_file_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/x": 1}\n')
    truncate_jsonl(tmp_path / "metrics.jsonl", 0)
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, ["tensorboard"])
    writer.write(7, {"loss": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 0.5)]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_last_evaluation_is_the_latest(tmp_path):
    assert last_evaluation(tmp_path) == {}
    writer = MetricsWriter(tmp_path, ["jsonl"])
    for step, value in ((0, 0.1), (5, 0.6)):
        writer.write(step, {"eval/accuracy/t1": value})
    writer.write(6, {"loss": 1.0})
    writer.close()
    assert last_evaluation(tmp_path) == {"eval/accuracy/t1": 0.6}


def test_memory_is_in_bytes():
    peak = memory_metrics(torch.device("cpu"))["mem/peak_rss_bytes"]
    assert 2**26 < peak < 2**40
