# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest

from opd.cli import recipe_header
from opd.config import RECIPES, load_config
from opd.metrics import read_jsonl
from opd.train import train

RECIPE_PATHS = sorted(RECIPES.glob("*.yaml"))
SMALL = [
    "max_steps=2",
    "logging_steps=1",
    "per_device_train_batch_size=4",
    "evaluation.num_prompts=2",
    "evaluation.eval_steps=1",
    "report_to=[jsonl]",
]


@pytest.mark.parametrize("path", RECIPE_PATHS, ids=lambda path: path.stem)
def test_recipe_trains_two_steps_out_of_the_box(path, tmp_path):
    config = load_config(path.stem, [*SMALL, f"output_dir={tmp_path / 'run'}"])
    result = train(config, quiet=True)
    losses = [
        row["loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row
    ]
    assert len(losses) == 2
    assert all(loss == loss for loss in losses)
    assert "eval/accuracy/t1/n16" in result.metrics


@pytest.mark.parametrize("path", RECIPE_PATHS, ids=lambda path: path.stem)
def test_recipe_says_what_it_does_and_from_where(path):
    what, source, *_ = recipe_header(path)
    assert what.endswith(".")
    assert re.search(r"arXiv:\d{4}\.\d{5}|Thinking Machines", source)


@pytest.mark.parametrize("path", RECIPE_PATHS, ids=lambda path: path.stem)
def test_recipe_is_one_override_away_from_other_models_and_data(path, tmp_path, hf_model):
    """The lines in its header: two models, no task, a file of rows."""
    from opd.tasks import TASKS

    task = TASKS["chain_repair"]()
    rows = task.expert_rows(6, seed=3, lengths=[1])
    import json

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    hf_model(hidden_size=16).save_pretrained(tmp_path / "student")
    task.load_tokenizer().save_pretrained(tmp_path / "student")
    hf_model(hidden_size=32).save_pretrained(tmp_path / "teacher")
    config = load_config(
        path.stem,
        [
            *SMALL,
            f"output_dir={tmp_path / 'run'}",
            f"student.model_name_or_path={tmp_path / 'student'}",
            f"teacher.model_name_or_path={tmp_path / 'teacher'}",
            "task=null",
            f"data.train_file={tmp_path / 'rows.jsonl'}",
            f"data.eval_file={tmp_path / 'rows.jsonl'}",
        ],
    )
    assert train(config, quiet=True).step == 2
