# SPDX-License-Identifier: Apache-2.0
"""Ratios come from the rounds that both took part in; slow variants sit rounds out."""

from __future__ import annotations

import pytest

from benchmarks import harness
from benchmarks.harness import OURS, Turns


class Benchmark:
    """What the harness uses of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            function()


def test_ratios_are_of_common_rounds():
    turns = Turns({OURS: {0: 4.0, 1: 1.0, 2: 3.0}, "slow": {0: 12.0, 2: 9.0}}, OURS)
    assert turns.ratio("slow", OURS) == 9.0 / 3.0
    assert turns.ratio(OURS, OURS) == 1.0
    assert turns.ratio("slow", OURS, max) == 12.0 / 4.0


def test_slow_variants_sit_rounds_out():
    first = Turns({"floor": {0: 0.5}, OURS: {0: 1.0}, "slow": {0: 5.0}}, OURS)
    schedule = harness._schedule(first, rounds=9, budget_s=1e9, slow_rounds=3)
    assert len(schedule) == 9
    assert [("slow" in turn) for turn in schedule] == [True, False, False] * 3
    assert all({"floor", OURS} <= set(turn) for turn in schedule)


@pytest.mark.parametrize(("budget_s", "rounds"), [(0, 2), (15 + 4 * 1.5, 4), (1e9, 9)])
def test_rounds_follow_from_the_budget(budget_s, rounds):
    first = Turns({"floor": {0: 0.5}, OURS: {0: 1.0}, "slow": {0: 5.0}}, OURS)
    assert len(harness._schedule(first, 9, budget_s, slow_rounds=3)) == rounds


def test_compare_calls_everyone_in_turns():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in ("floor", OURS)}
    benchmark = Benchmark()
    ratios = harness.compare(benchmark, variants, floor="floor", rounds=3)
    assert calls.count(OURS) == calls.count("floor") >= 3
    assert ratios["floor"] == 1.0
    assert set(benchmark.extra_info["rounds"]) == {"floor", OURS}


def test_goals_are_kept_before_they_fail():
    benchmark = Benchmark()
    harness.goal(benchmark, "fast", 1.3, at_least=1.2)
    harness.goal(benchmark, "unknown", None, at_least=1.2)
    harness.assert_goals(benchmark)
    harness.goal(benchmark, "close", 1.2, at_most=1.1)
    with pytest.raises(AssertionError, match=r"close: 1\.2, must be at most 1\.1"):
        harness.assert_goals(benchmark)
    assert [goal["met"] for goal in benchmark.extra_info["goals"]] == [True, None, False]


def test_peak_memory_is_that_of_the_statement():
    size = 64 << 20
    peak = harness.peak_extra_bytes("", f"bytearray({size})")
    # the kernel counts resident pages in batches
    assert peak == pytest.approx(size, rel=0.02)
