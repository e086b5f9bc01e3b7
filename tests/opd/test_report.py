# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re

import pytest

from opd.config import parse_config
from opd.report import comparison, facts, headlines, load_run, write_report
from opd.schema import ConfigError
from opd.train import train

EVALUATION = {"eval_steps": 2, "num_prompts": 4, "lengths": [1, 2], "num_samples": 2}


@pytest.fixture
def run_dir(values):
    evaluated = {**values, "evaluation": EVALUATION, "report_to": ["jsonl", "html"]}
    return train(parse_config(evaluated), quiet=True).output_dir


def test_a_run_writes_its_report_which_needs_no_network(run_dir):
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") >= 8
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "https://" not in page.replace("http://www.w3.org", "")
    for title in ("Accuracy by length", "Time by phase", "Resolved configuration", "Versions"):
        assert title in page
    assert "learning_rate: 0.01" in page
    assert page.count('class="right"') + page.count('class="wrong"') == 8


def test_two_runs_are_drawn_side_by_side(run_dir, values, tmp_path):
    other = train(parse_config({**values, "output_dir": str(tmp_path / "b")}), quiet=True)
    page = write_report([run_dir, other.output_dir], tmp_path / "both.html").read_text()
    assert "tokens trained on" in page
    table = comparison([load_run(run_dir), load_run(other.output_dir)])
    assert [row["name"] for row in table["rows"]] == ["run", "b"]
    assert comparison([load_run(run_dir)]) is None


def test_a_run_that_is_under_way_can_be_drawn(tmp_path):
    rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 3, "lo')
    assert write_report([tmp_path]).is_file()


def test_what_models_write_is_escaped(run_dir):
    sample = {"step": 4, "sampling": "t1", "prompt": "<script>", "completion": "<b>", "answer": "&"}
    (run_dir / "samples.jsonl").write_text(json.dumps({**sample, "is_correct": None}) + "\n")
    page = write_report([run_dir]).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_headlines_go_from_first_to_last(run_dir):
    run = load_run(run_dir)
    labels = {item["label"]: item for item in headlines(run)}
    loss = labels["training loss, nats"]
    assert loss["first"] == f"{run.steps[0]['loss']:.4f}"
    assert loss["last"] == f"{run.steps[-1]['loss']:.4f}"
    assert "objective full_vocab (divergence reverse_kl)" in facts(run)


def test_runs_of_the_same_name_are_told_apart(run_dir, tmp_path):
    import shutil

    copy = tmp_path / "elsewhere" / "run"
    shutil.copytree(run_dir, copy)
    page = write_report([run_dir, copy], tmp_path / "both.html").read_text()
    assert str(copy) in page


def test_a_directory_without_metrics_is_refused(tmp_path):
    (tmp_path / "runa").mkdir()
    with pytest.raises(ConfigError, match=r"has no metrics.jsonl of a run, did you mean .*runa"):
        write_report([tmp_path / "runb"])
