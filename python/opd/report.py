# SPDX-License-Identifier: Apache-2.0
"""Runs as one HTML file that needs no network: curves, before and after, completions, costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.checkpoint import newest_checkpoint
from opd.metrics import read_jsonl
from opd.plots import figures
from opd.schema import ConfigError, did_you_mean

_TEMPLATE = "report.html.j2"

# what the head of the report shows: name in metrics.jsonl, label, format
_HEADLINES = (
    ("eval/accuracy/t1", "accuracy at T = 1", "{:.1%}"),
    ("eval/accuracy/greedy", "greedy accuracy", "{:.1%}"),
    ("eval/student_states/reverse_kl", "reverse KL on the student's states, nats", "{:.4f}"),
    ("eval/data_states/forward_kl", "forward KL on the data's states, nats", "{:.4f}"),
    ("eval/data_states/bits_per_byte", "bits per byte of the data's completions", "{:.4f}"),
    (
        "eval/student_states/chunk_gap_abs",
        "gap to the teacher per chunk on the student's states, nats",
        "{:.4f}",
    ),
    ("loss", "training loss, nats", "{:.4f}"),
)
_LEDGER = (
    ("student_tokens_sampled", "tokens the student wrote", "{:,.0f}"),
    ("student_tokens_forward", "tokens the student read in training", "{:,.0f}"),
    ("student_tokens_trained", "of these, trained on", "{:,.0f}"),
    ("teacher_tokens_sampled", "tokens the teacher wrote", "{:,.0f}"),
    ("teacher_tokens_forward", "tokens the teacher judged", "{:,.0f}"),
    ("flops", "floating-point operations (2 or 6 per weight and token)", "{:.3g}"),
    ("cost_units", "the same, in tokens read by the student", "{:,.0f}"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run left in its directory. `steps` and `evaluations` are rows of metrics.jsonl."""

    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: str
    ledger: dict[str, Any]
    versions: dict[str, str]


def write_report(run_dirs: Sequence[Path], output: str | Path | None = None) -> Path:
    """Draw one or more runs. Returns the file's path.

    Args:
        run_dirs: output_dirs of runs, finished or not.
        output: default: report.html in the first.

    Raises:
        ConfigError: a directory holds no metrics.jsonl.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    runs = name_apart([load_run(Path(run)) for run in run_dirs], run_dirs)
    environment = Environment(
        loader=PackageLoader("opd", "."),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE).render(
        runs=runs,
        facts={run.name: facts(run) for run in runs},
        headlines={run.name: headlines(run) for run in runs},
        comparison=comparison(runs),
        figures=figures(runs),
        ledgers={run.name: _ledger_rows(run) for run in runs},
        samples={run.name: _sample_tables(run) for run in runs},
    )
    path = Path(output) if output else Path(run_dirs[0]) / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def load_run(path: Path) -> RunRecord:
    """Read a run's directory.

    Raises:
        ConfigError: it holds no metrics.jsonl.
    """
    rows = read_jsonl(path / "metrics.jsonl")
    if not rows:
        siblings = [str(other) for other in path.parent.glob("*") if other.is_dir()]
        hint = did_you_mean(path, siblings) if not path.exists() else ""
        raise ConfigError(f"{path}: has no metrics.jsonl of a run{hint}")
    newest = newest_checkpoint(path)
    state = json.loads((newest / "state.json").read_text(encoding="utf-8")) if newest else {}
    config = path / "config.yaml"
    return RunRecord(
        name=path.resolve().name,
        steps=[row for row in rows if "loss" in row],
        evaluations=[row for row in rows if any(name.startswith("eval/") for name in row)],
        samples=read_jsonl(path / "samples.jsonl"),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        ledger=state.get("ledger", {}),
        versions=state.get("versions", {}),
    )


def name_apart(runs: list[RunRecord], paths: Sequence[Path]) -> list[RunRecord]:
    """Runs of equal name take as much of their path as tells them apart."""
    from dataclasses import replace

    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=str(path)) for run, path in zip(runs, paths, strict=True)]


def facts(run: RunRecord) -> str:
    """What was done, in a line."""
    import yaml

    config = yaml.safe_load(run.config) or {}
    parts = [f"{run.steps[-1]['step'] if run.steps else 0} optimizer steps"]
    for section, key in (("rollouts", "lmbda"), ("objective", "divergence")):
        values = config.get(section) or {}
        if "kind" in values:
            more = f" ({key} {values[key]})" if key in values else ""
            parts.append(f"{section} {values['kind']}{more}")
    for model in ("student", "teacher"):
        source = (config.get(model) or {}).get("model_name_or_path")
        if source:
            parts.append(f"{model} {source}")
    return " · ".join(parts)


def headlines(run: RunRecord) -> list[dict[str, str]]:
    """The first and the last value of what matters most, as text."""
    found = []
    for name, label, form in _HEADLINES:
        rows = run.steps if name == "loss" else run.evaluations
        series = [row[name] for row in rows if name in row]
        if series:
            first, last = form.format(series[0]), form.format(series[-1])
            found.append({"label": label, "first": first, "last": last})
    return found


def comparison(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """First and last values, one row a run; None for a single run."""
    if len(runs) < 2:
        return None
    by_run = [{item["label"]: item for item in headlines(run)} for run in runs]
    labels = [label for _, label, _ in _HEADLINES if any(label in items for items in by_run)]
    rows = [
        {
            "name": run.name,
            "cells": [items.get(label) for label in labels],
            "num_tokens": f"{run.ledger.get('student_tokens_trained', 0):,}",
        }
        for run, items in zip(runs, by_run, strict=True)
    ]
    return {"labels": labels, "rows": rows}


def _ledger_rows(run: RunRecord) -> list[tuple[str, str]]:
    rows = [(label, form.format(run.ledger[k])) for k, label, form in _LEDGER if k in run.ledger]
    seconds = run.ledger.get("seconds", {})
    rows += [(f"seconds, {phase}", f"{value:,.1f}") for phase, value in seconds.items()]
    if seconds:
        rows.append(("seconds, all of training", f"{sum(seconds.values()):,.1f}"))
    return rows


def _sample_tables(run: RunRecord) -> list[dict[str, Any]]:
    """The completions of the last evaluation, then those of the first."""
    steps = sorted({sample["step"] for sample in run.samples})
    shown = list(dict.fromkeys([*steps[-1:], *steps[:1]]))
    return [
        {"step": step, "rows": [sample for sample in run.samples if sample["step"] == step]}
        for step in shown
    ]
