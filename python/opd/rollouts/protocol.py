# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of a source of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from opd.batch import Prompt, Trajectory


class Rollouts(Protocol):
    """A source of completions. An engine without memory writes `collect` and inherits the rest."""

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """`num_generations` completions for each prompt, in order, at an optimizer step."""
        ...

    def observe(self, held_out_nll: float) -> None:
        """Take note of an evaluation: nats per token of the held-out completions."""
        return

    def metrics(self) -> dict[str, float]:
        """What to log of the engine's own state."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which `load_state_dict` goes on bit for bit."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        return
