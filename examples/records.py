# SPDX-License-Identifier: Apache-2.0
"""What the examples share of keeping results: files that are whole or absent, commits, tables."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

# arm -> one flat mapping of numbers for each seed
Results = dict[str, list[dict[str, float]]]


def arm_dir(root: Path, arm: str) -> Path:
    """Where a job of one seed keeps its files."""
    return root / arm


def result_path(root: Path, arm: str) -> Path:
    """The file that says, by being there with the right key, that a job is done."""
    return arm_dir(root, arm) / "result.json"


def key_path(root: Path, arm: str) -> Path:
    """The file that names the job an unfinished directory belongs to."""
    return arm_dir(root, arm) / "job_key"


def finished(root: Path, arm: str, key: Callable[[], str]) -> dict[str, Any] | None:
    """The result of a finished job; None if it is not finished, or has another key."""
    path = result_path(root, arm)
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["key"] == key() else None


def is_stale(root: Path, arm: str, key: str) -> bool:
    """Whether what lies there was begun under another key."""
    path = key_path(root, arm)
    return path.is_file() and path.read_text(encoding="utf-8") != key


def claim(root: Path, arm: str, key: str, config: Any) -> Any:
    """The configuration with which to begin or go on with a job; its directory takes the key."""
    if is_stale(root, arm, key):
        config = config.model_copy(update={"resume_from_checkpoint": "none"})
    arm_dir(root, arm).mkdir(parents=True, exist_ok=True)
    key_path(root, arm).write_text(key, encoding="utf-8")
    return config


def run_job(
    description: str, jobs: Sequence[str], root: Path, run: Callable[[Path, str, int], Any]
) -> int:
    """The command line of one job, `run(root, name, seed)`. Returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("arm", choices=jobs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=root)
    options = parser.parse_args()
    from opd.schema import ConfigError
    from opd.train import Interrupted

    try:
        run(options.root.resolve(), options.arm, options.seed)
    except ConfigError as error:
        say(str(error))
        return 2
    except (Interrupted, KeyboardInterrupt):
        say("stopped")
        return 130
    return 0


def write_whole(path: Path, text: str) -> None:
    """A file that is there only when all of it is."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def say(text: str) -> None:
    """A line for whoever started the process."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def commit() -> str:
    """Of the working tree that this runs from, with a + if files of it differ."""

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    # only what makes the numbers: the loop, the kernels and the arms
    code = [":/python", ":/opd_kernels", ":/csrc", ":/examples"]
    is_changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", *code))
    return (git("rev-parse", "HEAD") or "unknown") + ("+" if is_changed else "")


def stamp(raw: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The results with the versions, the machine and the commits that made them."""
    from opd.assembly import versions

    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commits": sorted({result["commit"] for found in raw.values() for result in found}),
        "versions": versions(),
        "machine": {"processor": _processor(), "num_cpus": os.cpu_count()},
        "results": raw,
    }


def write_record(raw: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """The stamped results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stamp(raw), indent=1) + "\n", encoding="utf-8")


def mean(results: Results, arm: str, name: str) -> float:
    """Of the seeds."""
    return statistics.fmean(seed[name] for seed in results[arm])


def spread(results: Results, arm: str, name: str) -> float:
    """Standard deviation over the seeds, NaN for one seed or for what an arm does not have."""
    values = [seed[name] for seed in results[arm]]
    has_spread = len(values) > 1 and not any(map(math.isnan, values))
    return statistics.stdev(values) if has_spread else math.nan


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")
