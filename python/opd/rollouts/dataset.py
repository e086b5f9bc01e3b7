# SPDX-License-Identifier: Apache-2.0
"""Completions that are already written: the data's own, or the teacher's (SeqKD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from opd.batch import Prompt, Trajectory
from opd.rollouts.hf import HfRollouts, Sampling, end_token_ids
from opd.rollouts.protocol import Rollouts
from opd.schema import ConfigError


class DatasetConfig(Sampling):
    """Off-policy: the rows' completions, or with `seq_kd` what the teacher samples.

    Attributes:
        seq_kd: the teacher writes the completions; the sampling keys are its. One with another
            tokenizer writes in its own tokens, and the bytes are cut by the student's; then
            max_completion_length bounds both.
        max_completion_length: longer completions of the data are cut.

    Source: SeqKD, arXiv:1606.07947; the key is TRL's.
    """

    needs_evaluation: ClassVar[bool] = False
    tells_behaviour: ClassVar[bool] = False

    kind: Literal["dataset"] = "dataset"
    seq_kd: bool = False
    temperature: float = Field(1.0, gt=0)

    @property
    def needs_teacher(self) -> bool:
        """Only a teacher can write its completions."""
        return self.seq_kd

    @property
    def needs_completions(self) -> bool:
        """The rows must have them."""
        return not self.seq_kd

    @model_validator(mode="after")
    def _check_sampling_is_used(self) -> Self:
        for name, field in Sampling.model_fields.items():
            is_used = self.seq_kd or name == "max_completion_length"
            if not is_used and getattr(self, name) != field.default:
                raise ValueError(f"{name} means something only with seq_kd: true")
        return self

    def build(
        self, student: Any, teacher: Any, tokenizer: Any, *, translator: Any = None, **_: Any
    ) -> Rollouts:
        """The engine."""
        if self.seq_kd and translator is not None and not translator.has_one_vocabulary:
            return TranslatedRollouts(student, teacher, translator, self)
        if self.seq_kd:
            return HfRollouts(teacher, tokenizer, self, origin="teacher")
        return DatasetRollouts(self.max_completion_length)


class DatasetRollouts(Rollouts):
    """Every prompt with the completion of its row, cut to a number of tokens."""

    def __init__(self, max_completion_length: int) -> None:
        self.max_completion_length = max_completion_length

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """One trajectory for each prompt.

        Raises:
            ConfigError: a row has no completion.
        """
        return [self._complete(prompt, step) for prompt in prompts]

    def _complete(self, prompt: Prompt, step: int) -> Trajectory:
        if prompt.completion_ids is None or prompt.completion_mask is None:
            raise ConfigError(
                f"data: row {prompt.group_id + 1} has no completion, which these rollouts train on"
            )
        length = min(len(prompt.completion_ids), self.max_completion_length)
        nothing = torch.zeros(len(prompt.ids), dtype=torch.bool)
        return Trajectory(
            ids=torch.cat([prompt.ids, prompt.completion_ids[:length]]),
            prompt_length=len(prompt.ids),
            loss_mask=torch.cat([nothing, prompt.completion_mask[:length]]),
            origin="data",
            is_terminated=length == len(prompt.completion_ids),
            step=step,
            row=prompt.row,
            group_id=prompt.group_id,
        )


class TranslatedRollouts(Rollouts):
    """What a teacher with another tokenizer writes, in the student's tokens.

    Args:
        student, teacher: the models.
        translator: from the student's tokens to the teacher's.
        sampling: how the teacher draws.
    """

    def __init__(self, student: Any, teacher: Any, translator: Any, sampling: Sampling) -> None:
        self._translator = translator
        self._limit = sampling.max_completion_length
        self._writing = HfRollouts(teacher, translator.teacher, sampling, origin="teacher")
        ends = end_token_ids(teacher.model, translator.teacher)
        self._back = translator.reversed(end_ids=ends, max_positions=student.max_positions)

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """`num_generations` completions for each prompt."""
        rendered = [
            replace(prompt, ids=torch.tensor(self._translator.prompt(prompt.row)))
            for prompt in prompts
        ]
        written = self._writing.collect(rendered, step)
        sides = self._back(written).trajectories
        return [self._cut(*pair) for pair in zip(sides, written, strict=True)]

    def _cut(self, side: Trajectory, written: Trajectory) -> Trajectory:
        length = side.prompt_length + self._limit
        return replace(
            side,
            ids=side.ids[:length],
            loss_mask=side.loss_mask[:length],
            is_terminated=side.is_terminated and len(side.ids) <= length,
            tokens_read={"teacher": len(written.ids)},
        )
