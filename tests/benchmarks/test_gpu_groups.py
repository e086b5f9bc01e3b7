# SPDX-License-Identifier: Apache-2.0
"""The GPU tests dealt to processes that may die: every test once, and a verdict on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import part_tests, pytest_group
from benchmarks.gpu.context import DEVICE_LOST, ROOT, Context

NAMES = [f"test_{i}[{backend}]" for i in range(7) for backend in ("cuda", "triton")]
TRITON = ["triton" in name for name in NAMES]
# stands in for pytest: says what it begins, and dies of some
PROGRAM = """
import json, os, signal, sys, time
done = json.loads(os.environ["OPD_GPU_TESTS"])["done"]
for name in ("passes", "loses", "crashes", "hangs", "last"):
    if name in done:
        continue
    print(f"begun: {name}", flush=True)
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        time.sleep(100)
    outcome = "failed" if name == "loses" else "passed"
    print(f"outcome: {outcome}\\t{name}\\tits words", flush=True)
    if name == "loses":
        os._exit(75)
"""
TESTS = """
import pytest

def test_first():
    pass

@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_of_a_backend(backend):
    pass

def test_that_loses_the_device_beyond_32_bit():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_last():
    pass
"""


def follow(context: Context, tmp_path: Path) -> tuple[part_tests.Follower, str]:
    follower = part_tests.Follower(context, part_tests.Group(-1, 0), tmp_path / "lock")
    return follower, follower.run()


def test_every_test_is_in_one_group():
    for dry_run in (True, False):
        total = [0] * len(NAMES)
        for group in part_tests.groups(dry_run):
            mine = pytest_group.chosen(NAMES, TRITON, {**group._asdict(), "done": []})
            total = [count + is_mine for count, is_mine in zip(total, mine, strict=True)]
            if group.index < 0 and group.of:
                assert mine == [not is_triton for is_triton in TRITON]
        assert total == [1] * len(NAMES)
    rest = pytest_group.chosen(NAMES, TRITON, {"index": -1, "of": 0, "done": NAMES[1:]})
    assert rest == [True] + [False] * (len(NAMES) - 1)


def test_a_process_that_dies_costs_its_test(tmp_path, monkeypatch):
    rows: list[dict] = []
    context = Context(True, rows.append, time.monotonic() + 60)
    monkeypatch.setattr(part_tests, "command_of", lambda _: [sys.executable, "-c", PROGRAM])
    monkeypatch.setattr(part_tests, "SILENT_S", 1.5)
    follower, words = follow(context, tmp_path)
    assert words == "" and not context.groups
    assert [(row["name"], row["outcome"], row["detail"]) for row in rows] == [
        ("passes", "passed", "its words"),
        ("loses", "failed", "its words"),
        ("crashes", "failed", "exit code -11: it took its process down"),
        ("hangs", "failed", "no word for 2 s: it took its process down"),
        ("last", "passed", "its words"),
    ]
    assert follower.counts == {"passed": 2, "failed": 3}


def test_a_process_that_never_begins_is_not_started_for_ever(tmp_path, monkeypatch):
    context = Context(True, [].append, time.monotonic() + 60)
    for code in (DEVICE_LOST, 4):
        command = [sys.executable, "-c", f"raise SystemExit({code})"]
        monkeypatch.setattr(part_tests, "command_of", lambda _, command=command: command)
        assert follow(context, tmp_path)[1] == f"pytest, C++: exit code {code}"


def test_the_plugin_ends_a_process_whose_device_is_lost(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    told = {"index": -1, "of": 3, "done": ["test_some.py::test_first"]}
    lock = tmp_path / "lock"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path), *part_tests._FORMAT],
        cwd=ROOT,
        env={
            **os.environ,
            pytest_group.VARIABLE: json.dumps({**told, "lock": str(lock)}),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == DEVICE_LOST, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("begun", "outcome"))]
    assert lines[0] == "begun: test_some.py::test_of_a_backend[cuda]"
    assert lines[1].startswith("outcome: passed\ttest_some.py::test_of_a_backend[cuda]")
    assert lines[2] == "begun: test_some.py::test_that_loses_the_device_beyond_32_bit"
    assert lines[3].startswith("outcome: failed") and len(lines) == 4
    assert lock.exists()


def test_what_is_large_waits_for_what_is_large(tmp_path, capsys):
    path = tmp_path / "lock"
    script = "import sys; from benchmarks.gpu.pytest_group import alone; from pathlib import Path\n"
    script += f"with alone(Path({str(path)!r})): print('mine', flush=True)"
    with pytest_group.alone(path):
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "\n"
        assert process.stdout.readline() == f"{pytest_group.WAITING}\n"
    rest, _ = process.communicate(timeout=30)
    assert rest.split()[-1] == "mine" and process.returncode == 0
