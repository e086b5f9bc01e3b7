# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opd import profile
from opd.cli import main
from opd.schema import ConfigError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
SCRIPT = """
import sys, torch
import opd_kernels as opk
hidden, head = torch.randn(8, 16, requires_grad=True), torch.randn(65, 16, requires_grad=True)
for _ in range(3):
    opk.fused_linear_divergence(hidden, head, hidden.detach(), head.detach()).loss.backward()
print("ran", sys.argv[1:], __name__)
if sys.argv[1:] == ["bad"]:
    raise ValueError("no good")
sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
"""
# two kernels in one range, a range within it, and one that is not ours; a domain before the name
CSV = """
Processing [profile.sqlite] with [nvtx_kern_sum.py]...

NVTX Range,Style,PID,TID,NVTX Inst,Kern Inst,Total Time (ns),Avg (ns),Med (ns),Min (ns),Max (ns),\
StdDev (ns),Kernel Name
:opd::fused_linear_divergence::student_logits,PushPop,10,10,8,8,8000000,1e6,1e6,9e5,2e6,1.0,gemm
:opd::fused_linear_divergence::rows,PushPop,10,10,8,8,2000000,2e5,2e5,9e4,3e5,1.0,"rows<float, 1>"
:opd::fused_linear_divergence::rows,PushPop,10,10,2,4,1000000,2e5,2e5,9e4,3e5,1.0,fill
:opd::train::student,PushPop,10,10,1,20,11000000,1e6,1e6,9e5,2e6,1.0,gemm
:ncclAllReduce,PushPop,10,10,1,1,500,500,500,500,500,0.0,nccl
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    path = tmp_path / "program.py"
    path.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    return path


def fake_nsys(directory: Path, *, report: bool = True) -> None:
    """An nsys that runs the command, writes a report and prints recorded statistics."""
    path = directory / "bin" / "nsys"
    path.parent.mkdir()
    (directory / "stats.csv").write_text(CSV)
    program = directory / "nsys.py"
    # a first line with the interpreter's path would not survive a space in it
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{program}' \"$@\"\n")
    program.write_text(
        f"""
import pathlib, subprocess, sys
words = sys.argv[1:]
if words[0] == "stats":
    print(pathlib.Path({str(directory / "stats.csv")!r}).read_text())
    sys.exit(0)
options = [word for word in words if word.startswith("--")]
command = [word for word in words[1:] if not word.startswith("--") or "=" not in word]
output = next(word.split("=", 1)[1] for word in options if word.startswith("--output="))
code = subprocess.run(command).returncode
if {report}:
    pathlib.Path(output).write_text("report")
