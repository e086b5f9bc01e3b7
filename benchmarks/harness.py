# SPDX-License-Identifier: Apache-2.0
"""Timing that is fair on a shared machine, and peak memory that is real.

The variants of a comparison take turns inside one run, so that a slow moment hits all of them; what
is reported is the ratio of their best times, with that of their medians beside it. Peak memory is
the kernel's own high-water mark of a fresh process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = "opd_kernels"
# a variant that takes this many times as long as ours sits rounds out: nobody needs its time to
# the per cent, and the rounds it costs are those that a close race is decided by
SLOW = 2.0

# at most so many rounds; pytest's --rounds sets it
max_rounds = sys.maxsize


@dataclasses.dataclass
class Turns:
    """Seconds of each variant by round; a slow one sat rounds out."""

    seconds: dict[str, dict[int, float]]
    lead: str

    def ratio(self, name: str, other: str, of: Callable = min) -> float:
        """Best time of `name` over that of `other`, in the rounds that both took part in."""
        rounds = self.seconds[name].keys() & self.seconds[other].keys()
        mine, others = (
            of([self.seconds[variant][turn] for turn in rounds]) for variant in (name, other)
        )
        return mine / others

    def ratios(self, other: str, of: Callable = min) -> dict[str, float]:
        """Of every variant to `other`."""
        return {name: self.ratio(name, other, of) for name in self.seconds}


def take_turns(
    benchmark,
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    budget_s: float = math.inf,
    slow_rounds: int = 3,
    lead: str = OURS,
) -> Turns:
    """Runs the variants in turns after one untimed call of each, which also compiles.

    There are as many rounds as the budget allows, at least two and at most `rounds`. Variants
    above SLOW times the lead take part in `slow_rounds` of them at most, spread out evenly.
    `variants[lead]` is what pytest-benchmark times; the others run in its untimed set-up.
    """
    rounds = min(rounds, max_rounds)
    turns = Turns({name: {} for name in variants}, lead)
    schedule = [list(variants)] * rounds

    def timed(name: str, turn: int) -> None:
        begin = time.perf_counter()
        variants[name]()
        turns.seconds[name][turn] = time.perf_counter() - begin

    def others(turn: int) -> None:
        for name in schedule[turn]:
            if name != lead:
                timed(name, turn)

    for function in variants.values():
        function()
    first = 0
    if rounds > 1:
        for name in variants:
            timed(name, 0)
        first = 1
        schedule = _schedule(turns, rounds, budget_s, slow_rounds)
    remaining = iter(range(first, len(schedule)))
    current = first

    def setup() -> None:
        nonlocal current
        current = next(remaining)
        others(current)

    benchmark.pedantic(
        lambda: timed(lead, current), setup=setup, rounds=len(schedule) - first, iterations=1
    )
    return turns


def _schedule(turns: Turns, rounds: int, budget_s: float, slow_rounds: int) -> list[list[str]]:
    """Who takes part in which round, from the times of the first."""
    seconds = {name: times[0] for name, times in turns.seconds.items()}
    slow = [name for name, time_s in seconds.items() if time_s > SLOW * seconds[turns.lead]]
    quick = [name for name in seconds if name not in slow]
    left = budget_s - slow_rounds * sum(seconds[name] for name in slow)
    quick_s = sum(seconds[name] for name in quick)
    rounds = max(2, min(rounds, int(left / quick_s) if math.isfinite(left) else rounds))
    every = math.ceil(rounds / slow_rounds)
    return [quick if turn % every else list(seconds) for turn in range(rounds)]


def record(benchmark, turns: Turns, floor: str) -> dict[str, float]:
    """Writes the ratios to extra_info; returns those of the best times to `floor`."""
    ratios = turns.ratios(floor)
    benchmark.extra_info["floor"] = floor
    for key, other, of in (
        ("ratio_to_floor", floor, min),
        ("ratio_to_floor_medians", floor, statistics.median),
        ("ratio_to_ours", OURS, min),
        ("ratio_to_ours_medians", OURS, statistics.median),
    ):
        if other not in turns.seconds:
            continue
        values = turns.ratios(other, of)
        benchmark.extra_info[key] = {name: round(ratio, 3) for name, ratio in values.items()}
    benchmark.extra_info["rounds"] = {name: len(times) for name, times in turns.seconds.items()}
    return ratios


def compare(
    benchmark,
    variants: Mapping[str, Callable[[], object]],
    *,
    floor: str,
    rounds: int = 7,
    budget_s: float = math.inf,
) -> dict[str, float]:
    """Times the variants in turns; returns best time of each divided by the best of `floor`."""
    turns = take_turns(benchmark, variants, rounds=rounds, budget_s=budget_s)
    return record(benchmark, turns, floor)


def goal(
    benchmark,
    text: str,
    measured: float | None,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    medians: float | None = None,
    note: str = "",
) -> None:
    """Keeps a goal with what was measured; `assert_goals` fails the benchmark that missed one.

    `measured` None: what it takes is not installed, so the goal is neither met nor missed.
    """
    if (at_most is None) == (at_least is None):
        raise ValueError("goal: give one of at_most and at_least")
    sense, limit = ("at most", at_most) if at_least is None else ("at least", at_least)
    met = None
    if measured is not None:
        met = measured <= limit if sense == "at most" else measured >= limit
    benchmark.extra_info.setdefault("goals", []).append(
        {
            "goal": text,
            "sense": sense,
            "limit": limit,
            "measured": None if measured is None else round(measured, 3),
            "medians": None if medians is None else round(medians, 3),
            "met": met,
            "note": note,
        }
    )


def assert_goals(benchmark) -> None:
    """Fails, naming each goal that was missed. Everything measured has been kept by then."""
    missed = [
        f"{goal['goal']}: {goal['measured']}, must be {goal['sense']} {goal['limit']}. "
        f"{goal['note']}"
        for goal in benchmark.extra_info.get("goals", [])
        if goal["met"] is False
    ]
    assert not missed, "\n".join(missed)


# what a measured program starts with; peak_of(run) is what run adds to the resident bytes at most
_PEAK = """
import ctypes, gc, json
def _status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
def peak_of(run):
    gc.collect()
    # what malloc keeps of earlier allocations would hide those of `run`
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before
"""


def run_measured(program: str) -> object:
    """Runs the program, which knows `peak_of`, in a process of its own; returns its `result`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{_PEAK}\n{program}\nprint(json.dumps(result))"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the measured program failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_extra_bytes(setup: str, statement: str) -> int:
    """Peak resident bytes that `statement` adds on top of `setup`, in a process of its own.

    `setup` should run the statement's code once at a small size, so that one-time allocations
    (thread pools, GEMM library buffers) are not taken for the statement's.
    """
    return run_measured(f"{setup}\nresult = peak_of(lambda: {statement})")
