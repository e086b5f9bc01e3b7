# SPDX-License-Identifier: Apache-2.0
"""`opd profile -- COMMAND`: the time of each `opd::` range, by nsys or by torch's profiler.

Python commands run inside a runner of ours, so that the capture starts when the program does and
not while torch is imported; nsys takes any command.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from opd.schema import ConfigError

HEADER = ["range", "calls", "kernels", "total ms", "mean ms"]
RANGE = re.compile(r"opd::[\w:]+")
NSYS, TORCH = "nsys", "torch"
SUFFIXES = {NSYS: ".nsys-rep", TORCH: ".json"}


class Row(NamedTuple):
    """One range; `kernels` is None where nobody counted them."""

    name: str
    calls: int
    kernels: int | None
    total_ms: float

    def cells(self) -> list[str]:
        """As HEADER says."""
        kernels = "" if self.kernels is None else str(self.kernels)
        mean = self.total_ms / max(1, self.calls)
        return [self.name, str(self.calls), kernels, f"{self.total_ms:.3f}", f"{mean:.4f}"]


class Outcome(NamedTuple):
    """Of a profiled command: its exit code, the ranges, where the report lies, what went wrong."""

    code: int
    rows: list[Row]
    report: Path | None
    notes: list[str]


# -- commands ------------------------------------------------------------------------------------


def runner_of(command: Sequence[str]) -> Callable[[], object] | None:
    """How to run a command inside this process; None if it is no Python program.

    Raises:
        ConfigError: a Python program that does not exist.
    """
    if not command:
        raise ConfigError("profile: expected a command, as in `opd profile -- opd train ...`")
    program, *words = command
    name = Path(program).name
    if name == "opd":
        from opd import cli

        return lambda: cli.main(words)
    if name.endswith(".py"):
        _exists(program)
        return lambda: _run_script(program, words)
    if not re.fullmatch(r"python[\d.]*", name) or not words:
        return None
    first, *rest = words
    if first == "-m" and rest:
        return lambda: _run_module(rest[0], rest[1:])
    if first == "-c" and rest:
        return lambda: exec(compile(rest[0], "<command>", "exec"), {"__name__": "__main__"})
    if first.startswith("-"):
        return None
    _exists(first)
    return lambda: _run_script(first, rest)


def _exists(script: str) -> None:
    if not Path(script).is_file():
        raise ConfigError(f"profile: no such file '{script}'")


def _run_script(script: str, words: Sequence[str]) -> None:
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def _run_module(module: str, words: Sequence[str]) -> None:
    sys.argv = [module, *words]
    sys.path.insert(0, os.getcwd())
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def exit_code(run: Callable[[], object]) -> int:
    """What the interpreter would end with; errors are printed as it would print them."""
    try:
        returned = run()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except ConfigError:
        raise
    except Exception:
        traceback.print_exc()
        return 1
    return returned if isinstance(returned, int) else 0


def choose(wanted: str | None, command: Sequence[str]) -> str:
    """The profiler: nsys where it is on PATH, torch's for a Python program otherwise.

    Raises:
        ConfigError: the wanted one cannot run this command here.
    """
    is_python = runner_of(command) is not None
    has_nsys = shutil.which(NSYS) is not None
    if wanted == NSYS and not has_nsys:
        raise ConfigError("profile: --with nsys: nsys is not on PATH; --with torch needs none")
    if (wanted == TORCH or not has_nsys) and not is_python:
        raise ConfigError(
            f"profile: torch's profiler runs `opd ...`, `python ...` and `script.py ...`, got "
            f"'{command[0]}'; with nsys on PATH any command can be profiled"
        )
    return wanted or (NSYS if has_nsys else TORCH)


def profile(command: Sequence[str], profiler: str, output: Path | None) -> Outcome:
    """Runs the command; the report appears whole or not at all.

    Raises:
        ConfigError: the command is none.
    """
    report = output or Path(f"profile{SUFFIXES[profiler]}")
    with _beside(report) as directory:
        if profiler == NSYS:
            return _with_nsys(command, report, directory)
        return _with_torch(command, report, directory)


@contextlib.contextmanager
def _beside(report: Path) -> Iterator[Path]:
    """A directory on the same file system, gone afterwards."""
    try:
        with tempfile.TemporaryDirectory(prefix=".profile-", dir=report.parent) as name:
            yield Path(name)
    except PermissionError as error:
        raise ConfigError(f"--output: cannot write beside '{report}': {error}") from None


# -- torch's profiler ----------------------------------------------------------------------------


def _with_torch(command: Sequence[str], report: Path, directory: Path) -> Outcome:
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    run = runner_of(command)
    with torch.profiler.profile(activities=activities) as profiler:
        code = exit_code(run)
    averages = profiler.key_averages()
    rows = rows_of_averages(averages)
    trace = directory / "trace.json"
    profiler.export_chrome_trace(str(trace))
    os.replace(trace, report)
    notes = [] if len(activities) > 1 else ["no GPU: the times are of the CPU"]
    return Outcome(code, rows, report, notes)


def rows_of_averages(averages: Sequence) -> list[Row]:
    """The ranges in torch's averages, the longest first: time on the GPU if there is any."""
    ranges = [event for event in averages if RANGE.fullmatch(event.key)]
    on_device = any(event.device_time_total > 0 for event in ranges)
    totals: dict[str, Row] = {}
    for event in ranges:
        micros = event.device_time_total if on_device else event.cpu_time_total
        # a range may appear twice, as the host saw it and as the device did
        row = Row(event.key, event.count, None, micros / 1e3)
        totals[event.key] = max(row, totals.get(event.key, row), key=lambda item: item.total_ms)
    return sorted(totals.values(), key=lambda row: -row.total_ms)


