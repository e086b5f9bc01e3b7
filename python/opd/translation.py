# SPDX-License-Identifier: Apache-2.0
"""The texts of a step in the tokens of a teacher with another tokenizer, through their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Self

import torch
from torch import Tensor

import opd_kernels as opk
from opd.batch import Prompt, Trajectory, Translation, collate
from opd.data import chat_template, encode_prompt, is_chat
from opd.schema import ConfigError

# bits of `TokenBytes.symbols`
_BOS, _END = 1, 2 | 4
# a smaller share in aligned chunks, and the loss is of another text than the student's
LEAST_ALIGNED = 0.9
# prompts whose tokens are kept; more are encoded anew
_KEPT_PROMPTS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Translated:
    """The trajectories of a step in the teacher's tokens, and their chunks.

    Attributes:
        trajectories: the teacher's side of each, in the same order.
        student_lengths, teacher_lengths: [C] int64, trained tokens of each chunk.
        is_aligned: [C] bool.
        num_bytes: [C] int64, of the student's trained tokens.
        chunk_ends: [B] int64.
        pad_id: of the teacher's tokenizer.
    """

    trajectories: list[Trajectory]
    student_lengths: Tensor
    teacher_lengths: Tensor
    is_aligned: Tensor
    num_bytes: Tensor
    chunk_ends: Tensor
    pad_id: int

    @property
    def num_step_chunks(self) -> int:
        """Aligned chunks of all trajectories."""
        return int(self.is_aligned.sum())

    def part(self, begin: int, end: int, *, device: torch.device | str = "cpu") -> Translation:
        """Of the trajectories begin:end, what their batch carries."""
        bounds = [0, *self.chunk_ends.tolist()]
        first, last = bounds[begin], bounds[min(end, len(self.trajectories))]
        chunks = slice(first, last)
        return Translation(
            batch=collate(self.trajectories[begin:end], pad_id=self.pad_id, device=device),
            student_offsets=_offsets(self.student_lengths[chunks]).to(device),
            teacher_offsets=_offsets(self.teacher_lengths[chunks]).to(device),
            is_aligned=self.is_aligned[chunks].to(device),
            num_bytes=self.num_bytes[chunks].to(device),
            chunk_ends=self.chunk_ends[begin:end] - first,
            num_step_chunks=self.num_step_chunks,
        )

    def metrics(self) -> dict[str, float]:
        """How well the two tokenizations fit, under the names they are logged with."""
        aligned, count = self.is_aligned, max(1, self.num_step_chunks)
        return {
            "chunks/aligned_ratio": self.num_step_chunks / max(1, len(aligned)),
            "chunks/student_tokens": float(self.student_lengths[aligned].sum()) / count,
            "chunks/teacher_tokens": float(self.teacher_lengths[aligned].sum()) / count,
            "chunks/unaligned_bytes": float(self.num_bytes[~aligned].sum()),
        }


class Translator:
    """Renders trajectories of a student for a teacher.

    A prompt is what the teacher's own tokenizer makes of the row: its chat template for chats, its
    own special tokens for plain text. A completion is exactly the bytes that the student wrote,
    valid UTF-8 or not; a special token becomes the teacher's of the same role, the last one the
    token that ends the teacher's turn; roles that the teacher has not, padding and unknown tokens
    are left out. Where both have one vocabulary a completion keeps its ids.

    Args:
        student, teacher: tokenizers of transformers.
        student_bytes, teacher_bytes: theirs; the same object where both have one vocabulary.
        add_special_tokens: to plain-text prompts, as the student's have them.
        end_ids: further tokens that end the student's completions, by its generation config.
        max_positions: of the teacher; chunks beyond are not aligned.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        student_bytes: opk.TokenBytes,
        teacher_bytes: opk.TokenBytes,
        add_special_tokens: bool = True,
        end_ids: Sequence[int] = (),
        max_positions: int | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.student_bytes = student_bytes
        self.teacher_bytes = teacher_bytes
        self.add_special_tokens = add_special_tokens
        self.max_positions = max_positions
        # bytes that one side cannot say exactly are no reason to stop: they stay unaligned
        is_exact = student_bytes.is_exact and teacher_bytes.is_exact
        self.mode = "strict" if is_exact else "repair"
        self.turn_end = turn_end_id(teacher, teacher_bytes)
        self._lengths = student_bytes.offsets.diff()
        self._symbols = student_bytes.symbols.clone()
        self._ends = {*end_ids, *end_ids_of(student, student_bytes)}
        self._bos = next(iter(teacher_bytes.roles.get("bos", ())), None)
        self._prompts: dict[int, tuple[Mapping[str, Any], list[int]]] = {}

    @property
    def has_one_vocabulary(self) -> bool:
        """Both sides call the same tokens by the same ids."""
        return self.student_bytes is self.teacher_bytes

    def __call__(self, trajectories: Sequence[Trajectory]) -> Translated:
        """The teacher's side of trajectories.

        Raises:
            ConfigError: the teacher has no tokens for what was written, or no room for a prompt.
        """
        completions = [trajectory.completion_ids for trajectory in trajectories]
        self._check_known(completions)
        ends = [self._end(t, ids) for t, ids in zip(trajectories, completions, strict=True)]
        ours = [
            ids if end is None else ids[:-1] for ids, end in zip(completions, ends, strict=True)
        ]
        theirs = self.encode(ours, [is_chat(trajectory.row) for trajectory in trajectories])
        chunks = self._align(ours, theirs)
        sides = []
        for trajectory, ids, end, chunk in zip(trajectories, theirs, ends, chunks, strict=True):
            if end is not None:
                one = torch.ones(1, dtype=torch.int64)
                student, teacher, is_aligned = chunk
                chunk = torch.cat([student, one]), torch.cat([teacher, one]), _with(is_aligned)
                ids = torch.cat([ids, torch.tensor([end])])
            sides.append(self._side(trajectory, ids, *chunk))
        found = [chunk for _, *chunk in sides]
        student_lengths, teacher_lengths, is_aligned, num_bytes = (
            torch.cat(parts) for parts in zip(*found, strict=True)
        )
        return Translated(
            trajectories=[trajectory for trajectory, *_ in sides],
            student_lengths=student_lengths,
            teacher_lengths=teacher_lengths,
            is_aligned=is_aligned,
            num_bytes=num_bytes,
            chunk_ends=torch.tensor([len(chunk[0]) for chunk in found]).cumsum(0),
            pad_id=pad_id(self.teacher),
        )

    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        """A row's prompt as the teacher reads it.

        Raises:
            ConfigError: the row is a chat and the teacher has no chat template.
        """
        known = self._prompts.get(id(row))
        if known is None:
            if len(self._prompts) >= _KEPT_PROMPTS:
                self._prompts.clear()
            ids = encode_prompt(row, self.teacher, self.add_special_tokens, "teacher: a row")
            # with the row, so that no other one takes its place in memory
            known = self._prompts[id(row)] = (row, ids)
        return known[1]

    def reversed(self, *, end_ids: Sequence[int] = (), max_positions: int | None = None) -> Self:
        """From the teacher's tokens to the student's.

        Args:
            end_ids: further tokens that end the teacher's completions.
            max_positions: of the student.
        """
        return type(self)(
            self.teacher,
            self.student,
            student_bytes=self.teacher_bytes,
            teacher_bytes=self.student_bytes,
            add_special_tokens=self.add_special_tokens,
            end_ids=end_ids,
            max_positions=max_positions,
        )

    def check_room(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that leave the teacher no room for a completion.

        Raises:
            ConfigError: one does.
        """
        for prompt in prompts if self.max_positions is not None else ():
            length = len(self.prompt(prompt.row))
            if length >= self.max_positions:
                raise ConfigError(
                    f"teacher: row {prompt.group_id + 1} has a prompt of {length} of its tokens, "
                    f"its positions are {self.max_positions}, so a completion has no room; set "
                    f"data.max_prompt_length below the student's {len(prompt.ids)}"
                )

    def encode(self, texts: Sequence[Tensor], chats: Sequence[bool]) -> list[Tensor]:
        """The student's tokens as the teacher's, int64; special ones by their role.

        Raises:
            ConfigError: the teacher has no tokens for them.
        """
        if self.has_one_vocabulary:
            return list(texts)
        parts = [list(self._parts(*pair)) for pair in zip(texts, chats, strict=True)]
        words = [part for those in parts for part in those if isinstance(part, bytes)]
        cut = iter(self._cut(words))
        found = [
            [next(cut) if isinstance(part, bytes) else part for part in those] for those in parts
        ]
        return [torch.tensor([*chain(*those)], dtype=torch.int64) for those in found]

    def _cut(self, words: list[bytes]) -> list[list[int]]:
        try:
            return self.teacher_bytes.encode_batch(words)
        except opk.TokenBytesError as error:
            if self.mode == "strict":
                raise ConfigError(
                    f"teacher: its tokenizer cannot say what the student wrote, {error}"
                ) from None
        return [self._near(word) for word in words]

    def _near(self, word: bytes) -> list[int]:
        """The bytes, or what a tokenizer without them makes of the text: alignment finds out."""
        try:
            return self.teacher_bytes.encode(word)
        except opk.TokenBytesError:
            text = word.decode(errors="replace")
            return self.teacher(text, add_special_tokens=False)["input_ids"]

    def _parts(self, ids: Tensor, chat: bool) -> Iterator[bytes | list[int]]:
        """The bytes between special tokens, and the teacher's tokens in the place of these."""
        places = self._symbols[ids].nonzero().flatten().tolist()
        for before, place in pairwise([-1, *places, len(ids)]):
            if place > before + 1:
                yield self.student_bytes.join(ids[before + 1 : place])
            if place < len(ids):
                yield self._of_role(int(self._symbols[ids[place]]), chat)

    def _of_role(self, symbol: int, chat: bool) -> list[int]:
        if symbol & _END:
            return [self.end(chat=chat)]
        return [self._bos] if symbol & _BOS and self._bos is not None else []

    def end(self, *, chat: bool) -> int:
        """The token that ends what the teacher writes."""
        return self.turn_end if chat else self.teacher.eos_token_id

    def _end(self, trajectory: Trajectory, ids: Tensor) -> int | None:
        """The teacher's token for the one that ends a completion; None for a cut one."""
        if not len(ids) or int(ids[-1]) not in self._ends:
            return None
        return int(ids[-1]) if self.has_one_vocabulary else self.end(chat=is_chat(trajectory.row))

    def _align(
        self, ours: list[Tensor], theirs: list[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each text the tokens of both sides in each chunk, and whether it is aligned."""
        if self.has_one_vocabulary:
            ones = [torch.ones_like(ids) for ids in ours]
            return [(one, one, one.bool()) for one in ones]
        found = opk.align_batch(
            ours, theirs, self.student_bytes, self.teacher_bytes, mode=self.mode
        )
        sizes = torch.as_tensor(found.chunk_ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
        parts = [found.student_offsets.diff(), found.teacher_offsets.diff(), found.is_aligned]
        return list(zip(*(part.split(sizes.tolist()) for part in parts), strict=True))

    def _side(
        self,
        trajectory: Trajectory,
        ids: Tensor,
        student: Tensor,
        teacher: Tensor,
        is_aligned: Tensor,
    ) -> tuple[Trajectory, Tensor, Tensor, Tensor, Tensor]:
        """The teacher's trajectory, and the chunks of the trained tokens."""
        prompt = self.prompt(trajectory.row)
        is_terminated = trajectory.is_terminated
        if self.max_positions is not None:
            fits = teacher.cumsum(0) + len(prompt) <= self.max_positions
            teacher, is_aligned = teacher * fits, is_aligned & fits
            ids = ids[: int(teacher.sum())]
            is_terminated = is_terminated and bool(fits.all())
        trained = trajectory.loss_mask[trajectory.prompt_length :]
        bounds = student.cumsum(0)
        num_trained = _sums(trained.long(), bounds)
        sizes = self._lengths[trajectory.completion_ids] * trained
        kept = num_trained > 0
        # with a part of its tokens a chunk has no probability that the teacher's could be held to
        is_aligned = is_aligned & (num_trained == student)
        loss_mask = torch.cat(
            [torch.zeros(len(prompt), dtype=torch.bool), kept.repeat_interleave(teacher)]
        )
        side = Trajectory(
            ids=torch.cat([torch.tensor(prompt, dtype=torch.int64), ids]),
            prompt_length=len(prompt),
            loss_mask=loss_mask,
            origin=trajectory.origin,
            is_terminated=is_terminated,
            step=trajectory.step,
            row=trajectory.row,
            group_id=trajectory.group_id,
        )
        return (
            side,
            num_trained[kept],
            teacher[kept],
            is_aligned[kept],
            _sums(sizes, bounds)[kept],
        )

    def _check_known(self, completions: Sequence[Tensor]) -> None:
        largest = max((int(ids.max()) for ids in completions if len(ids)), default=0)
        if largest >= len(self.student_bytes):
            raise ConfigError(
                f"vocab_size: must be at most {len(self.student_bytes)}, the tokens of the "
                f"student's tokenizer; a completion has token {largest}, which has no text"
            )


def turn_end_id(tokenizer: Any, token_bytes: opk.TokenBytes) -> int:
    """The token that the chat template writes behind an assistant's turn, else the end token."""
    tail = text_behind_a_turn(tokenizer)
    ends = end_ids_of(tokenizer, token_bytes)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return next((i for i in ids if i in ends), tokenizer.eos_token_id)


def text_behind_a_turn(tokenizer: Any) -> str | None:
    """What a chat template writes behind what an assistant says; None without a template."""
    if chat_template(tokenizer) is None:
        return None
    said = "opd-said-this"
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:
        # templates refuse in ways of their own
        return None
    return text.partition(said)[2]


def end_ids_of(tokenizer: Any, token_bytes: opk.TokenBytes) -> set[int]:
    """The tokens that a tokenizer has to end a text or a turn."""
    found = {i for role in ("eos", "eot") for i in token_bytes.roles.get(role, ())}
    return found | ({tokenizer.eos_token_id} - {None})


def pad_id(tokenizer: Any) -> int:
    """A token for places that nobody reads."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _with(is_aligned: Tensor) -> Tensor:
    return torch.cat([is_aligned, is_aligned.new_ones(1)])


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _sums(values: Tensor, ends: Tensor) -> Tensor:
    """Of stretches that end at `ends`, one behind the other from 0."""
    return _offsets(values)[ends].diff(prepend=values.new_zeros(1))
