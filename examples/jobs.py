# SPDX-License-Identifier: Apache-2.0
"""Jobs of a demo in processes of their own, a few at a time, with what they print shown live."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

_STEP = re.compile(r"(?:step|eval) (\d+)/(\d+)\s*(.*)")
_SECONDS_BETWEEN_LINES = 10.0


class JobFailed(Exception):
    """A job ended with an error; the message holds the end of its log."""


@dataclass
class Job:
    """One process of a demo, and what it waits for.

    Attributes:
        seed, arm: what it is of.
        root: of the files of this seed.
        needs: the arm of the same seed that must be done before.
    """

    seed: int
    arm: str
    root: Path
    needs: str | None
    process: subprocess.Popen[bytes] | None = None
    log: TextIO | None = None
    is_done: bool = False

    @property
    def name(self) -> str:
        """As shown."""
        return f"seed {self.seed} {self.arm}"

    @property
    def log_path(self) -> Path:
        """What the process prints."""
        return self.root / f"{self.arm}.log"

    @property
    def worker(self) -> Path:
        """The script that does it, called with the arm, --seed and --root."""
        raise NotImplementedError

    def is_finished_before(self) -> bool:
        """Whether an earlier run left this job's result, made with the same settings."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the process; Ctrl-C reaches only the parent, which then ends its jobs itself."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.log = self.log_path.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, self.worker, self.arm, f"--seed={self.seed}", f"--root={self.root}"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )

    def last_line(self) -> str:
        """The newest line of the log."""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "starting")

    def is_ended(self) -> bool:
        """Reap the process if it has ended.

        Raises:
            JobFailed: it ended with an error.
        """
        if self.process is None or self.process.poll() is None:
            return False
        if self.log is not None:
            self.log.close()
        if self.process.returncode != 0:
            tail = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise JobFailed(f"{self.name} failed; the end of {self.log_path}:\n" + "\n".join(tail))
        self.is_done = True
        return True


def run_demo(work: Callable[[], None], console: Console, again: Sequence[str]) -> int:
    """Do the work and tell how long it took; the exit status.

    Args:
        work: may raise `JobFailed`.
        console: for people.
        again: the arguments with which the script goes on after Ctrl-C.
    """
    start = time.monotonic()
    # a closed terminal or a kill ends the jobs too, as Ctrl-C does
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        command = shlex.join([sys.executable, sys.argv[0], *again])
        console.print(f"stopped; to go on: {command}", markup=False, soft_wrap=True)
        return 130
    except JobFailed as error:
        console.print(str(error), markup=False)
        return 1
    console.print(f"\n{time.monotonic() - start:.0f} seconds in all")
    return 0


def flags(options: argparse.Namespace, *names: str) -> list[str]:
    """Options of a command line, those that were given, as one would type them."""
    words: list[str] = []
    for name in names:
        value = getattr(options, name)
        if value:
            words += [f"--{name}", *([] if value is True else map(str, value))]
    return words


def run_jobs(jobs: Sequence[Job], num_slots: int, console: Console) -> None:
    """Run the jobs, as many at a time as there are slots, and show how far each one is."""
    display = Board(jobs, console)
    with display:
        try:
            while not all(job.is_done for job in jobs):
                running = [job for job in jobs if job.process is not None and not job.is_done]
                for job in running:
                    if job.is_ended():
                        display.finished(job)
                done = {(job.seed, job.arm) for job in jobs if job.is_done}
                free = num_slots - sum(not job.is_done for job in running)
                for job in jobs:
                    is_ready = job.needs is None or (job.seed, job.needs) in done
                    if free <= 0 or job.process is not None or job.is_done or not is_ready:
                        continue
                    if job.is_finished_before():
                        job.is_done = True
                        display.finished(job, "done earlier")
                    else:
                        job.start()
                        free -= 1
                display.update()
                time.sleep(0.2)
        finally:
            stop_jobs(jobs)


def stop_jobs(jobs: Sequence[Job]) -> None:
    """Ask what still runs to stop (the loop then saves a checkpoint), and wait for it."""
    running = [job.process for job in jobs if job.process and job.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


class Board:
    """Live bars on a terminal, a line now and then in a log."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self._jobs = jobs
        self._console = console
        self._start = self._last_line = time.monotonic()
        self._bars: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description:<30}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn(
                "{task.fields[numbers]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            disable=not console.is_terminal,
        )
        self._total = self._progress.add_task("all jobs", total=len(jobs), numbers="")

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def finished(self, job: Job, how: str = "done") -> None:
        """A line that stays."""
        if job.name in self._bars:
            self._progress.remove_task(self._bars.pop(job.name))
        num_done = sum(other.is_done for other in self._jobs)
        self._progress.update(
            self._total, completed=num_done, numbers=f"{num_done} of {len(self._jobs)} done"
        )
        seconds = time.monotonic() - self._start
        self._console.print(
            f"[{seconds:4.0f} s] {num_done}/{len(self._jobs)} {job.name}: {how}", markup=False
        )

    def update(self) -> None:
        """Show where the running jobs are."""
        lines = []
        for job in self._jobs:
            if job.process is None or job.is_done:
                continue
            line = job.last_line()
            if job.name not in self._bars:
                self._bars[job.name] = self._progress.add_task(job.name, total=None, numbers="")
            bar = self._bars[job.name]
            if match := _STEP.match(line):
                step, total, numbers = match.groups()
                self._progress.update(bar, completed=int(step), total=int(total), numbers=numbers)
            else:
                self._progress.update(bar, numbers=line)
            lines.append(f"{job.name}: {line}")
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            for line in lines:
                self._console.print(f"[{now - self._start:4.0f} s] {line}", markup=False)
