# SPDX-License-Identifier: Apache-2.0
"""Completions that a student and a teacher write together, token by token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd.batch import WRITERS, Prompt, Trajectory
from opd.rollouts.cached_reader import reading, right_padded
from opd.rollouts.hf import Sampling, end_token_ids
from opd.rollouts.protocol import Rollouts
from opd.rollouts.writer import Writer, judge, refuse_broken

STUDENT, TEACHER = WRITERS.index("student"), WRITERS.index("teacher")


@dataclass(slots=True, kw_only=True)
class Writing:
    """A completion on its way. `random` depends on the run's seed, the step and the row alone."""

    prompt: Prompt
    random: torch.Generator
    ids: list[int] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    student_logprobs: list[float] = field(default_factory=list)
    teacher_logprobs: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    is_terminated: bool = False
    tokens_read: dict[str, int] = field(default_factory=lambda: {"student": 0, "teacher": 0})

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.ids)

    def uniforms(self, count: int) -> Tensor:
        """[count] float64 in [0, 1), new ones at each call."""
        return torch.rand(count, generator=self.random, dtype=torch.float64)

    def add(self, token: int, writer: int, student_logprob: float, teacher_logprob: float) -> None:
        """The next token, who wrote it, and what both think of it (NaN: not asked)."""
        self.ids.append(token)
        self.writers.append(writer)
        self.student_logprobs.append(student_logprob)
        self.teacher_logprobs.append(teacher_logprob)

    def sequence(self) -> Tensor:
        """[len(self)] int64."""
        return torch.cat([self.prompt.ids, torch.tensor(self.ids, dtype=torch.int64)])

    def trajectory(
        self, step: int, behaviour: Tensor | None, tells: Sequence[str] = WRITERS[1:]
    ) -> Trajectory:
        """Of this completion.

        Args:
            step: the optimizer step.
            behaviour: [completion length], or None where no model's law is that of the tokens.
            tells: whose log-probabilities are known of each token.
        """
        prompt_length = len(self.prompt.ids)

        def behind_prompt(values: Tensor) -> Tensor:
            return torch.cat([values.new_zeros(prompt_length), values])

        logprobs = {
            name: behind_prompt(torch.tensor(getattr(self, name)))
            for name in (f"{writer}_logprobs" for writer in tells)
        }
        return Trajectory(
            ids=self.sequence(),
            prompt_length=prompt_length,
            loss_mask=behind_prompt(torch.ones(len(self.ids), dtype=torch.bool)),
            behaviour_logprobs=None if behaviour is None else behind_prompt(behaviour),
            origin="mixed",
            token_origin=behind_prompt(torch.tensor(self.writers, dtype=torch.uint8)),
            tokens_read=self.tokens_read,
            is_terminated=self.is_terminated,
            step=step,
            row=self.prompt.row,
            group_id=self.prompt.group_id,
            **logprobs,
        )


class Desk:
    """Completions that are written together: their tokens, and a reader for each model at work.

    Args:
        writings: what is to be written.
        limit: of completion tokens.
        num_spare: columns of `tokens` beyond that, for drafts that are not kept.
        writers: by the names that `tokens_read` has.
    """

    def __init__(
        self, writings: Sequence[Writing], *, limit: int, num_spare: int = 0, **writers: Writer
    ) -> None:
        self.writings = list(writings)
        self.readers = {name: writer.reader(len(writings)) for name, writer in writers.items()}
        self.limit = limit
        self.ends = torch.tensor([len(writing) for writing in writings])
        (self.device,) = {writer.model.device for writer in writers.values()}
        longest = max(len(writing.prompt.ids) for writing in writings)
        sequences = [writing.sequence() for writing in writings]
        self.tokens = right_padded(sequences, longest + limit + num_spare, self.device)

    def read(self, name: str) -> Tensor:
        """[B, D], the hidden states of a model that its next tokens are drawn from."""
        return self.readers[name].read(self.tokens, self.ends)[:, 0]

    def uniforms(self, count: int) -> Tensor:
        """[B, count] float64, each row from its own generator."""
        return torch.stack([writing.uniforms(count) for writing in self.writings]).to(self.device)

    def put(self, token_ids: Tensor, offset: Tensor | int = 0) -> None:
        """Tokens [B] that many places behind the ends; broken ones, -1, as 0."""
        places = (self.ends + offset).to(self.device)
        self.tokens.scatter_(1, places[:, None], token_ids.clamp_min(0)[:, None].long())

    def go_on(self, counts: Sequence[int], alive: Sequence[bool]) -> None:
        """Each row has got `counts[b]` tokens more; those not alive leave."""
        self.ends = self.ends + torch.tensor(counts)
        rows = torch.tensor(alive).nonzero().flatten()
        if len(rows) == len(self.writings):
            return
        for name, reader in self.readers.items():
            for writing, is_alive, count in zip(
                self.writings, alive, reader.num_read.tolist(), strict=True
            ):
                writing.tokens_read[name] += 0 if is_alive else count
            reader.keep_rows(rows)
        self.writings = [self.writings[row] for row in rows.tolist()]
        self.ends, self.tokens = self.ends[rows], self.tokens[rows.to(self.device)]


