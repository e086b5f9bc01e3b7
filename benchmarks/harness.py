# SPDX-License-Identifier: Apache-2.0
"""Timing that is fair on a shared machine, and peak memory that is real.

The variants of a comparison take turns inside one run, so that a slow moment hits all of them; what
is reported is the ratio of their best times. Peak memory is the kernel's own high-water mark of a
fresh process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = "opd_kernels"


def compare(
    benchmark, variants: Mapping[str, Callable[[], object]], *, floor: str, rounds: int = 7
) -> dict[str, float]:
    """Times the variants in turns; returns best time of each divided by the best of `floor`.

    `variants[OURS]` is what pytest-benchmark times; the others run in its untimed set-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()

    def others() -> None:
        for name, function in variants.items():
            if name != OURS:
                begin = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - begin)

    def ours() -> None:
        begin = time.perf_counter()
        variants[OURS]()
        seconds[OURS].append(time.perf_counter() - begin)

    benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
    best = {name: min(times) for name, times in seconds.items()}
    ratios = {name: best[name] / best[floor] for name in variants}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info["floor"] = floor
    benchmark.extra_info["ratio_to_floor"] = {name: round(r, 3) for name, r in ratios.items()}
    benchmark.extra_info["ratio_to_floor_medians"] = {
        name: round(medians[name] / medians[floor], 3) for name in variants
    }
    return ratios


def peak_extra_bytes(setup: str, statement: str) -> int:
    """Peak resident bytes that `statement` adds on top of `setup`, in a process of its own.

    `setup` should run the statement's code once at a small size, so that one-time allocations
    (thread pools, GEMM library buffers) are not taken for the statement's.
    """
    program = f"""
import gc, json
{setup}
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
{statement}
print(json.dumps(status("VmHWM") - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode != 0:
        raise RuntimeError(f"the measured program failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])
