# SPDX-License-Identifier: Apache-2.0
"""The demo's parts: arms that cost the same, jobs that wait, resume and fail, words that follow the
numbers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from opd.config import load_config

FOLDER = Path(__file__).parents[2] / "examples" / "first_light"
sys.path.insert(0, str(FOLDER))

import demo  # noqa: E402
import jobs  # noqa: E402
import paragraph  # noqa: E402
import records  # noqa: E402
import run_arm  # noqa: E402
import summary  # noqa: E402

ARMS = sorted(path.stem for path in (FOLDER / "arms").glob("*.yaml"))


@pytest.mark.parametrize("arm", ARMS)
def test_arm_is_a_valid_configuration_that_runs_under_its_own_name(arm):
    config = load_config(FOLDER / "arms" / f"{arm}.yaml")
    assert config.output_dir == f"runs/first_light/{arm}"
    assert arm in summary.LABELS and arm in summary.STYLES


def test_every_arm_of_the_demo_has_a_file():
    assert {*demo.DEMO_ARMS, *demo.FULL_ARMS, run_arm.WARM} == set(ARMS)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("warm_sft", "more_sft")])
def test_arms_differ_from_more_sft_in_who_writes_the_loss_and_the_steps_only(arm):
    one, other = (load_config(FOLDER / "arms" / f"{name}.yaml") for name in ("more_sft", arm))
    apart = {"output_dir", "teacher", "rollouts", "objective", "max_steps", "evaluation"}
    if other.rollouts.kind == "hf":
        # the rate that suits SFT is too hot on-policy; the README has the numbers
        apart.add("learning_rate")
        assert other.learning_rate < one.learning_rate
    assert one.model_dump(exclude=apart) == other.model_dump(exclude=apart)


@pytest.mark.parametrize("arm", demo.DEMO_ARMS)
def test_arms_of_the_demo_cost_the_student_the_same(arm):
    config = load_config(FOLDER / "arms" / f"{arm}.yaml")
    cost_per_token = 4 if config.rollouts.kind == "hf" else 3
    assert cost_per_token * config.max_steps == 600


def test_student_cost_counts_a_sampled_token_once_more():
    assert summary.student_cost({"student_tokens_forward": 10, "student_tokens_sampled": 0}) == 30
    assert summary.student_cost({"student_tokens_forward": 10, "student_tokens_sampled": 8}) == 40


def test_jobs_start_with_the_teacher_then_the_warm_student_then_slow_arms(tmp_path):
    planned = demo.plan_jobs(tmp_path, ("more_sft", "on_policy_jsd"), (0, 1))
    assert [(job.seed, job.arm, job.needs) for job in planned] == [
        (0, "teacher", None),
        (1, "teacher", None),
        (0, "warm_sft", "teacher"),
        (1, "warm_sft", "teacher"),
        (0, "on_policy_jsd", "warm_sft"),
        (0, "more_sft", "warm_sft"),
        (1, "on_policy_jsd", "warm_sft"),
        (1, "more_sft", "warm_sft"),
    ]


def _fake_worker(path: Path, body: str) -> Path:
    path.write_text(f"import sys, time, pathlib\narm, *_ = sys.argv[1:]\n{body}\n")
    return path


def test_jobs_run_in_the_order_of_their_needs(tmp_path, monkeypatch):
    log = tmp_path / "order"
    body = f"with open({str(log)!r}, 'a') as file: file.write(arm + '\\n')"
    monkeypatch.setattr(demo, "WORKER", _fake_worker(tmp_path / "worker.py", body))
    planned = demo.plan_jobs(tmp_path, ("more_sft", "on_policy_jsd"), (0,))
    demo.run_jobs(planned, 2, Console(file=io.StringIO()))
    order = log.read_text().split()
    assert order[:2] == ["teacher", "warm_sft"]
    assert sorted(order[2:]) == ["more_sft", "on_policy_jsd"]


def test_a_failing_job_ends_the_demo_with_the_end_of_its_log(tmp_path, monkeypatch):
    worker = _fake_worker(tmp_path / "worker.py", "sys.exit('no teacher here')")
    monkeypatch.setattr(demo, "WORKER", worker)
    planned = demo.plan_jobs(tmp_path, ("more_sft",), (0,))
    with pytest.raises(jobs.JobFailed, match=r"seed 0 teacher failed(.|\n)*no teacher here"):
        demo.run_jobs(planned, 2, Console(file=io.StringIO()))


def test_a_finished_job_is_not_run_again_and_a_stale_one_is(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WORKER", _fake_worker(tmp_path / "worker.py", "sys.exit(1)"))
    job = demo.Job(3, "teacher", tmp_path, None)
    path = run_arm.result_path(tmp_path, "teacher")
    path.parent.mkdir()
    path.write_text(json.dumps({"key": run_arm.job_key(tmp_path, "teacher", 3)}))
    demo.run_jobs([job], 1, Console(file=io.StringIO()))
    assert job.is_done and job.process is None
    assert not demo.Job(4, "teacher", tmp_path, None).is_finished_before()


def test_job_key_follows_the_settings_the_seed_and_the_input_files(tmp_path):
    (tmp_path / run_arm.TRACES).write_text("one")
    first = run_arm.job_key(tmp_path, "warm_sft", 0)
    assert first == run_arm.job_key(tmp_path, "warm_sft", 0)
    assert first != run_arm.job_key(tmp_path, "warm_sft", 1)
    assert first != run_arm.job_key(tmp_path, "more_sft", 0)
    (tmp_path / run_arm.TRACES).write_text("two")
    assert first != run_arm.job_key(tmp_path, "warm_sft", 0)


def test_what_was_begun_with_other_inputs_is_stale(tmp_path):
    (tmp_path / run_arm.TRACES).write_text("one")
    assert not run_arm.is_stale(tmp_path, "warm_sft", 0)
    run_arm.arm_dir(tmp_path, "warm_sft").mkdir()
    key = records.key_path(tmp_path, "warm_sft")
    key.write_text(run_arm.job_key(tmp_path, "warm_sft", 0))
    assert not run_arm.is_stale(tmp_path, "warm_sft", 0)
    (tmp_path / run_arm.TRACES).write_text("two")
    assert run_arm.is_stale(tmp_path, "warm_sft", 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_kill_ends_the_demo_with_one_line_that_says_how_to_go_on(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, FOLDER / "demo.py", "--root", tmp_path, "--seeds", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "seed0" / "teacher.log").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("stopped; to go on:") and f"--root {tmp_path} --seeds 0" in last
    assert "Traceback" not in output


def _made_up(accuracy: float, **changes: float) -> dict[str, float]:
    flat = {"student_cost": 0.85, "total_cost": 1.0, "train_s": 1.0, "slip": 0.01}
    for n in summary.LENGTHS:
        flat |= {f"accuracy/{n}": accuracy, f"greedy_accuracy/{n}": 1.0}
    flat |= dict.fromkeys(("repair_rate", "repairs_per_sequence"), 0.01)
    flat |= {
        f"{who}_states/{d}_kl": 0.02
        for who in ("teacher", "student")
        for d in ("forward", "reverse")
    }
    return flat | {"dagger_ratio": 1.0} | changes


def _results(on: float, off: float, sft: float, num_seeds: int = 2) -> summary.Results:
    shares = {"warm_sft": 0.7, "more_sft": sft, "off_policy_reverse_kl": off}
    shares |= {"on_policy_reverse_kl": on, "teacher": 0.95}
    results = {arm: [_made_up(share)] * num_seeds for arm, share in shares.items()}
    results["teacher"] = [_made_up(0.95, repair_rate=0.95)] * num_seeds
    return results


def test_words_give_the_gap_to_more_sft_in_points():
    words = paragraph.write(_results(on=0.96, off=0.96, sft=0.88), 2)
    assert "from 70.0% to 96.0%" in words and "more SFT takes it to 88.0%: +8.0 points" in words
    assert "+8.0 points (2 seeds: +8.0, +8.0;" in words


def test_words_do_not_hide_an_arm_that_loses():
    assert "-3.0 points" in paragraph.write(_results(on=0.85, off=0.9, sft=0.88), 2)


@pytest.mark.parametrize(
    ("off", "said"),
    [
        (0.962, "no difference that these samples can show"),
        (0.90, "10.0 points less: 50% of the gain over SFT comes from the loss"),
        (0.999, "3.9 points more"),
    ],
)
def test_words_say_whether_writing_the_text_itself_paid(off, said):
    on = 1.0 if off == 0.90 else 0.96
    assert said in paragraph.write(_results(on=on, off=off, sft=0.80), 2)


def test_words_admit_that_no_student_learned_to_repair_and_say_so_when_one_did():
    results = _results(on=0.96, off=0.96, sft=0.88)
    assert "No student learned to repair" in paragraph.write(results, 2)
    results["on_policy_reverse_kl"] = [_made_up(0.96, repair_rate=0.6)] * 2
    words = paragraph.write(results, 2)
    assert "No student learned" not in words and "with probability 0.600" in words


def test_words_say_so_when_sharpening_settled_on_a_wrong_entry():
    results = _results(on=0.96, off=0.96, sft=0.88)
    lost = {"greedy_accuracy/16": 0.9}
    results["on_policy_reverse_kl"] = [_made_up(0.96), _made_up(0.96, **lost)]
    words = paragraph.write(results, 2)
    assert "from 95.0% (on_policy_reverse_kl) upwards" in words
    assert "the worst seed has 90.0%" in words


def test_words_name_the_price_in_coverage_if_there_is_one():
    results = _results(on=0.96, off=0.96, sft=0.88)
    assert "coverage" not in paragraph.write(results, 2)
    wide = {"teacher_states/forward_kl": 0.08}
    results["on_policy_reverse_kl"] = [_made_up(0.96, **wide)] * 2
    assert "KL(teacher || student) on the teacher's states is 0.0800" in paragraph.write(results, 2)


def test_tables_have_every_arm_and_length_aligned():
    accuracy, greedy, gauges = summary.tables(_results(on=0.96, off=0.96, sft=0.88))
    lines = accuracy.splitlines()[1:]
    assert lines[0].split() == [str(n) for n in range(1, 17)]
    assert len({len(line) for line in lines}) == 1
    assert lines[4].startswith("on-policy reverse KL") and lines[4].split()[-1] == "96"
    assert len(greedy.splitlines()) == 7
    assert "96.0% ±0.0" in gauges


def test_picture_is_drawn(tmp_path):
    summary.draw(_results(on=0.96, off=0.96, sft=0.88), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_stamp_names_the_commits_and_the_versions():
    stamp = records.stamp({"more_sft": [{"commit": "b"}, {"commit": "a+"}, {"commit": "b"}]})
    assert stamp["commits"] == ["a+", "b"]
    assert {"python", "torch", "transformers", "opd_kernels"} <= set(stamp["versions"])
    assert stamp["machine"]["num_cpus"] == os.cpu_count()
