# SPDX-License-Identifier: Apache-2.0
"""A student as its own teacher, through all that lies between the two: there is nothing to learn.

Every divergence is least where both laws are one: it is 0 there, or its gradient is. A path that
shifts rows, loses a token's role or pairs the wrong ids shows there, before anything was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Head, Law, Trajectory, collate_step
from opd.objectives import Parts
from opd.translation import Translator

# of the likelihood's gradient, by the dtype of the student
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# weights of terms that do not vanish: on the labels, and between different positions
_OTHER_TERMS = ("ce_weight", "cross_entropy_weight", "log_weight", "sinkhorn_weight")
_MOST_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """loss in nats; gradient: its norm by the hidden states over that of the likelihood's."""

    name: str
    loss: str
    gradient: str
    verdict: str
    is_wrong: bool = False


def probe(
    config: Any,
    tokenizer: Any,
    student: Any,
    trajectories: Sequence[Trajectory],
    student_bytes: opk.TokenBytes | None,
) -> Iterator[Probe]:
    """The objective's loss and gradient with the student as the teacher: in its own tokens, and, if
    it crosses tokenizers, in the same tokens under other numbers.

    Args:
        config: of the run.
        tokenizer: the student's.
        student: in eval mode.
        trajectories: what to look at.
        student_bytes: of the student's tokens, for objectives that cross.
    """
    size = student.vocab_size or student.lm_head_weight.shape[0]
    section, dropped = _of_the_teacher_alone(config.objective, size)
    crosses = section.crosses_tokenizers and student_bytes is not None
    twins: list[tuple[str, Any, Translator | None]] = []
    own = None
    if crosses:
        own = Translator(
            tokenizer,
            tokenizer,
            student_bytes=student_bytes,
            teacher_bytes=student_bytes,
            add_special_tokens=config.task is None,
        )
    twins.append(("the same tokens", _Twin(student), own))
    if crosses:
        rows = student.lm_head_weight.shape[0]
        numbers = renumbering(student_bytes, rows, vocab_size=size)
        twins.append(
            (
                "the same tokens, renumbered",
                _Twin(student, numbers),
                _Renumbered(own, numbers),
            )
        )
    for name, twin, translator in twins:
        parts = Parts(
            student=student,
            teacher=twin,
            student_bytes=translator and translator.student_bytes,
            teacher_bytes=translator and translator.teacher_bytes,
        )
        bound = section.bind(parts)
        if getattr(bound, "module", None) is not None:
            verdict = "not probed: it trains weights of its own"
            yield Probe(name=name, loss="", gradient="", verdict=verdict)
            continue
        loss, gradient = _run(bound, student, twin, translator, trajectories, tokenizer)
        tolerance = _TOLERANCE.get(student.lm_head_weight.dtype, 1e-3)
        # an absolute value has, at 0, a gradient of rounding alone
        is_wrong = not (gradient <= tolerance or abs(loss) <= 0.1 * tolerance)
        is_noise = section.asks == "samples"
        verdict = "as it should be" if not is_wrong else "does not vanish"
        if is_noise:
            verdict, is_wrong = "zero on average only: it draws", False
        elif is_wrong and getattr(section, "teacher_top_k", size) < size:
            verdict, is_wrong = (
                f"not zero, it reads {section.teacher_top_k} of {size} tokens",
                False,
            )
        elif dropped and not is_wrong:
            verdict += f", without {', '.join(dropped)}"
        yield Probe(
            name=name,
            loss=f"{loss:.3g}",
            gradient=f"{gradient:.2g}",
            verdict=verdict,
            is_wrong=is_wrong,
        )


def _of_the_teacher_alone(section: Any, size: int) -> tuple[Any, list[str]]:
    """The objective with all tokens of the teacher's law, at the temperature of the student's, and
    without terms that do not vanish where both laws are one; and the names of such terms."""
    dropped = [name for name in _OTHER_TERMS if getattr(section, name, 0)]
    changes: dict[str, Any] = dict.fromkeys(dropped, 0.0)
    if hasattr(section, "teacher_top_k"):
        changes["teacher_top_k"] = min(size, _MOST_TOKENS)
    if hasattr(section, "teacher_temperature"):
        changes["teacher_temperature"] = None
    return section.model_copy(update=changes), dropped


