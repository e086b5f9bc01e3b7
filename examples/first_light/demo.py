# SPDX-License-Identifier: Apache-2.0
"""First light: distil a small model on-policy from scratch on two CPU cores, and say what came out.

python examples/first_light/demo.py          a few minutes, new files each time
python examples/first_light/demo.py --full   every arm, three seeds; finished arms are not run again
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import run_arm
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1]))

import jobs
from jobs import run_jobs

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(run_arm.__file__)
DEMO_ARMS = ("more_sft", "off_policy_reverse_kl", "on_policy_reverse_kl", "on_policy_jsd")
FULL_ARMS = (
    "more_sft",
    "more_sft_equal_flops",
    "off_policy_forward_kl",
    "off_policy_reverse_kl",
    "on_policy_forward_kl",
    "on_policy_reverse_kl",
    "on_policy_jsd",
)
DEMO_SEEDS = (0, 1)
FULL_SEEDS = (0, 1, 2)


class Job(jobs.Job):
    """One process of this demo."""

    @property
    def worker(self) -> Path:
        """The script."""
        return WORKER

    def is_finished_before(self) -> bool:
        """Whether an earlier run left this job's result, made with the same settings."""
        if not run_arm.result_path(self.root, self.arm).is_file():
            return False
        return run_arm.read_result(self.root, self.arm, self.seed) is not None


def plan_jobs(root: Path, arms: tuple[str, ...], seeds: tuple[int, ...]) -> list[Job]:
    """The jobs in the order in which they should start: seeds abreast, slow arms first."""
    planned = [Job(seed, "teacher", root / f"seed{seed}", None) for seed in seeds]
    planned += [Job(seed, "warm_sft", root / f"seed{seed}", "teacher") for seed in seeds]
    for seed in seeds:
        for arm in sorted(arms, key=lambda arm: not arm.startswith("on_policy")):
            planned.append(Job(seed, arm, root / f"seed{seed}", "warm_sft"))
    return planned


def main() -> int:
    parser = argparse.ArgumentParser(description="Distil a small model on-policy on the CPU.")
    parser.add_argument("--full", action="store_true", help="all arms, three seeds, resumable")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1, or 0 1 2 with --full")
    parser.add_argument("--arms", nargs="+", choices=FULL_ARMS, help="default: those that matter")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one core each")
    parser.add_argument("--root", type=Path, help="where the files go; give it again to go on")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    seeds = tuple(options.seeds or (FULL_SEEDS if options.full else DEMO_SEEDS))
    arms = tuple(options.arms or (FULL_ARMS if options.full else DEMO_ARMS))
    runs = REPOSITORY / "runs" / "first_light"
    new = runs / time.strftime("demo-%Y%m%d-%H%M%S")
    # absolute, because the paths are part of the arms' settings
    root = (options.root or (runs / "full" if options.full else new)).resolve()

    def work() -> None:
        run_jobs(plan_jobs(root, arms, seeds), max(1, options.jobs), console)
        # imported late: drawing needs matplotlib, which takes a second to load
        import summary

        summary.write(root, arms, seeds, console, is_full=options.full)

    again = ["--root", str(root), *jobs.flags(options, "full", "seeds", "arms")]
    return jobs.run_demo(work, console, again)


if __name__ == "__main__":
    sys.exit(main())
