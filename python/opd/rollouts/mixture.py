# SPDX-License-Identifier: Apache-2.0
"""GKD's mixture: a coin per step decides between the student's completions and written ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from opd.batch import Prompt, Trajectory
from opd.rollouts.dataset import DatasetRollouts
from opd.rollouts.hf import HfRollouts, Sampling
from opd.rollouts.protocol import Rollouts


class MixtureConfig(Sampling):
    """With probability `lmbda` the student writes the step's completions, else they are written.

    Attributes:
        lmbda: probability of student completions. 0 is off-policy, 1 on-policy.
        seq_kd: the written ones are sampled from the teacher instead of read from the data.

    Source: GKD, arXiv:2306.13649, algorithm 1; the keys are TRL's.
    """

    needs_evaluation: ClassVar[bool] = False
    tells_behaviour: ClassVar[bool] = False

    kind: Literal["mixture"] = "mixture"
    lmbda: float = Field(0.5, ge=0, le=1)
    seq_kd: bool = False
    temperature: float = Field(0.9, gt=0)

    @property
    def needs_teacher(self) -> bool:
        """Only a teacher can write its completions."""
        return self.seq_kd and self.lmbda < 1

    @property
    def needs_completions(self) -> bool:
        """The rows must have them."""
        return not self.seq_kd and self.lmbda < 1

    def build(
        self, student: Any, teacher: Any, tokenizer: Any, *, seed: int, **_: Any
    ) -> MixtureRollouts:
        """The engine."""
        written: Rollouts = (
            HfRollouts(teacher, tokenizer, self, origin="teacher")
            if self.seq_kd
            else DatasetRollouts(self.max_completion_length)
        )
        return MixtureRollouts(
            HfRollouts(student, tokenizer, self),
            written,
            lmbda=self.lmbda,
            num_generations=1 if self.seq_kd else self.num_generations,
            seed=seed,
        )


class MixtureRollouts(Rollouts):
    """One coin per step, drawn from the seed and the step, so that every process sees the same."""

    def __init__(
        self, student: Rollouts, written: Rollouts, *, lmbda: float, num_generations: int, seed: int
    ) -> None:
        self._student = student
        self._written = written
        self._lmbda = lmbda
        self._num_generations = num_generations
        self._seed = seed

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """`num_generations` completions for each prompt; a written one is repeated."""
        if random.Random(f"{self._seed} mixture {step}").random() < self._lmbda:
            return self._student.collect(prompts, step)
        return self._written.collect(
            [prompt for prompt in prompts for _ in range(self._num_generations)], step
        )