sys.exit(code)
"""
    )
    path.chmod(0o755)


# -- with torch ----------------------------------------------------------------------------------


def test_a_script_shows_its_ranges_and_leaves_a_trace(script, capsys):
    assert main(["profile", "--", "python", str(script)]) == 0
    captured = capsys.readouterr()
    for phase in ("student_logits", "teacher_logits", "rows", "grad_hidden", "grad_weight"):
        assert f"opd::fused_linear_divergence::{phase}" in captured.out
    assert "ran [] __main__" in captured.out
    assert "no GPU: the times are of the CPU" in captured.err
    trace = json.loads(Path("profile.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("opd::fused_linear_divergence::rows") == 3
    assert sorted(path.name for path in Path().iterdir()) == ["profile.json", "program.py"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["program.py", "7"], 7),
        (["./program.py", "0"], 0),
        (["python3", "program.py", "bad"], 1),
        (["python", "-m", "program", "3"], 3),
        (["python", "-c", "import torch, sys; sys.exit('so it ends')"], 1),
    ],
)
def test_the_exit_code_of_the_command_is_passed_on(script, capsys, words, code):
    assert main(["profile", "--output", "new/trace.json", "--", *words]) == code
    captured = capsys.readouterr()
    assert Path("new/trace.json").is_file()
    if "bad" in words:
        assert "ValueError: no good" in captured.err
    if "-c" in words:
        assert "so it ends" in captured.err and "no opd:: range ran" in captured.err


def test_training_shows_its_phases(values, tmp_path, monkeypatch, capsys):
    import yaml

    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(yaml.safe_dump({**values, "max_steps": 1}))
    words = ["opd", "train", "--config", "x.yaml", "--quiet"]
    assert main(["profile", "--with", "torch", "--", *words]) == 0
    out = capsys.readouterr().out
    for name in ("opd::train::rollout", "opd::train::student", "opd::fused_linear_divergence"):
        assert name in out


def test_ranges_of_a_device_count_its_time():
    class Event:
        def __init__(self, key, count, cpu, device):
            self.key, self.count, self.cpu_time_total, self.device_time_total = (
                key,
                count,
                cpu,
                device,
            )

    events = [
        Event("opd::a::rows", 3, 9000.0, 0.0),
        Event("opd::a::rows", 3, 0.0, 6000.0),
        Event("opd::a::logits", 3, 10.0, 7000.0),
        Event("aten::mm", 3, 1.0, 1e9),
    ]
    rows = profile.rows_of_averages(events)
    assert [(row.name, row.total_ms) for row in rows] == [
        ("opd::a::logits", 7.0),
        ("opd::a::rows", 6.0),
    ]
    assert rows[1].cells() == ["opd::a::rows", "3", "", "6.000", "2.0000"]


def test_a_range_is_free_without_a_profiler():
    from opd.metrics import Clock
    from opd_kernels._linear import phase

    clock, tensor = Clock(torch.device("cpu")), torch.ones(1)
    with phase(tensor, "x", "y") as entered:
        assert entered is None
    with torch.profiler.profile() as profiler:
        with phase(tensor, "x", "y"):
            pass
        with clock("student"):
            pass
    names = [event.key for event in profiler.key_averages()]
    assert names == ["opd::x::y", "opd::train::student"]
    assert list(clock.flush()) == ["student"]


# -- with nsys -----------------------------------------------------------------------------------


def test_statistics_of_nsys_are_summed_by_range():
    rows = profile.rows_of_csv(CSV)
    assert [(row.name.rpartition("::")[2], *row[1:]) for row in rows] == [
        ("student", 1, 20, 11.0),
        ("student_logits", 8, 8, 8.0),
        ("rows", 8, 12, 3.0),
    ]
    assert profile.rows_of_csv("no data") == []


def test_nsys_is_given_a_capture_range_for_python_programs():
    report = Path("r.nsys-rep")
    line = profile.nsys_command(["opd", "recipes"], report, has_gpu=True)
    assert "--capture-range=cudaProfilerApi" in line and "--trace=cuda,nvtx,cublas" in line
    assert line[-5:] == [sys.executable, "-m", "opd.profile", "opd", "recipes"]
    line = profile.nsys_command(["torchrun", "x.py"], report, has_gpu=True)
    assert "--capture-range=cudaProfilerApi" not in line and line[-2:] == ["torchrun", "x.py"]
    assert not any(
        "capture" in word for word in profile.nsys_command(["opd"], report, has_gpu=False)
    )


@pytest.mark.parametrize(("words", "code"), [(["program.py", "4"], 4), (["sh", "-c", "exit 3"], 3)])
def test_nsys_runs_the_command_and_its_report_is_kept(
    script, tmp_path, monkeypatch, capfd, words, code
):
    fake_nsys(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    monkeypatch.setattr(profile.shutil, "which", lambda name: "nsys")
    assert main(["profile", "--", *words]) == code
    captured = capfd.readouterr()
    assert "opd::fused_linear_divergence::rows" in captured.out
    assert captured.out.strip().endswith("profile.nsys-rep")
    assert Path("profile.nsys-rep").read_text() == "report"
    assert not list(Path().glob(".profile-*"))


def test_an_nsys_without_a_report_says_so(script, tmp_path, monkeypatch, capfd):
    fake_nsys(tmp_path, report=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(profile.shutil, "which", lambda name: "nsys")
    assert main(["profile", "--", "true"]) == 1
    assert "nsys made no report" in capfd.readouterr().err


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["profile"], "profile: expected a command, as in `opd profile -- opd train ...`"),
        (["profile", "--"], "profile: expected a command"),
        (["profile", "--", "nothing.py"], "profile: no such file 'nothing.py'"),
        (["profile", "--", "python", "nothing.py"], "profile: no such file 'nothing.py'"),
        (["profile", "--", "make"], "torch's profiler runs `opd ...`, `python ...` and"),
        (["profile", "--with", "nsys", "--", "opd"], "--with nsys: nsys is not on PATH"),
    ],
)
def test_errors_are_one_sentence_and_code_2(script, capsys, words, sentence):
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and sentence in lines[0]


def test_ctrl_c_leaves_no_half_file(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time, pathlib\npathlib.Path('started').touch()\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "opd", "profile", "--with", "torch", "--", "slow.py"]
    child = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (tmp_path / "started").exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 130
    left = {path.name for path in tmp_path.iterdir()} - {"slow.py", "started"}
    assert left == {"profile.json"}
    json.loads((tmp_path / "profile.json").read_text())


def test_a_bad_programs_own_errors_stay_its_own(script):
    with pytest.raises(ConfigError, match="no such file"):
        profile.runner_of(["python", "other.py"])
    assert profile.runner_of(["make"]) is None
    assert profile.runner_of(["python"]) is None
