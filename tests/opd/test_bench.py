# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from opd import bench
from opd.cli import main
from opd.schema import ConfigError

ROOT = Path(__file__).parents[2]


def test_commands_of_each_suite():
    (run, page) = bench.commands(ROOT, "cpu", [], report=False)
    assert run[:4] == [sys.executable, "-m", "pytest", "benchmarks"]
    assert "not slow" in run and run[-1].startswith("--benchmark-json=")
    assert page[1:3] == ["-m", "benchmarks.report"] and page[3].endswith("bench.json")
    (run,) = bench.commands(ROOT, "gpu", ["ours", "--budget", "60"], report=False)
    assert run == [str(ROOT / "benchmarks" / "gpu.sh"), "ours", "--budget", "60"]
    assert Path(run[0]).stat().st_mode & 0o111
    assert bench.commands(ROOT, "gpu", [], report=True)[1] == page[:3]
    assert bench.commands(ROOT, None, [], report=True) == [page[:3]]


def test_nothing_to_do_and_no_checkout_are_said_in_words(tmp_path, capsys):
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.strip() == "bench: expected cpu, gpu or --report"
    with pytest.raises(ConfigError, match="needs a source checkout"):
        bench.source_root(tmp_path / "lib" / "opd" / "bench.py")


def test_a_missed_goal_still_writes_the_page_and_an_error_does_not(monkeypatch):
    codes, ran = [1, 0], []

    def run(command, **options):
        ran.append(command)
        assert options["cwd"] == ROOT and str(ROOT) in options["env"]["PYTHONPATH"]
        return subprocess.CompletedProcess(command, codes[len(ran) - 1])

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert main(["bench", "cpu"]) == 1
    assert len(ran) == 2
    codes[:], ran[:] = [2, 0], []
    assert main(["bench", "cpu", "--", "-k", "x"]) == 2
    assert len(ran) == 1 and ran[0][-3:-1] == ["-k", "x"]
