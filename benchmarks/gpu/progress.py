# SPDX-License-Identifier: Apache-2.0
"""What a part's process has begun and ended, so that another can go on where one was lost."""

from __future__ import annotations

import time

# until a case that says nothing is taken to hang: it may compile kernels of Triton
SILENT_S = 60.0


class Progress:
    """Of one part, over all of its processes."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        # the innermost last, and the seconds that each may be silent
        self.underway: list[str] = []
        self.patience: dict[str, float] = {}
        self.heard = time.monotonic()

    def hear(self, message: dict) -> bool:
        """Takes in a message of a process; whether it was one about cases, and not a row."""
        self.heard = time.monotonic()
        if "begun" in message:
            self.underway.append(message["begun"])
            self.patience[message["begun"]] = message.get("silent_s") or SILENT_S
            return True
        if "ended" not in message:
            return False
        if message["ended"] in self.underway:
            self.underway.remove(message["ended"])
        if not message.get("again"):
            self.done.add(message["ended"])
        return True

    def is_stuck(self) -> bool:
        """Whether a case is under way and said nothing for longer than it may."""
        if not self.underway:
            return False
        return time.monotonic() - self.heard > self.patience[self.underway[-1]]

    def lose(self) -> str | None:
        """The process is gone: the case that it was in, which no other one will run."""
        lost = self.underway[-1] if self.underway else None
        self.underway.clear()
        if lost is not None:
            self.done.add(lost)
        self.heard = time.monotonic()
        return lost
