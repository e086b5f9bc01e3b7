# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU, each kept as it ends."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.context import ROOT, Context, is_lost, public
from benchmarks.gpu.results import Check

# a line for each test, as it begins and as it ends
_FORMAT = ["-q", "-rN", "-p", "no:cacheprovider", "-p", "tests.gpu.outcomes", "--no-header"]
BEGUN, MARK = "begun: ", "outcome: "
# a kernel that waits for ever; Triton compiles for less
SILENCE_S = 90.0
FOLDER = "tests/gpu"


def lines_of(process: subprocess.Popen) -> Iterator[str | None]:
    """What it prints, None at its end.

    Raises:
        queue.Empty: it printed nothing for SILENCE_S.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get(timeout=SILENCE_S)) is not None:
        yield line


def run_until_lost(
    context: Context, command: list[str], environment: dict, done: list[str]
) -> tuple[int | None, list[str]]:
    """(exit code, outcomes) of the tests up to the first one that takes its process with it, which
    gives the exit code None; `done` gets their names."""
    outcomes: list[str] = []

    def keep(name: str, outcome: str, detail: str) -> None:
        done.append(name)
        outcomes.append(outcome)
        context.row(Check(name, outcome, public(detail)[:300]))

    running = ""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for line in lines_of(process):
                print(line, end="", flush=True)
                if line.startswith(BEGUN):
                    running = line.removeprefix(BEGUN).strip()
                elif line.startswith(MARK):
                    outcome, name, detail = line.removeprefix(MARK).rstrip("\n").split("\t")
                    keep(name, outcome, detail)
                    running = ""
                    if outcome == "failed" and is_lost(detail):
                        return None, outcomes
            process.wait()
        except queue.Empty:
            words = f"{running or 'pytest'} said nothing for {SILENCE_S:.0f} s"
            if not running:
                raise RuntimeError(words) from None
            keep(running, "failed", words)
            return None, outcomes
        finally:
            process.kill()
    if running:
        keep(running, "failed", f"the process ended within it, exit code {process.returncode}")
        return None, outcomes
    return process.returncode, outcomes


def run(context: Context) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if context.dry_run else "0"}
    if context.dry_run:
        environment["OPD_GPU_DRY_RUN"] = "1"
    command = [sys.executable, "-m", "pytest", FOLDER, "-m", "cuda", *_FORMAT]
    done: list[str] = []
    outcomes: list[str] = []
    code: int | None = None
    with tempfile.TemporaryDirectory() as folder:
        ran = Path(folder, "done")
        environment["OPD_GPU_TESTS_DONE"] = str(ran)
        # another process for the tests behind one that left its process without a device
        while code is None:
            ran.write_text("\n".join(done), encoding="utf-8")
            code, found = run_until_lost(context, command, environment, done)
            outcomes += found
    failed = outcomes.count("failed")
    # 5: no test was left
    if code not in (0, 1, 5) or not outcomes:
        raise RuntimeError(
            f"expected pytest to run {FOLDER}, got exit code {code} after {len(outcomes)} tests; "
            "the log has its words"
        )
    if failed:
        raise RuntimeError(f"{failed} of {len(outcomes)} GPU tests failed")