def _run(
    objective: Any,
    student: Any,
    twin: _Twin,
    translator: Translator | None,
    trajectories: Sequence[Trajectory],
    tokenizer: Any,
) -> tuple[float, float]:
    (batch,), count = collate_step(
        trajectories,
        batch_size=len(trajectories),
        pad_id=tokenizer.pad_token_id,
        device=student.device,
        translated=translator and translator(trajectories),
    )
    with torch.no_grad():
        hidden = student.hidden(batch)
    leaf = hidden.detach().requires_grad_()
    weight = student.head.weight.detach()
    law = Law(
        lambda: leaf,
        replace(student.head, weight=weight),
        vocab_size=student.vocab_size,
        workspace_bytes=student.workspace_bytes,
    )
    taught = twin.law(batch.for_teacher)
    objective.ask(taught, batch)
    loss = objective(law, taught, batch, max(1, count)).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    likelihood = -law.token_logprobs(batch.token_ids).logprobs.sum() / max(1, count)
    (scale,) = torch.autograd.grad(likelihood, leaf)
    norm = torch.linalg.vector_norm
    return float(loss.detach()), float(norm(gradient.float()) / norm(scale.float()))


class _Twin:
    """The student in the teacher's place; with `numbers`, token i of the student is numbers[i]."""

    name = "teacher"
    judges_any_state: ClassVar[bool] = True

    def __init__(self, student: Any, numbers: Tensor | None = None) -> None:
        self.model = student.model
        self.vocab_size = student.vocab_size
        self._student = student
        self._own = None if numbers is None else numbers.argsort().to(student.device)

    @property
    def head(self) -> Head:
        """Rows in the order of the numbers."""
        head = self._student.head
        bias = head.bias
        if self._own is None:
            bias = None if bias is None else bias.detach()
            return replace(head, weight=head.weight.detach(), bias=bias)
        bias = None if bias is None else bias.detach()[self._own]
        return replace(head, weight=head.weight.detach()[self._own], bias=bias)

    def law(self, batch: Batch) -> Law:
        """As a teacher's."""
        if self._own is not None:
            batch = replace(batch, input_ids=self._own[batch.input_ids])
        with torch.no_grad():
            hidden = self._student.hidden(batch)
        return Law(
            lambda: hidden,
            self.head,
            vocab_size=self.vocab_size,
            workspace_bytes=self._student.workspace_bytes,
        )


class _Renumbered(Translator):
    """Into the same tokens under other numbers; the chunks are found as for any other pair."""

    def __init__(self, own: Translator, numbers: Tensor) -> None:
        student_bytes = own.student_bytes
        words = [b""] * len(student_bytes)
        for i, number in enumerate(numbers[: len(words)].tolist()):
            words[number] = student_bytes[i]
        roles = {
            role: tuple(int(numbers[i]) for i in ids) for role, ids in student_bytes.roles.items()
        }
        super().__init__(
            own.student,
            own.student,
            student_bytes=student_bytes,
            teacher_bytes=opk.TokenBytes.from_bytes(words, roles=roles),
            add_special_tokens=own.add_special_tokens,
        )
        self._numbers = numbers

    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        """Renumbered."""
        return self._numbers[torch.tensor(super().prompt(row))].tolist()

    def encode(self, texts: Sequence[Tensor], chats: Sequence[bool]) -> list[Tensor]:
        """Renumbered."""
        return [self._numbers[ids] for ids in texts]

    def _end(self, trajectory: Trajectory, ids: Tensor) -> int | None:
        is_end = len(ids) > 0 and int(ids[-1]) in self._ends
        return int(self._numbers[ids[-1]]) if is_end else None


def renumbering(
    token_bytes: opk.TokenBytes, num_rows: int, *, vocab_size: int | None = None
) -> Tensor:
    """[num_rows] int64, a permutation of the tokens that have bytes, below `vocab_size`; of tokens
    with the same bytes the order stays, for the first of them stands for all."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(num_rows)
    size = min(len(token_bytes), num_rows if vocab_size is None else vocab_size)
    numbers[:size] = torch.randperm(size, generator=generator)
    same: dict[bytes, list[int]] = {}
    for i in range(size):
        same.setdefault(token_bytes[i], []).append(i)
    for group in same.values():
        if len(group) > 1:
            numbers[group] = numbers[group].sort().values
    return numbers
