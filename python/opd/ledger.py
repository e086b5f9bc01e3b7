# SPDX-License-Identifier: Apache-2.0
"""What a run has spent: tokens by role, seconds by phase, floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from opd.batch import Batch, Trajectory


@dataclass(slots=True)
class Ledger:
    """Totals since step 0, resumed runs included; evaluation is not in them.

    Attributes:
        student_tokens_sampled: completion tokens that the student wrote.
        student_tokens_forward: tokens that the student read in training passes, prompts included.
        student_tokens_trained: tokens that carried loss.
        teacher_tokens_sampled: completion tokens that the teacher wrote (SeqKD, speculation).
        teacher_tokens_forward: tokens that the teacher read to judge.
        flops: 2 per weight and token read or written, 6 per weight and token trained on; what an
            objective trains of its own works on the trained tokens alone.
        cost_units: flops over those of the student reading one token, 2 per weight.
        seconds: by phase.
    """

    student_tokens_sampled: int = 0
    student_tokens_forward: int = 0
    student_tokens_trained: int = 0
    teacher_tokens_sampled: int = 0
    teacher_tokens_forward: int = 0
    flops: float = 0.0
    cost_units: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def record(
        self,
        trajectories: Sequence[Trajectory],
        batches: Sequence[Batch],
        *,
        step: int,
        student_size: int,
        teacher_size: int,
        teacher_judges: bool,
        objective_size: int = 0,
    ) -> None:
        """Add one optimizer step.

        Args:
            trajectories: of the step; those sampled at an earlier one cost nothing to get.
            batches: what was trained on.
            step: the optimizer step.
            student_size, teacher_size: number of weights; 0 for no teacher.
            teacher_judges: the objective asked the teacher for its law.
            objective_size: number of weights that the objective trains of its own.
        """
        written = {"student": 0, "teacher": 0}
        flops = 0.0
        for trajectory in trajectories:
            if trajectory.origin == "data" or trajectory.step != step:
                continue
            read = trajectory.tokens_read or {trajectory.origin: len(trajectory.ids)}
            for writer, size in (("student", student_size), ("teacher", teacher_size)):
                written[writer] += trajectory.num_written(writer)
                flops += 2.0 * size * read.get(writer, 0)
        num_read = sum(batch.num_input_tokens for batch in batches)
        num_trained = sum(batch.num_tokens for batch in batches)
        flops += 6.0 * (student_size * num_read + objective_size * num_trained)
        self.student_tokens_sampled += written["student"]
        self.teacher_tokens_sampled += written["teacher"]
        self.student_tokens_forward += num_read
        self.student_tokens_trained += num_trained
        if teacher_judges:
            num_judged = sum(batch.for_teacher.num_input_tokens for batch in batches)
            self.teacher_tokens_forward += num_judged
            flops += 2.0 * teacher_size * num_judged
        self.flops += flops
        self.cost_units += flops / (2.0 * student_size)

    def add_seconds(self, seconds: dict[str, float]) -> None:
        """Add time by phase."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def metrics(self) -> dict[str, float]:
        """The totals under the names they are logged with."""
        values = {f"ledger/{k}": v for k, v in asdict(self).items() if k != "seconds"}
        return {"num_tokens": self.student_tokens_forward, **values}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
