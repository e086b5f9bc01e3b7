# SPDX-License-Identifier: Apache-2.0
"""A part whose process is lost goes on in another one, without the case that took it down."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import cases, part_peers
from benchmarks.gpu import progress as progress_module
from benchmarks.gpu import results as schema
from benchmarks.gpu.context import ROOT, Context, DeviceLost
from benchmarks.gpu.device import Device
from benchmarks.gpu.progress import Progress

CPU = Device("cpu")
# a part in place of ncu's, which imports nothing that takes long
PART = """
import os, signal, sys, time
import benchmarks.gpu.part_ncu as part
from benchmarks.gpu.results import Check

def run(context):
    def dies(name="dies"):
        context.row(Check(f"half of {name}", "passed"))
        raise RuntimeError("CUDA error in launch: an illegal memory access was encountered")
    def crashes():
        os.kill(os.getpid(), signal.SIGSEGV)
    def hangs():
        time.sleep(100)
    def calls_a_peer():
        if "peer" in context.done:
            return context.row(Check("without the peer", "passed"))
        with context.underway("peer", again=True):
            crashes()
    context.left_out("somebody", "is not here")
    names = {names}
    for name in names:
        passes = lambda name=name: context.row(Check(name, "passed"))
        context.case(name, locals().get(name, passes))

part.run = run
"""


def run_of(names: list[str], tmp_path, monkeypatch) -> tuple[dict, list[tuple[str, str]]]:
    """(the part, (name, outcome) of its rows) after a run of these cases in this order."""
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(PART.replace("{names}", repr(names)))
    monkeypatch.setenv("PYTHONPATH", f"{late}:{ROOT}:{ROOT / 'python'}")
    run = driver.Run(driver.parse(["--dry-run", "--out", str(tmp_path), "ncu"]))
    run.part("ncu", 60.0)
    part = schema.load(run.path)["parts"]["ncu"]
    return part, [(row["name"], row["outcome"]) for row in part["rows"]]


def test_a_lost_device_costs_the_case_that_lost_it(tmp_path, monkeypatch):
    part, rows = run_of(["first", "dies", "crashes", "last"], tmp_path, monkeypatch)
    assert rows == [
        ("somebody", "left out"),
        ("first", "passed"),
        ("half of dies", "passed"),
        ("dies", "error"),
        ("crashes", "error"),
        ("last", "passed"),
    ]
    assert part["status"] == "failed"
    assert part["reason"] == "2 cases took their process down: dies, crashes"
    details = {row["name"]: row["detail"] for row in part["rows"]}
    assert "CUDA error in launch: an illegal memory access" in details["dies"]
    assert details["crashes"].startswith("ended by signal 11")


def test_a_case_that_hangs_is_ended_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_module, "SILENT_S", 1.5)
    begin = time.monotonic()
    part, rows = run_of(["hangs", "last"], tmp_path, monkeypatch)
    assert rows[1:] == [("hangs", "error"), ("last", "passed")]
    assert part["rows"][1]["detail"].startswith("no word for ")
    assert time.monotonic() - begin < 40


def test_a_peer_that_crashes_is_not_called_again_and_its_case_is(tmp_path, monkeypatch):
    _, rows = run_of(["calls_a_peer", "last"], tmp_path, monkeypatch)
    assert rows[1:] == [("peer", "error"), ("without the peer", "passed"), ("last", "passed")]


def test_what_survived_may_run_again_and_what_did_not_may_not():
    progress = Progress()
    for message in ({"begun": "case"}, {"begun": "peer"}, {"ended": "peer", "again": True}):
        assert progress.hear(message)
    assert progress.lose() == "case" and progress.done == {"case"}
    assert progress.lose() is None and not progress.is_stuck()
    assert not progress.hear({"kind": "Check"})


def test_a_compiler_may_be_silent_for_longer():
    progress = Progress()
    progress.hear({"begun": "case", "silent_s": 0.0})
    progress.heard -= 70.0
    assert progress.is_stuck()
    progress.hear({"begun": "torch.compile", "silent_s": 120.0})
    progress.heard -= 70.0
    assert not progress.is_stuck()


def test_a_peer_of_an_earlier_process_is_left_out_with_the_reason():
    rows: list[dict] = []
    context = Context(True, rows.append, time.monotonic() + 60, done=["fla"])
    assert not part_peers.starts(CPU, context, "fla: case", pytest.fail, "fla")
    assert rows[0]["outcome"] == "left out" and "ended an earlier process" in rows[0]["detail"]


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("inductor"), OSError("y")])
def test_any_exception_is_of_its_case_alone(error):
    rows: list[dict] = []
    context = Context(True, rows.append, time.monotonic() + 60)

    def raises():
        raise error

    context.case("one", raises)
    context.case("two", rows.clear)
    assert rows == []
    context.case("three", raises)
    assert rows[0]["name"] == "three" and type(error).__name__ in rows[0]["detail"]


def test_the_device_is_asked_whether_it_is_lost(monkeypatch):
    context = Context(True, [].append, time.monotonic() + 60)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # of one call alone
    with context.attempt("gemm"):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED")

    def broken():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceLost, match="kernel: whatever"), context.attempt("kernel"):
        raise ValueError("whatever")


def test_everyone_has_a_figure_before_anyone_has_two():
    ordered = part_peers.ordered_cases(cases.REAL)
    first, second, third, *rest = ordered
    shape = cases.SHAPES[0]
    assert first == (shape, "trained", "reverse_kl", False)
    assert second == (shape, "trained", "reverse_kl", True)
    # the only divergence of one peer
    assert third == (shape, "trained", "forward_kl", False)
    assert len(set(ordered)) == len(ordered) == 2 * 6 * 2 * 3
    is_compiled = [case.compiled for case in rest]
    assert is_compiled == sorted(is_compiled)
