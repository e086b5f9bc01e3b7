# SPDX-License-Identifier: Apache-2.0
"""Distil a model into one with another tokenizer by every objective that can, on two CPU cores.

python examples/cross_tokenizer/crossing.py          one seed; a second run goes on from the first
python examples/cross_tokenizer/crossing.py --full   three seeds, and the page in docs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import train_arm
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1]))

import jobs
from records import REPOSITORY

OFF_POLICY = (
    "alm",
    "uld",
    "gold_observed",
    "gold_bayesian",
    "gold_hybrid",
    "simct",
    "mined",
    "overlap",
    "dskd_v1",
    "dskd_v2",
    "multilevel_ot",
)
ON_POLICY = ("on_policy_alm",)
# with a teacher that has the student's tokenizer
TWINS = ("same_tokenizer", "on_policy_same_tokenizer")
ARMS = ("more_sft", "seq_kd", *OFF_POLICY, *ON_POLICY, *TWINS)
DEMO_SEEDS, FULL_SEEDS = (0,), (0, 1, 2)


class Job(jobs.Job):
    """One process of this demo."""

    @property
    def worker(self) -> Path:
        """The script."""
        return Path(train_arm.__file__)

    def is_finished_before(self) -> bool:
        """Whether an earlier run left this job's result, made with the same settings."""
        return train_arm.read_result(self.root, self.arm, self.seed) is not None


def plan_jobs(root: Path, arms: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The jobs in the order in which they should start: teachers first, then slow arms."""
    needs = {"teacher": None, train_arm.WARM: "teacher"}
    if set(arms) & set(TWINS):
        needs["twin_teacher"] = train_arm.WARM
    for arm in sorted(arms, key=lambda arm: not arm.startswith("on_policy")):
        needs[arm] = "twin_teacher" if arm in TWINS else train_arm.WARM
    return [
        Job(seed, arm, root / f"seed{seed}", needed)
        for arm, needed in needs.items()
        for seed in seeds
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Distil across two tokenizers on the CPU.")
    parser.add_argument("--full", action="store_true", help="three seeds, and the page in docs")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0, or 0 1 2 with --full")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one core each")
    parser.add_argument("--root", type=Path, help="where the files go")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    seeds = tuple(options.seeds or (FULL_SEEDS if options.full else DEMO_SEEDS))
    arms = tuple(options.arms or ARMS)
    # absolute, because the paths are part of the arms' settings
    root = (options.root or REPOSITORY / "runs" / "cross_tokenizer").resolve()

    def work() -> None:
        jobs.run_jobs(plan_jobs(root, arms, seeds), max(1, options.jobs), console)
        # imported late: drawing needs matplotlib, which takes a second to load
        import table

        table.write(root, arms, seeds, console, is_full=options.full)

    again = ["--root", str(root), *jobs.flags(options, "full", "seeds", "arms")]
    return jobs.run_demo(work, console, again)


if __name__ == "__main__":
    sys.exit(main())
