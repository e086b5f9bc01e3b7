# SPDX-License-Identifier: Apache-2.0
"""DistiLLM's adaptive use of student completions, with a replay buffer."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from opd.batch import Prompt, Trajectory
from opd.rollouts.dataset import DatasetRollouts
from opd.rollouts.hf import HfRollouts, Sampling
from opd.rollouts.protocol import Rollouts

_THRESHOLD_STEP = 0.1


class ReplayConfig(Sampling):
    """A step uses the student's completions with probability phi, else the data's.

    phi starts at `init_threshold` and rises by 0.1, up to 1, when an evaluation finds the held-out
    loss `loss_eps` or more above the last one that made it rise (at first: the one at step 0). The
    student's completions are fresh with probability phi * (1 - step / max_steps), and as long as
    the buffer is not full; else they are drawn from the buffer.

    Attributes:
        init_threshold: phi at the start.
        loss_eps: nats per token.
        capacity: completions in the buffer; the oldest leave first.

    Source: DistiLLM, arXiv:2402.03898, section 3.2, and its released training script.
    """

    needs_teacher: ClassVar[bool] = False
    needs_completions: ClassVar[bool] = True
    needs_evaluation: ClassVar[bool] = True
    tells_behaviour: ClassVar[bool] = False

    kind: Literal["replay"] = "replay"
    temperature: float = Field(1.0, gt=0)
    num_generations: Literal[1] = 1
    init_threshold: float = Field(0.0, ge=0, le=1)
    loss_eps: float = Field(0.1, ge=0)
    capacity: int = Field(1000, ge=1)

    def build(
        self, student: Any, teacher: Any, tokenizer: Any, *, seed: int, max_steps: int, **_: Any
    ) -> ReplayRollouts:
        """The engine."""
        return ReplayRollouts(
            HfRollouts(student, tokenizer, self),
            DatasetRollouts(self.max_completion_length),
            self,
            seed=seed,
            max_steps=max_steps,
        )


class ReplayRollouts(Rollouts):
    """The buffer, phi, and the held-out loss that phi was last raised at."""

    def __init__(
        self,
        student: Rollouts,
        written: Rollouts,
        config: ReplayConfig,
        *,
        seed: int,
        max_steps: int,
    ) -> None:
        self._student = student
        self._written = written
        self._config = config
        self._seed = seed
        self._max_steps = max_steps
        self._buffer: deque[Trajectory] = deque(maxlen=config.capacity)
        self._phi = config.init_threshold
        self._reference_nll: float | None = None

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """One completion for each prompt; replayed ones come with prompts of their own."""
        rng = random.Random(f"{self._seed} replay {step}")
        coin = rng.random()
        if coin >= self._phi:
            return self._written.collect(prompts, step)
        is_full = len(self._buffer) == self._config.capacity
        if coin < self._phi * (1 - step / self._max_steps) or not is_full:
            fresh = self._student.collect(prompts, step)
            # rows are for verifiers and samples, which look at fresh completions only
            self._buffer.extend(replace(trajectory, row={}) for trajectory in fresh)
            return fresh
        replayed = rng.choices(range(len(self._buffer)), k=len(prompts))
        if len(prompts) <= len(self._buffer):
            replayed = rng.sample(range(len(self._buffer)), k=len(prompts))
        return [self._buffer[i] for i in replayed]

    def observe(self, held_out_nll: float) -> None:
        """Raise phi if the held-out loss got worse by `loss_eps`."""
        if self._reference_nll is None:
            self._reference_nll = held_out_nll
        elif held_out_nll >= self._reference_nll + self._config.loss_eps:
            self._phi = min(1.0, self._phi + _THRESHOLD_STEP)
            self._reference_nll = held_out_nll

    def metrics(self) -> dict[str, float]:
        """phi, and how full the buffer is."""
        return {"replay/phi": self._phi, "replay/num_buffered": float(len(self._buffer))}

    def state_dict(self) -> dict[str, Any]:
        """The buffer, phi and the reference loss."""
        names = [field.name for field in fields(Trajectory) if field.name != "row"]
        return {
            "buffer": [{name: getattr(t, name) for name in names} for t in self._buffer],
            "phi": self._phi,
            "reference_nll": self._reference_nll,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The buffer, phi and the reference loss."""
        self._buffer.clear()
        self._buffer.extend(Trajectory(**values) for values in state["buffer"])
        self._phi = state["phi"]
        self._reference_nll = state["reference_nll"]
