# SPDX-License-Identifier: Apache-2.0
"""`opd bench`: the benchmarks of a source checkout, and the page that shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from opd.schema import ConfigError

_HERE = Path(__file__).resolve()


def source_root(start: Path = _HERE) -> Path:
    """The checkout that this package runs from.

    Raises:
        ConfigError: it was installed without one.
    """
    root = start.parents[2]
    if not (root / "benchmarks" / "gpu.sh").is_file():
        raise ConfigError(
            "bench: needs a source checkout, and opd was installed without one; clone the "
            "repository and run `pip install --no-build-isolation -e .` in it"
        )
    return root


def commands(root: Path, suite: str | None, rest: Sequence[str], report: bool) -> list[list[str]]:
    """The command lines, each run only if the one before ended with 0 or 1 (a missed goal).

    Raises:
        ConfigError: nothing was asked for.
    """
    if suite is None and not report:
        raise ConfigError("bench: expected cpu, gpu or --report")
    page = [sys.executable, "-m", "benchmarks.report"]
    if suite == "cpu":
        written = str(root / "build" / "bench.json")
        run = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-c", "benchmarks/pytest.ini"]
        run += rest or ["-m", "not slow"]
        return [[*run, f"--benchmark-json={written}"], [*page, written]]
    if suite == "gpu":
        run = [str(root / "benchmarks" / "gpu.sh"), *rest]
        return [run, page] if report else [run]
    return [page]


def bench(suite: str | None, rest: Sequence[str], *, report: bool) -> int:
    """Runs a suite, or only writes the page.

    Returns:
        The first exit code that is not 0.

    Raises:
        ConfigError: no checkout, or nothing to do.
    """
    root = source_root()
    (root / "build").mkdir(exist_ok=True)
    paths = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    code = 0
    for command in commands(root, suite, rest, report):
        done = subprocess.run(command, cwd=root, env=environment, check=False)
        code = code or done.returncode
        if done.returncode not in (0, 1):
            break
    return code
