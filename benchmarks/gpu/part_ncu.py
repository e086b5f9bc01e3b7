# SPDX-License-Identifier: Apache-2.0
"""Hardware counters of the row kernel, the card's clocks left as they are."""

from __future__ import annotations

import csv
import io
import subprocess

from benchmarks.gpu.context import Context
from benchmarks.gpu.results import Counter

METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__cluster_size",
)
KERNELS = "regex:opd|divergence"
# one of each divergence, after which ncu need not wait for the program's end
LAUNCHES = 3
LATE = "its time was over"
NO_PERMISSION = "ERR_NVGPUCTRPERM"


def counters_of(output: str) -> list[Counter]:
    """From `ncu --csv`: rows of a launch and a metric, after whatever the program printed."""
    lines = output.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return []
    found = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        try:
            value = float((row["Metric Value"] or "").replace(",", ""))
            launch = int(row["ID"])
        except (KeyError, TypeError, ValueError):
            # a metric that this card lacks, or a line of the program
            continue
        unit = row["Metric Unit"] or ""
        found.append(Counter(row["Kernel Name"], launch, row["Metric Name"], unit, value))
    return found


def run(context: Context) -> None:
    backend = context.lead
    program = context.python("benchmarks.gpu.launches", "--backend", backend)
    ncu = context.tool("ncu")
    if ncu is None:
        done = context.command(program)
        if done.returncode != 0:
            raise RuntimeError(f"the launches failed with exit code {done.returncode}")
        context.left_out("ncu", "ncu is not on PATH; the kernels ran without it")
        return
    command = [ncu, "--clock-control", "none", "--csv", "--kernel-name", KERNELS]
    command += ["--kernel-name-base", "demangled"]
    command += ["--launch-count", str(LAUNCHES), "--kill", "yes"]
    # a name that this ncu does not know costs the others
    for metrics in (METRICS, [name for name in METRICS if not name.startswith("launch__")]):
        output, ended = counted(context, [*command, "--metrics", ",".join(metrics), *program])
        counters = counters_of(output)
        if counters or NO_PERMISSION in output or ended == LATE:
            break
    for counter in counters:
        context.row(counter)
    if not counters and NO_PERMISSION in output:
        # the machine's administrator decides that
        context.left_out("ncu", f"the driver keeps its counters from this user ({NO_PERMISSION})")
    elif not counters:
        said = next((x for x in output.splitlines() if x.startswith("==ERROR==")), "")
        raise RuntimeError(f"ncu printed no counter; {ended}; {said}")


def counted(context: Context, command: list[str]) -> tuple[str, str]:
    """(what ncu printed, how it ended): what it counted before its time was over it prints then."""
    try:
        done = context.command(command)
    except subprocess.TimeoutExpired as late:
        return late.output or "", LATE
    return done.stdout, f"exit code {done.returncode}"
