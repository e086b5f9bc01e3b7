# SPDX-License-Identifier: Apache-2.0
"""The student drafts a few tokens, the teacher verifies them in one pass, and so on to the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from opd.batch import Prompt, Trajectory
from opd.metrics import Clock
from opd.rollouts.cached_reader import CachedReader
from opd.rollouts.hf import Sampling
from opd.rollouts.writer import draw, make_writer, refuse_broken, verify
from opd.rollouts.writing import STUDENT, TEACHER, Desk, PairRollouts, Writing

# what each mode alone reads
_OWN = {"topk": ("num_topk",), "threshold": ("threshold", "window")}
_LAWS = ("temperature", "top_k", "top_p")
# modes in which the token after a whole accepted draft is the teacher's too
_WITH_BONUS = ("rejection", "block", "greedy")
_OF_THE_TEACHERS_LAW = ("rejection", "block")


class SpeculativeConfig(Sampling):
    """Completions that the student drafts and the teacher verifies.

    `rejection`, `block`: the teacher's law, token for token, at fewer passes of the teacher.
    `greedy`: the teacher's likeliest tokens. `topk` (SKD): a draft stays while it is among the
    teacher's `num_topk` likeliest, else a draw from the teacher is in its place, and drafting goes
    on. `threshold` (AdaSwitch): from the first place where KL(teacher || student) exceeds
    `threshold` times the mean of the `window` places before, once there are so many, the teacher
    writes the rest.

    Attributes:
        mode: as above.
        num_draft: tokens drafted before the teacher looks.
        num_topk: of `topk`. The vocabulary's size: on-policy; 0: the teacher samples.
        threshold: of `threshold`. .inf never switches, 0 at token window + 1.
        window: of `threshold`.
        temperature, top_k, top_p: of the student's draws.
        teacher_temperature, teacher_top_k, teacher_top_p: of the teacher's. Default: the student's.
        student_logprobs: trajectories have the student's log-probabilities of all tokens, for one
            more pass of the student over each completion with tokens that it was not asked about.
            In `topk` there are none, and they always have them.

    Source: arXiv:2211.17192 and 2302.01318 (rejection), 2403.10444 (block), SKD, 2410.11325,
    whose settings are num_topk 25, num_draft 5, student 0.5/0.5 and teacher 0.2/0.5 of
    temperature/top_p; AdaSwitch, 2510.07842.
    """

    needs_teacher: ClassVar[bool] = True
    needs_completions: ClassVar[bool] = False
    needs_evaluation: ClassVar[bool] = False

    kind: Literal["speculative"] = "speculative"
    mode: Literal["rejection", "block", "topk", "threshold", "greedy"] = "rejection"
    num_draft: int = Field(5, ge=1, le=64)
    num_topk: int = Field(25, ge=0)
    threshold: float = Field(2.0, ge=0, allow_inf_nan=True)
    window: int = Field(8, ge=1)
    temperature: float = Field(1.0, gt=0)
    teacher_temperature: float | None = Field(None, gt=0)
    teacher_top_k: int | None = Field(None, ge=0)
    teacher_top_p: float | None = Field(None, gt=0, le=1)
    student_logprobs: bool = False

    @property
    def tells_behaviour(self) -> bool:
        """Not in `topk`: whether a draft stays depends on it, so those that stay have a law of
        their own, which is neither model's. Nor in `greedy`, where nothing is drawn."""
        return self.mode in ("rejection", "block", "threshold")

    @property
    def temperature_key(self) -> str:
        """Completions of the teacher's law have its temperature, if it has one of its own."""
        is_teachers = self.mode in _OF_THE_TEACHERS_LAW and self.teacher_temperature is not None
        return "teacher_temperature" if is_teachers else "temperature"

    @model_validator(mode="after")
    def _check_keys_are_used(self) -> Self:
        others = [key for mode, keys in _OWN.items() if mode != self.mode for key in keys]
        if self.mode == "greedy":
            others += [*_LAWS, *(f"teacher_{key}" for key in _LAWS), "student_logprobs"]
        for key in others:
            default = type(self).model_fields[key].default
            if getattr(self, key) != default:
                # an override cannot take a recipe's key out, but can give it its default
                said = "null" if default is None else default
                raise ValueError(
                    f"{key} means nothing in mode {self.mode!r}; leave it out, or override what "
                    f"a recipe says with its default, {key}={said}"
                )
        return self

    def build(
        self, student: Any, teacher: Any, tokenizer: Any, *, seed: int, **_: Any
    ) -> SpeculativeRollouts:
        """The engine."""
        return SpeculativeRollouts(student, teacher, tokenizer, self, seed=seed)