# -- nsys ----------------------------------------------------------------------------------------


def nsys_command(command: Sequence[str], report: Path, *, has_gpu: bool) -> list[str]:
    """The line that profiles a command: of a Python program only what is inside the runner."""
    words = [NSYS, "profile", "--trace=cuda,nvtx,cublas", "--sample=none", "--cpuctxsw=none"]
    words += ["--force-overwrite=true", f"--output={report}"]
    if runner_of(command) is None:
        return [*words, *command]
    if has_gpu:
        words += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    return [*words, sys.executable, "-m", "opd.profile", *command]


def _with_nsys(command: Sequence[str], report: Path, directory: Path) -> Outcome:
    import torch

    made = directory / "profile.nsys-rep"
    line = nsys_command(command, made, has_gpu=torch.cuda.is_available())
    try:
        code = subprocess.run(line, check=False).returncode
    except KeyboardInterrupt:
        return Outcome(130, [], None, ["interrupted; no report was kept"])
    if not made.is_file():
        return Outcome(code or 1, [], None, ["nsys made no report; its words are above"])
    stats = [NSYS, "stats", "--report", "nvtx_kern_sum", "--format", "csv", "--output", "-"]
    done = subprocess.run([*stats, str(made)], capture_output=True, text=True, check=False)
    notes = []
    rows = rows_of_csv(done.stdout)
    if done.returncode != 0:
        notes.append(f"nsys stats ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    os.replace(made, report)
    return Outcome(code, rows, report, notes)


def rows_of_csv(text: str) -> list[Row]:
    """`nsys stats --report nvtx_kern_sum --format csv`: a line for each range and kernel.

    A kernel counts in every range that encloses its launch, so a range's total is of all in it.
    """
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if "NVTX Range" in line), None)
    if header is None:
        return []
    found: dict[str, Row] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        name = RANGE.search(line["NVTX Range"] or "")
        if name is None:
            continue
        key, nanoseconds = name[0], float(line["Total Time (ns)"].replace(",", ""))
        calls, kernels = int(line["NVTX Inst"]), int(line["Kern Inst"])
        before = found.get(key, Row(key, 0, 0, 0.0))
        # every kernel's line repeats how often the range ran, unless it ran in only some of them
        found[key] = Row(
            key,
            max(before.calls, calls),
            before.kernels + kernels,
            before.total_ms + nanoseconds / 1e6,
        )
    return sorted(found.values(), key=lambda row: -row.total_ms)


def _run_captured(command: Sequence[str]) -> int:
    """Inside nsys: the capture begins here, after the imports, and ends with the program."""
    import torch

    run = runner_of(command)
    if not torch.cuda.is_available():
        return exit_code(run)
    torch.cuda.init()
    torch.cuda.profiler.start()
    try:
        return exit_code(run)
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(_run_captured(sys.argv[1:]))