class PairRollouts(Rollouts):
    """What engines share in which both models write. One writes `write` and `behaviour`.

    A completion ends with an end token of either model.
    """

    def __init__(
        self, student: Writer, teacher: Writer, tokenizer: Any, sampling: Sampling, *, seed: int
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.sampling = sampling
        # whose log-probabilities a trajectory has
        self.tells: Sequence[str] = WRITERS[1:]
        self.end_ids = {
            token
            for writer in (student, teacher)
            for token in end_token_ids(writer.model.model, tokenizer)
        }
        self._seed = seed
        self._metrics: dict[str, float] = {}

    def write(self, writings: Sequence[Writing]) -> None:
        """Write some completions to their ends."""
        raise NotImplementedError

    def behaviour(self, writing: Writing) -> Tensor | None:
        """[completion length] float32: each token's log-probability under the law it came from.

        None where that law is not known, or nothing was drawn.
        """
        raise NotImplementedError

    @torch.no_grad()
    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """`num_generations` completions for each prompt, next to each other.

        Raises:
            FloatingPointError: a model's logits are not finite.
        """
        repeated = [prompt for prompt in prompts for _ in range(self.sampling.num_generations)]
        writings = [
            Writing(prompt=prompt, random=self._generator(step, number))
            for number, prompt in enumerate(repeated)
        ]
        size = self.sampling.generation_batch_size or max(1, len(writings))
        with reading(self.student.model, self.teacher.model):
            for start in range(0, len(writings), size):
                chunk = writings[start : start + size]
                self.write(chunk)
                if "student" in self.tells:
                    self._ask_student(chunk)
        num_tokens = sum(len(writing.ids) for writing in writings)
        num_taught = sum(writing.writers.count(TEACHER) for writing in writings)
        self._metrics = {"speculative/teacher_token_share": num_taught / max(1, num_tokens)}
        return [
            writing.trajectory(step, self.behaviour(writing), self.tells) for writing in writings
        ]

    def metrics(self) -> dict[str, float]:
        """Of the last `collect`."""
        return self._metrics

    def finish(self, writing: Writing) -> bool:
        """Whether the last token was its last; notes an end token."""
        writing.is_terminated = writing.ids[-1] in self.end_ids
        return writing.is_terminated or len(writing.ids) >= self.sampling.max_completion_length

    def _generator(self, step: int, number: int) -> torch.Generator:
        seed = random.Random(f"{self._seed} writing {step} {number}").getrandbits(63)
        return torch.Generator().manual_seed(seed)

    def _ask_student(self, writings: Sequence[Writing]) -> None:
        """What the student thinks of the tokens that it did not draft, all in one pass."""
        asked = [
            (row, place)
            for row, writing in enumerate(writings)
            for place, logprob in enumerate(writing.student_logprobs)
            if logprob != logprob
        ]
        if not asked:
            return
        model = self.student.model
        ends = torch.tensor([len(writing) for writing in writings])
        tokens = right_padded(
            [writing.sequence() for writing in writings], int(ends.max()), model.device
        )
        positions = torch.arange(tokens.shape[1])
        mask = (positions < ends[:, None]).long().to(model.device)
        states = model.states(tokens, mask, positions.to(model.device) * mask)
        rows = torch.tensor([row for row, _ in asked])
        # the state of the token before predicts it
        before = torch.tensor([len(writings[r].prompt.ids) + place - 1 for r, place in asked])
        hidden = states[rows, before].to(model.lm_head_weight.dtype)
        told = judge(self.student, hidden, tokens[rows, before + 1])
        refuse_broken(bool(told.isnan().any()), self.student)
        for (row, place), logprob in zip(asked, told.tolist(), strict=True):
            writings[row].student_logprobs[place] = logprob
        for writing in {id(writings[row]): writings[row] for row, _ in asked}.values():
            writing.tokens_read["student"] += len(writing)
