# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU, each kept as it ends."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.gpu.context import ROOT, Context, public
from benchmarks.gpu.results import Check

# a line for each test, as it ends
_FORMAT = ["-q", "-rN", "-p", "no:cacheprovider", "-p", "tests.gpu.outcomes", "--no-header"]
MARK = "outcome: "


def run(context: Context) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if context.dry_run else "0"}
    if context.dry_run:
        environment["OPD_GPU_DRY_RUN"] = "1"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "cuda", *_FORMAT]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(MARK):
                outcome, name, detail = line.removeprefix(MARK).rstrip("\n").split("\t")
                counts[outcome] += 1
                context.row(Check(name, outcome, public(detail)[:300]))
    if process.returncode not in (0, 1) or not sum(counts.values()):
        raise RuntimeError(
            f"expected pytest to run tests/gpu, got exit code {process.returncode} after "
            f"{counts}; the log has its words"
        )
    if counts["failed"]:
        raise RuntimeError(f"{counts['failed']} of {sum(counts.values())} GPU tests failed")
