# SPDX-License-Identifier: Apache-2.0
"""A kernel that takes its process with it, or never ends, costs a GPU run that one case alone."""

from __future__ import annotations

import time

import pytest

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import part_tests
from benchmarks.gpu import results as schema
from benchmarks.gpu.context import ROOT, Context, is_lost

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def part_of_cases(tmp_path, monkeypatch, bad: str) -> dict:
    """The part `ours` of a run, three cases long, whose second does `bad`."""
    package = tmp_path / "late"
    package.mkdir()
    (package / "sitecustomize.py").write_text(
        "import os, sys, time, types\n"
        "from benchmarks.gpu.results import Check\n"
        "def run(context):\n"
        "    for name in ('one', 'two', 'three'):\n"
        "        if context.has_time(name):\n"
        "            with context.attempt(name):\n"
        f"                if name == 'two': {bad}\n"
        "                context.row(Check(name, 'passed'))\n"
        "sys.modules['benchmarks.gpu.part_ours'] = types.SimpleNamespace(run=run)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{package}:{ROOT}:{ROOT / 'python'}")
    run = driver.Run(driver.parse(["--dry-run", "--out", str(tmp_path), "ours"]))
    # nobody is silent in a dry run, whose machine may be busy
    run.options.dry_run = False
    run.part("ours", 60.0)
    return schema.load(run.path)["parts"]["ours"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("os._exit(7)", "exit code 7"),
        (f"raise RuntimeError({ILLEGAL!r})", "exit code 1"),
        ("time.sleep(60)", "no sign of life for 3 s"),
    ],
)
def test_the_part_goes_on_behind_a_case_that_ends_its_process(tmp_path, monkeypatch, bad, reason):
    monkeypatch.setattr(driver, "SILENCE_S", 3.0)
    part = part_of_cases(tmp_path, monkeypatch, bad)
    assert [(row["name"], row["outcome"]) for row in part["rows"]] == [
        ("one", "passed"),
        ("two", "error"),
        ("three", "passed"),
    ]
    assert part["status"] == "failed" and part["reason"].startswith(reason)
    assert part["rows"][1]["detail"] == part["reason"]


def test_tests_go_on_behind_one_that_ends_its_process(tmp_path, monkeypatch):
    (tmp_path / "test_cases.py").write_text(
        "import os, time, pytest\n"
        "pytestmark = pytest.mark.cuda\n"
        "@pytest.mark.parametrize('backend', ['triton', 'cuda'])\n"
        "def test_backend(backend): pass\n"
        "def test_dies(): os._exit(3)\n"
        f"def test_loses_the_device(): raise RuntimeError({ILLEGAL!r})\n"
        "def test_waits(): time.sleep(60)\n"
        "def test_fails(): assert 1 == 2\n"
    )
    monkeypatch.setattr(part_tests, "FOLDER", str(tmp_path))
    monkeypatch.setattr(part_tests, "SILENCE_S", 8.0)
    rows: list[dict] = []
    with pytest.raises(RuntimeError, match="4 of 6 GPU tests failed"):
        part_tests.run(Context(True, rows.append, time.monotonic() + 60))
    found = {row["name"].removeprefix("test_cases.py::test_"): row for row in rows}
    assert [(name, row["outcome"]) for name, row in found.items()] == [
        ("backend[cuda]", "passed"),
        ("dies", "failed"),
        ("loses_the_device", "failed"),
        ("waits", "failed"),
        ("fails", "failed"),
        ("backend[triton]", "passed"),
    ]
    assert "exit code 3" in found["dies"]["detail"]
    assert "illegal memory access" in found["loses_the_device"]["detail"]
    assert "said nothing for 8 s" in found["waits"]["detail"]


def test_a_launch_that_is_refused_leaves_the_device():
    assert is_lost(ILLEGAL) and is_lost("Triton Error [CUDA]: misaligned address")
    assert not is_lost("CUDA error: invalid configuration argument")
