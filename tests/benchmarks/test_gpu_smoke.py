# SPDX-License-Identifier: Apache-2.0
"""Verdicts on ops that run alone: one that hangs, one that fails, one that a kernel took down."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import every_op, part_smoke, report
from benchmarks.gpu import results as schema
from benchmarks.gpu.context import CLUSTER, CLUSTER_SWITCH, Context
from benchmarks.gpu.device import Device

CPU = Device("cpu")
SHAPE = every_op.DRY_SHAPES[0]
# what stands in for an op
PROGRAMS = {
    "passes": "echo ran passes",
    "hangs": "echo on the way; sleep 30",
    "fails": "echo FAILED fails, float32: ValueError: no; echo more; exit 1",
    "waits for blocks": f'[ "${CLUSTER_SWITCH}" = 0 ] || sleep 30',
    "crashes": "echo words; kill -SEGV $$",
}


def smoke(names: list[str], monkeypatch) -> tuple[dict[str, dict], str]:
    """(rows by name, words of the error) of the part over these programs."""
    rows: list[dict] = []
    context = Context(False, rows.append, time.monotonic() + 60)
    context.lead = "cpu"
    monkeypatch.setattr(part_smoke, "LIMIT_S", 1.5)
    monkeypatch.setattr(every_op, "OPS", tuple(names[1:]))
    monkeypatch.setattr(every_op, "REAL_SIZE", names[0])
    monkeypatch.setattr(Context, "python", lambda self, *words: ["bash", "-c", PROGRAMS[words[-1]]])
    try:
        part_smoke.run(context)
    except RuntimeError as error:
        return {row["name"]: row for row in rows}, str(error)
    return {row["name"]: row for row in rows}, ""


def test_each_op_has_a_verdict_of_its_own(monkeypatch):
    rows, error = smoke(["passes", "hangs", "fails", "crashes"], monkeypatch)
    found = {name: row["outcome"] for name, row in rows.items()}
    again = {
        f"{name}, {how}"
        for name in ("hangs", "fails", "crashes")
        for how in ("again", f"without the {CLUSTER}")
    }
    assert found == {
        "passes": "passed",
        **dict.fromkeys({"hangs", "fails", "crashes", *again}, "failed"),
    }
    assert rows["hangs"]["detail"].endswith("; on the way")
    assert rows["hangs"]["detail"].startswith("no end after")
    assert rows["fails"]["detail"] == "exit code 1; FAILED fails, float32: ValueError: no"
    assert rows["crashes"]["detail"] == "exit code -11; words"
    assert error.startswith("3 of 4 programs failed: ")
    assert "CUDA error" not in error


def test_what_the_switch_cures_turns_the_kernel_off_for_later_parts(monkeypatch, tmp_path):
    rows, error = smoke(["passes", "waits for blocks"], monkeypatch)
    assert rows["waits for blocks"]["outcome"] == "failed"
    assert rows[f"waits for blocks, without the {CLUSTER}"]["outcome"] == "passed"
    assert (
        rows[CLUSTER]["outcome"] == "failed" and "OPD_CLUSTER_BLOCKS=0" in rows[CLUSTER]["detail"]
    )
    assert error == "1 of 2 programs failed: waits for blocks"
    run = driver.Run(driver.parse(["--dry-run", "--out", str(tmp_path), "ncu"]))
    assert CLUSTER_SWITCH not in run._environment()
    part = {"status": "failed", "seconds": 1.0, "budget_s": 9.0, "reason": error}
    run.results["parts"]["smoke"] = {**part, "rows": list(rows.values())}
    assert run._environment()[CLUSTER_SWITCH] == "0"
    run.save()
    page = report.section(schema.load(run.path), run.path, tmp_path)
    assert "Without the cluster kernel" in page


def test_a_slow_start_turns_nothing_off(monkeypatch, tmp_path):
    first = tmp_path / "first"
    slow = f"[ -e {first} ] || {{ touch {first}; sleep 30; }}"
    monkeypatch.setitem(PROGRAMS, "starts late", slow)
    rows, error = smoke(["passes", "starts late"], monkeypatch)
    assert not error and CLUSTER not in rows
    assert rows["starts late"]["outcome"] == "failed"
    assert rows["starts late, again"]["outcome"] == "passed"


def test_all_well_is_no_error(monkeypatch):
    rows, error = smoke(["passes"], monkeypatch)
    assert list(rows) == ["passes"] and not error


def test_an_op_that_raises_leaves_the_others(monkeypatch, capsys):
    def raises(*_):
        raise KeyError("no such plan")

    calls = []
    monkeypatch.setattr(every_op, "fused", raises)
    monkeypatch.setattr(every_op, "token_logprobs", lambda *words: calls.append(words))
    monkeypatch.setattr(
        sys, "argv", ["every_op", "--backend", "cpu", "--dry-run", "fused", "token_logprobs"]
    )
    assert every_op.main() == 1
    lines = capsys.readouterr().out.splitlines()
    words = f"FAILED fused, {SHAPE}, float32: KeyError: 'no such plan'"
    assert lines[0] == words and len(calls) == 2 and lines[-1] == "ran token_logprobs"
    assert part_smoke.words_of("\n".join([*lines, "Traceback"])).count("KeyError") == 2


def test_no_op_is_called_on_a_lost_device(monkeypatch):
    def raises(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(every_op, "fused", raises)
    with pytest.raises(RuntimeError, match="fused lost the device"):
        every_op.runs("fused", "cpu", SHAPE, CPU, torch.float32)
