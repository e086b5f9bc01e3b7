# SPDX-License-Identifier: Apache-2.0
"""What a part's process has begun and ended, so that another can go on where one was lost."""

from __future__ import annotations

import time


class Progress:
    """Of one part, over all of its processes."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        # the innermost last
        self.underway: list[str] = []
        self.heard = time.monotonic()

    def hear(self, message: dict) -> bool:
        """Takes in a message of a process; whether it was one about cases, and not a row."""
        self.heard = time.monotonic()
        if "begun" in message:
            self.underway.append(message["begun"])
            return True
        if "ended" not in message:
            return False
        if message["ended"] in self.underway:
            self.underway.remove(message["ended"])
        if not message.get("again"):
            self.done.add(message["ended"])
        return True

    def silent_s(self) -> float:
        """Seconds without a word while a case is under way; 0 if none is."""
        return time.monotonic() - self.heard if self.underway else 0.0

    def lose(self) -> str | None:
        """The process is gone: the case that it was in, which no other one will run."""
        lost = self.underway[-1] if self.underway else None
        self.underway.clear()
        if lost is not None:
            self.done.add(lost)
        self.heard = time.monotonic()
        return lost
