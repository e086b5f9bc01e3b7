# SPDX-License-Identifier: Apache-2.0
"""GKD's mixture: a coin per step decides between the student's completions and written ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from opd.batch import Prompt, Trajectory
from opd.rollouts.dataset import DatasetRollouts
from opd.rollouts.hf import HfRollouts, Sampling
from opd.rollouts.protocol import Rollouts
from opd.rollouts.speculative import SpeculativeConfig
from opd.rollouts.teacher_mixed import TeacherMixedConfig

_LAW = ("temperature", "top_k", "top_p")
# what is one for both sides of a mixture
_SHARED = ("max_completion_length", "num_generations", "generation_batch_size")


class MixtureConfig(Sampling):
    """With probability `lmbda` the student writes the step's completions, else they are written.

    Attributes:
        lmbda: probability of student completions. 0 is off-policy, 1 on-policy.
        seq_kd: the written ones are sampled from the teacher instead of read from the data.
        on_policy: who writes in the student's place: rollouts of kind `speculative` or
            `teacher_mixed`, with sampling keys of their own. Default: the student alone.

    Source: GKD, arXiv:2306.13649, algorithm 1; the keys are TRL's.
    """

    needs_evaluation: ClassVar[bool] = False
    tells_behaviour: ClassVar[bool] = False

    kind: Literal["mixture"] = "mixture"
    lmbda: float = Field(0.5, ge=0, le=1)
    seq_kd: bool = False
    temperature: float = Field(0.9, gt=0)
    on_policy: (
        Annotated[SpeculativeConfig | TeacherMixedConfig, Field(discriminator="kind")] | None
    ) = None

    @model_validator(mode="after")
    def _check_keys_are_used(self) -> Self:
        is_unused = self.on_policy is not None and not self.seq_kd
        for key in _LAW if is_unused else ():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default:
                raise ValueError(
                    f"{key}: means nothing beside on_policy without seq_kd, as nobody samples by "
                    f"it; say on_policy.{key}, and leave {key} out or at {default}"
                )
        return self

    @model_validator(mode="after")
    def _check_shared_keys(self) -> Self:
        if self.on_policy is None:
            return self
        shared = {key: getattr(self, key) for key in _SHARED}
        for key, value in shared.items():
            own = getattr(self.on_policy, key)
            if key in self.on_policy.model_fields_set and own != value:
                raise ValueError(
                    f"on_policy.{key}: must equal rollouts.{key}, {value}, which all steps share, "
                    f"got {own}; leave it out"
                )
        # said here, so that the resolved configuration reads back as it is
        object.__setattr__(self, "on_policy", self.on_policy.model_copy(update=shared))
        return self

    @property
    def needs_teacher(self) -> bool:
        """Only a teacher can write its completions."""
        return (self.seq_kd and self.lmbda < 1) or self.on_policy is not None

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
        if self.on_policy is None:
            own: Rollouts = HfRollouts(student, tokenizer, self)
        else:
            own = self.on_policy.build(student, teacher, tokenizer, seed=seed)
        return MixtureRollouts(
            own,
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
        self._last = written

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """`num_generations` completions for each prompt; a written one is repeated."""
        coin = random.Random(f"{self._seed} mixture {step}").random()
        self._last = self._student if coin < self._lmbda else self._written
        if self._last is self._student:
            return self._student.collect(prompts, step)
        return self._written.collect(
            [prompt for prompt in prompts for _ in range(self._num_generations)], step
        )

    def metrics(self) -> dict[str, float]:
        """Of who wrote the last step."""
        return self._last.metrics()
