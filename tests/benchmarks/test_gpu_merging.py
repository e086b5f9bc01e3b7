# SPDX-License-Identifier: Apache-2.0
"""Which parts of an earlier GPU run a later one adds to, and which it puts aside."""

from __future__ import annotations

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import machine
from benchmarks.gpu import results as schema
from benchmarks.gpu.context import CLUSTER_SWITCH


def test_parts_of_the_same_commit_are_kept_and_others_are_not(tmp_path):
    first = ["--dry-run", "--out", str(tmp_path), "--commit"]
    path = tmp_path / "dry_run.json"
    assert driver.main([*first, "abc", "build"]) == 0
    # out of time, and kept all the same
    assert driver.main([*first, "abc", "--budget", "1", "ncu"]) == 1
    assert set(schema.load(path)["parts"]) == {"build", "ncu"}
    assert driver.main([*first, "abd", "build"]) == 0
    assert set(schema.load(path)["parts"]) == {"build"}
    # put aside, where no page looks for it
    aside = tmp_path / "dry_run.json.old"
    assert set(schema.load(aside)["parts"]) == {"build", "ncu"}
    path.write_text("{")
    assert driver.main([*first, "abd", "build"]) == 0
    assert aside.read_text() == "{"


def test_trees_without_a_commit_are_not_mixed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver.machine, "commit", lambda given: ("unknown", None))
    for name in ("build", "ncu"):
        # out of time at once, and kept
        assert driver.main(["--dry-run", "--out", str(tmp_path), "--budget", "1", name]) == 1
    assert set(schema.load(tmp_path / "dry_run.json")["parts"]) == {"ncu"}
    assert set(schema.load(tmp_path / "dry_run.json.old")["parts"]) == {"build"}
    assert "a tree without a commit of its own (--commit names one)" in capsys.readouterr().err


def test_peers_that_came_later_are_no_other_versions(tmp_path, monkeypatch):
    words = ["--dry-run", "--out", str(tmp_path), "--budget", "1", "--commit", "abc"]
    versions = {"torch": "2", "opd_kernels": "1"}
    path = tmp_path / "dry_run.json"
    for name, more, kept in (
        ("build", {}, {"build"}),
        ("ncu", {"trl": "1.16"}, {"build", "ncu"}),
        ("ours", {}, {"build", "ncu", "ours"}),
        # other figures
        ("ceilings", {CLUSTER_SWITCH: "8"}, {"ceilings"}),
    ):
        monkeypatch.setattr(machine, "versions", lambda more=more: versions | more)
        driver.main([*words, name])
        found = schema.load(path)
        assert set(found["parts"]) == kept
    assert schema.load(path.with_suffix(".json.old"))["versions"] == {**versions, "trl": "1.16"}
    assert not machine.agree({"trl": "1"}, {"trl": "2"})
    assert not machine.agree({"torch": "1"}, {})