class SpeculativeRollouts(PairRollouts):
    """Rounds of drafting and verifying over a batch whose rows accept different numbers of tokens.

    A round is G passes of the student over one token and one of the teacher over G + 1. Each row
    then keeps its own accepted tokens in both caches (`CachedReader`), and leaves when it ends.
    """

    def __init__(
        self, student: Any, teacher: Any, tokenizer: Any, config: SpeculativeConfig, *, seed: int
    ) -> None:
        ours = {key: getattr(config, key) for key in _LAWS}
        theirs = {key: getattr(config, f"teacher_{key}") for key in _LAWS}
        super().__init__(
            make_writer(student, **ours),
            make_writer(teacher, **{k: ours[k] if v is None else v for k, v in theirs.items()}),
            tokenizer,
            config,
            seed=seed,
        )
        self.config = config
        self.is_greedy = config.mode == "greedy"
        if self.is_greedy:
            self.tells = ()
        elif config.mode != "topk" and not config.student_logprobs:
            self.tells = ("teacher",)
        self._has_bonus = config.mode in _WITH_BONUS
        self._clock = Clock(student.device)
        self._counts = _Counts()

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """`num_generations` completions for each prompt, next to each other.

        Raises:
            FloatingPointError: a model's logits are not finite.
        """
        self._counts = _Counts()
        self._clock.flush()
        trajectories = super().collect(prompts, step)
        self._metrics |= self._counts.metrics(self._clock.flush())
        return trajectories

    def behaviour(self, writing: Writing) -> Tensor | None:
        """The teacher's law in `rejection` and `block`, in `threshold` that of who wrote the token.

        None in the modes without one, see `SpeculativeConfig.tells_behaviour`.
        """
        if not self.config.tells_behaviour:
            return None
        taught = torch.tensor(writing.teacher_logprobs)
        if self.config.mode in _OF_THE_TEACHERS_LAW:
            return taught
        by_teacher = torch.tensor(writing.writers) == TEACHER
        return torch.where(by_teacher, taught, torch.tensor(writing.student_logprobs))

    def write(self, writings: Sequence[Writing]) -> None:
        """Rounds until every completion has ended, or is the teacher's to end."""
        desk = Desk(
            writings,
            limit=self.config.max_completion_length,
            num_spare=self.config.num_draft + 1,
            student=self.student,
            teacher=self.teacher,
        )
        switched: list[Writing] = []
        readers: list[CachedReader] = []
        while desk.writings:
            with self._clock("draft"):
                draft = self._draft(desk)
            with self._clock("verify"):
                told = self._verify(desk, draft)
            some, reader = self._take(desk, draft, told)
            if some:
                switched += some
                readers.append(reader)
        if switched:
            before = sum(len(writing.ids) for writing in switched)
            with self._clock("teach"):
                self._let_teacher_write(switched, readers)
            self._counts.num_taught += sum(len(writing.ids) for writing in switched) - before

    def _draft(self, desk: Desk) -> _Draft:
        """Up to `num_draft` tokens of the student for each row, no more than it has room for."""
        room = torch.tensor([desk.limit - len(writing.ids) for writing in desk.writings])
        # of a row's last token the teacher has the say where it adds one to every draft
        budget = (room - int(self._has_bonus)).clamp_max(self.config.num_draft)
        length = int(budget.max())
        # as many for each row and round, so that nothing depends on the rows beside it
        uniforms = None
        if not self.is_greedy:
            uniforms = desk.uniforms(2 * self.config.num_draft + 1)
        drafted, states = [], []
        for place in range(length):
            # rows without room go on as well: nothing of theirs is at a place beyond the limit, and
            # what they draft does not count
            owned = desk.ends + budget.clamp_max(place)
            reader = desk.readers["student"]
            states.append(reader.read(desk.tokens, desk.ends + place, owned=owned)[:, 0])
            coins = None if uniforms is None else uniforms[:, place]
            ids, _ = draw(self.student, states[-1], coins, is_greedy=self.is_greedy)
            desk.put(ids, place)
            drafted.append(ids)
        head, rows = self.student.model.lm_head_weight, len(desk.writings)
        ids = torch.stack(drafted, dim=1) if drafted else desk.tokens.new_empty(rows, 0)
        return _Draft(
            ids=ids,
            states=torch.stack(states, dim=1) if states else head.new_empty(rows, 0, head.shape[1]),
            budget=budget,
            num_real=self._num_real(ids, budget),
            uniforms=uniforms,
        )

    def _num_real(self, ids: Tensor, budget: Tensor) -> Tensor:
        """[B] on the device: drafts up to the row's room or its first end token."""
        is_end = torch.isin(ids, torch.tensor(sorted(self.end_ids), device=ids.device))
        is_behind_end = (is_end.cumsum(1) - is_end.long()) > 0
        return torch.minimum((~is_behind_end).sum(1), budget.to(ids.device))

    def _verify(self, desk: Desk, draft: _Draft) -> _Told:
        """The teacher's pass over the last token and the drafts, and the verdict on the CPU."""
        length = draft.ids.shape[1]
        reader = desk.readers["teacher"]
        states = reader.read(desk.tokens, desk.ends + draft.budget, length + 1)
        # right-aligned so far, and drafts are counted from the left
        places = (torch.arange(length + 1) + (length - draft.budget)[:, None]).clamp_max(length)
        places = places.to(states.device)[..., None].expand_as(states)
        uniforms = None
        if draft.uniforms is not None:
            coins = draft.uniforms[:, self.config.num_draft :]
            uniforms = torch.cat([coins[:, :length], coins[:, -1:]], dim=1)
        own = {key: getattr(self.config, key) for key in _OWN.get(self.config.mode, ())}
        if "window" in own:
            del own["window"]
            own["history"] = self._history(desk)
        told = verify(
            self.student,
            self.teacher,
            draft.ids.clamp_min(0),
            # where nothing is drawn, nobody asks for the student's law
            None if self.is_greedy else draft.states,
            states.gather(1, places),
            uniforms,
            mode=self.config.mode,
            num_draft=draft.num_real,
            **own,
        )
        desk.put(told.next_token, told.num_accepted.cpu())
        # beyond its drafts a row near the length limit has anything
        is_draft = torch.arange(length, device=draft.ids.device) < draft.num_real[:, None]
        is_broken = ((draft.ids < 0) & is_draft).any() | (told.next_token < 0).any()
        refuse_broken(bool(is_broken), self.student, self.teacher)
        return _Told(
            ids=draft.ids.tolist(),
            num_real=draft.num_real.tolist(),
            num_accepted=told.num_accepted.tolist(),
            next_token=told.next_token.tolist(),
            student_logprobs=told.student_logprobs.tolist(),
            teacher_logprobs=told.teacher_logprobs.tolist(),
            divergence=told.divergence.tolist() if "history" in own else None,
        )

    def _take(
        self, desk: Desk, draft: _Draft, told: _Told
    ) -> tuple[list[Writing], CachedReader | None]:
        """Give each row its tokens. Returns the rows that the teacher goes on with alone, and what
        it has read of them."""
        counts, alive, switched = [], [], []
        reader = None
        for row, writing in enumerate(desk.writings):
            accepted, before = told.num_accepted[row], len(writing.ids)
            is_refused = accepted < told.num_real[row]
            self._counts.add(drafted=told.num_real[row], accepted=accepted)
            is_done = False
            for place in range(accepted):
                writing.add(
                    told.ids[row][place],
                    STUDENT,
                    told.student_logprobs[row][place],
                    told.teacher_logprobs[row][place],
                )
                if told.divergence is not None:
                    writing.divergences.append(told.divergence[row][place])
                is_done = self.finish(writing)
            if not is_done and (is_refused or self._has_bonus):
                # of the token after a whole draft the student has not been asked yet
                own = told.student_logprobs[row][accepted] if is_refused else math.nan
                taught = told.teacher_logprobs[row][accepted]
                writing.add(told.next_token[row], TEACHER, own, taught)
                is_done = self.finish(writing)
            is_switched = is_refused and not is_done and self.config.mode == "threshold"
            if is_switched:
                switched.append(row)
            counts.append(len(writing.ids) - before)
            alive.append(not is_done and not is_switched)
        writings = [desk.writings[row] for row in switched]
        if switched:
            reader = desk.readers["teacher"].split(torch.tensor(switched))
        desk.go_on(counts, alive)
        return writings, reader

    def _history(self, desk: Desk) -> Tensor:
        """[B, window], the last divergences of each row, NaN where there are none yet."""
        size = self.config.window
        rows = [writing.divergences[-size:] for writing in desk.writings]
        padded = [[math.nan] * (size - len(row)) + row for row in rows]
        return torch.tensor(padded, device=desk.device)

    def _let_teacher_write(
        self, writings: Sequence[Writing], readers: Sequence[CachedReader]
    ) -> None:
        """The rest of some completions, without drafts; the readers have read them so far."""
        reader, *others = readers
        reader.join(others)
        desk = Desk(writings, limit=self.config.max_completion_length, teacher=self.teacher)
        desk.readers["teacher"] = reader
        while desk.writings:
            uniforms = desk.uniforms(1)[:, 0]
            ids, logprobs = draw(self.teacher, desk.read("teacher"), uniforms)
            desk.put(ids)
            refuse_broken(bool((ids < 0).any()), self.teacher)
            alive = []
            for writing, *token in zip(desk.writings, ids.tolist(), logprobs.tolist(), strict=True):
                writing.add(token[0], TEACHER, math.nan, token[1])
                alive.append(not self.finish(writing))
            desk.go_on([1] * len(alive), alive)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """ids [B, G], states [B, G, D], budget [B] on the CPU (room of a row), num_real [B] (drafts of
    it that count), uniforms [B, 2 num_draft + 1]: for the drafts, the coins, the last token."""

    ids: Tensor
    states: Tensor
    budget: Tensor
    num_real: Tensor
    uniforms: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """The verdict as plain numbers, a list for each row or a number."""

    ids: list[list[int]]
    num_real: list[int]
    num_accepted: list[int]
    next_token: list[int]
    student_logprobs: list[list[float]]
    teacher_logprobs: list[list[float]]
    divergence: list[list[float]] | None


@dataclass(slots=True)
class _Counts:
    """Of one step: looks of the teacher at a row, tokens drafted, accepted, and of it alone."""

    num_looks: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_taught: int = 0

    def add(self, *, drafted: int, accepted: int) -> None:
        """One look at one row."""
        self.num_looks += 1
        self.num_drafted += drafted
        self.num_accepted += accepted

    def metrics(self, seconds: dict[str, float]) -> dict[str, float]:
        """Rates under the names they are logged with; `seconds` by phase."""
        num_verified = self.num_drafted + self.num_looks
        rates = {
            "acceptance_rate": self.num_accepted / max(1, self.num_drafted),
            "mean_accepted_length": self.num_accepted / max(1, self.num_looks),
            "draft_tokens_per_s": self.num_drafted / max(1e-9, seconds.get("draft", 0.0)),
            "verify_tokens_per_s": num_verified / max(1e-9, seconds.get("verify", 0.0)),
        }
        if self.num_taught:
            rates["teacher_tokens_per_s"] = self.num_taught / max(1e-9, seconds.get("teach", 0.0))
        return {f"speculative/{name}": value for name, value in rates.items()}
