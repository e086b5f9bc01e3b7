# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU, each kept as it ends.

Those of the C++ kernels run in one process. Beside it others share Triton's: compiling is most of
their time, and a process compiles one kernel after the other. It is done here and not before,
because what Triton looks up is the kernel with every integer's divisibility: only the call itself
knows the key.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import pytest_group
from benchmarks.gpu.context import ROOT, Context, public
from benchmarks.gpu.progress import SILENT_S
from benchmarks.gpu.results import Check

# a line for each test, as it ends
_FORMAT = ["-q", "-rN", "-p", "no:cacheprovider", "-p", "tests.gpu.outcomes", "--no-header"]
_FORMAT += ["-p", "benchmarks.gpu.pytest_group"]
BEGUN, MARK = "begun: ", "outcome: "
TRITON_PROCESSES = 5
# until a process is taken to hang that has not begun a test: torch is imported
FIRST_WORD_S = 120.0
NO_TESTS = 5


class Group(NamedTuple):
    """Of the tests, as `pytest_group.chosen` understands it."""

    index: int
    of: int

    def __str__(self) -> str:
        return "C++" if self.index < 0 else f"Triton {self.index + 1} of {self.of}"


def groups(dry_run: bool) -> list[Group]:
    """One process in a dry run, where nothing is compiled."""
    if dry_run:
        return [Group(-1, 0)]
    return [Group(index, TRITON_PROCESSES) for index in range(-1, TRITON_PROCESSES)]


def command_of(context: Context) -> list[str]:
    return [sys.executable, "-m", "pytest", "tests/gpu", "-m", "cuda", *_FORMAT]


class Follower:
    """Runs a group's processes, one after the other as long as tests take them down."""

    def __init__(self, context: Context, group: Group, lock: Path) -> None:
        self.context, self.group, self.lock = context, group, lock
        self.counts: Counter[str] = Counter()
        self.done: list[str] = []
        self.current = ""
        self.has_begun = False
        self.heard = time.monotonic()

    @property
    def patience_s(self) -> float:
        """How long the group may say nothing."""
        return SILENT_S if self.has_begun else FIRST_WORD_S

    def environment(self) -> dict[str, str]:
        told = {**self.group._asdict(), "done": self.done, "lock": str(self.lock)}
        dry_run = self.context.dry_run
        return {
            **os.environ,
            "TRITON_INTERPRET": "1" if dry_run else "0",
            **({"OPD_GPU_DRY_RUN": "1"} if dry_run else {}),
            pytest_group.VARIABLE: json.dumps(told),
        }

    def keep(self, outcome: str, name: str, detail: str) -> None:
        self.counts[outcome] += 1
        self.done.append(name)
        self.context.row(Check(name, outcome, public(detail)[:300]))

    def take(self, line: str) -> None:
        """A line of pytest's output."""
        print(line, end="", flush=True)
        self.heard = time.monotonic()
        if line.startswith(BEGUN):
            self.current, self.has_begun = line.removeprefix(BEGUN).strip(), True
        elif line.startswith(MARK):
            outcome, name, detail = line.removeprefix(MARK).rstrip("\n").split("\t")
            self.keep(outcome, name, detail)
            self.current = ""

    def process(self) -> tuple[int, bool]:
        """(exit code, whether it was ended because a test said nothing for too long)."""
        self.heard, self.current, is_stuck = time.monotonic(), "", False
        self.has_begun = False
        with subprocess.Popen(
            command_of(self.context),
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            self.context.groups.add(process.pid)
            reader = threading.Thread(target=lambda: [self.take(x) for x in process.stdout])
            reader.start()
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - self.heard > self.patience_s:
                    is_stuck = True
                    self.context.end_programs([process.pid])
                    break
            code = process.wait()
            reader.join()
            self.context.groups.discard(process.pid)
        return code, is_stuck

    def run(self) -> str:
        """The group's words for what was not a test's failure; "" if all is well."""
        tries = 2
        while True:
            before = len(self.done)
            code, is_stuck = self.process()
            if code in (0, 1, NO_TESTS):
                return ""
            why = f"no word for {self.patience_s:.0f} s" if is_stuck else f"exit code {code}"
            if self.current:
                self.keep("failed", self.current, f"{why}: it took its process down")
            elif len(self.done) == before:
                # between its tests, or before the first
                tries -= 1
                if not tries:
                    words = f"pytest, {self.group}: {why}"
                    self.context.left_out(f"the rest of {self.group}", words)
                    return words


def run(context: Context) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "large"
        followers = [Follower(context, group, lock) for group in groups(context.dry_run)]
        with ThreadPoolExecutor(len(followers) + 1) as pool:
            waiting = [pool.submit(follower.run) for follower in followers]
            compiling = None
            if not context.dry_run:
                compiling = pool.submit(compile_for_benchmarks, context)
            words = [said for future in waiting if (said := future.result())]
    if compiling is not None and (error := compiling.exception()) is not None:
        context.left_out("Triton's kernels of the benchmarks", f"{type(error).__name__}: {error}")
    counts = sum((follower.counts for follower in followers), Counter())
    if words or not counts:
        raise RuntimeError(
            f"expected pytest to run tests/gpu, got {'; '.join(words) or 'no test'} after "
            f"{dict(counts)}; the log has its words"
        )
    if counts["failed"]:
        raise RuntimeError(f"{counts['failed']} of {counts.total()} GPU tests failed")


def compile_for_benchmarks(context: Context) -> None:
    """Triton's kernels as later parts call them, into the cache that those read."""
    program = context.python("benchmarks.gpu.every_op", "--backend", "triton", "real_size")
    try:
        code = context.command(program).returncode
    except subprocess.TimeoutExpired:
        context.left_out("Triton's kernels of the benchmarks", "not compiled in time")
        return
    if code != 0:
        context.left_out("Triton's kernels of the benchmarks", f"exit code {code}, see the log")
