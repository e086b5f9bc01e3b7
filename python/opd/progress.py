# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it works: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as Remaining

# in a log, at most one line in so many seconds
_SECONDS_BETWEEN_LINES = 2.0

# of the live line; a narrow terminal loses the last numbers, not the bar
_WIDTH_WITHOUT_NUMBERS = 42

# what to show of an evaluation: a label, and what is around the name that tells one from another
_EVALUATED = (
    ("acc", "eval/accuracy/", ""),
    ("rkl", "eval/", "_states/reverse_kl"),
    ("bits/byte", "eval/", "_states/bits_per_byte"),
)

# what to show of a step, in this order, if it is there
_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("reverse_kl", "rkl", "{:.4f}"),
    ("reverse_kl_k1", "rkl(k1)", "{:.4f}"),
    ("accuracy", "acc", "{:.3f}"),
    ("tokens_per_s", "tok/s", "{:,.0f}"),
    ("forward_kl", "fkl", "{:.4f}"),
    ("completions/mean_length", "len", "{:.1f}"),
)


class Display:
    """A context manager around a run.

    Args:
        num_steps: of the run.
        console: where to draw. Default: the standard error.
        quiet: show nothing.
    """

    def __init__(
        self, num_steps: int, *, console: Console | None = None, quiet: bool = False
    ) -> None:
        self._console = console or Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._is_live = self._console.is_terminal and not quiet
        self._num_steps = num_steps
        self._accuracy: float | None = None
        self._last_line = float("-inf")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
            disable=not self._is_live,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("train", total=num_steps, numbers="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        """Say what is going on, in a word: load, train, eval, save."""
        self._progress.update(self._task, description=name)

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, values: dict[str, float]) -> None:
        """A step is done; `values` is empty when it is not one to log."""
        parts = self._numbers(values)
        if self._is_live:
            self._progress.update(self._task, completed=step)
            if values:
                room = self._console.width - _WIDTH_WITHOUT_NUMBERS
                while parts and len("  ".join(parts)) > room:
                    parts.pop()
                self._progress.update(self._task, numbers="  ".join(parts))
            return
        now = time.monotonic()
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._num_steps
        if values and is_due:
            self._last_line = now
            self.say(f"step {step}/{self._num_steps}  {'  '.join(parts)}")

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """An evaluation is done."""
        parts = []
        for head, prefix, tail in _EVALUATED:
            found = {
                name.removeprefix(prefix).removesuffix(tail): value
                for name, value in values.items()
                if name.startswith(prefix) and name.endswith(tail) and "/n" not in name
            }
            if found and head == "acc":
                self._accuracy = next(iter(found.values()))
            numbers = " ".join(f"{name} {value:.4f}" for name, value in found.items())
            parts += [f"{head} {numbers}"] if found else []
        self.say(f"eval {step}/{self._num_steps}  {'  '.join(parts)}")

    def _numbers(self, values: dict[str, float]) -> list[str]:
        known = dict(values)
        if self._accuracy is not None:
            known["accuracy"] = self._accuracy
        return [
            f"{label} {form.format(known[name])}" for name, label, form in _SHOWN if name in known
        ]
