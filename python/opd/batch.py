# SPDX-License-Identifier: Apache-2.0
"""What rollouts, teachers and objectives hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

import opd_kernels as opk
from opd.sparse_law import DrawnRows

Origin = Literal["student", "teacher", "data", "mixed"]

# who wrote a token: the values of `Trajectory.token_origin` are places in it
WRITERS = ("data", "student", "teacher")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the training data, tokenized.

    Attributes:
        ids: [P] int64, special tokens and chat template included.
        completion_ids: [C] int64 of the row's own completion, its end token included, or None.
        completion_mask: [C] bool, the completion's tokens that are trained, or None.
        row: the row itself, for verifiers and samples.
        group_id: index of the row in the data; completions of one prompt share it.
    """

    ids: Tensor
    completion_ids: Tensor | None = None
    completion_mask: Tensor | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    group_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One prompt with one completion, unpadded.

    Attributes:
        ids: [S] int64, prompt then completion.
        prompt_length: number of prompt tokens.
        loss_mask: [S] bool, the tokens that are trained. False on the prompt.
        behaviour_logprobs: [S] float32, nats, of each token under the law it was sampled from
            (after temperature, top-k and top-p); 0 on the prompt. None when nobody sampled it here.
        origin: who wrote the completion; `mixed` where two models wrote it token by token.
        token_origin: [S] uint8, for each token its writer's place in `WRITERS`; 0 on the prompt.
            None when one writer, `origin`, wrote it all.
        student_logprobs: [S] float32, nats, of each token under the law the student draws from,
            whoever wrote it; 0 on the prompt. None when they are not known of each token.
        teacher_logprobs: the same of the teacher.
        tokens_read: tokens that each model read to write the completion, where that is not each
            token once by its writer: {"student": ..., "teacher": ...}.
        is_terminated: the completion ends in an end token, not at the length limit.
        step: the optimizer step at which it was sampled; the current step minus this is its age.
        row, group_id: as in `Prompt`.
    """

    ids: Tensor
    prompt_length: int
    loss_mask: Tensor
    behaviour_logprobs: Tensor | None = None
    origin: Origin = "student"
    token_origin: Tensor | None = None
    student_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    tokens_read: Mapping[str, int] = field(default_factory=dict)
    is_terminated: bool = True
    step: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)
    group_id: int = 0

    @property
    def completion_length(self) -> int:
        """Number of completion tokens, the end token included."""
        return len(self.ids) - self.prompt_length

    @property
    def completion_ids(self) -> Tensor:
        """[S - prompt_length] int64."""
        return self.ids[self.prompt_length :]

    def num_written(self, writer: str) -> int:
        """Completion tokens by one of `WRITERS`."""
        if self.token_origin is None:
            return self.completion_length if self.origin == writer else 0
        written = self.token_origin[self.prompt_length :] == WRITERS.index(writer)
        return int(written.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Trajectories right-padded to one length, with the positions whose next token is trained.

    Attributes:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 0 on padding.
        position_ids: [B, S] int64, counted from each sequence's first token.
        token_idx: [T] int64 into the flattened B * S positions: row t of a law predicts
            `token_ids[t]`. T counts the trained tokens only, so the others cost no logits.
        token_ids: [T] int64.
        segment_ends: [B] int64, the end of each trajectory's tokens within T.
        lengths: tokens of each trajectory, prompt included, B plain numbers.
        prompt_lengths: tokens of each trajectory's prompt.
        behaviour_logprobs: [T] float32, or None when a trajectory has none.
        token_origin: [T] uint8, as in `Trajectory`; None when each has one writer.
        num_input_tokens: tokens that a model reads, padding excluded; a plain number, so that
            counting them does not wait for a GPU.
        translation: the same texts in the tokens of a teacher with another tokenizer, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    token_idx: Tensor
    token_ids: Tensor
    segment_ends: Tensor
    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    behaviour_logprobs: Tensor | None
    num_input_tokens: int
    token_origin: Tensor | None = None
    translation: Translation | None = None

    @property
    def num_tokens(self) -> int:
        """Trained tokens, T."""
        return len(self.token_ids)

    @property
    def for_teacher(self) -> Batch:
        """What a teacher reads: these texts in its own tokens, if they are others."""
        return self if self.translation is None else self.translation.batch

    def sequences(self) -> list[Tensor]:
        """The trajectories without their padding, int64 on the CPU."""
        rows = self.input_ids.cpu()
        return [row[:length] for row, length in zip(rows, self.lengths, strict=True)]

    def completion_rows(self) -> list[Tensor]:
        """For each trajectory, which of its completion's tokens are trained: 0 is the first one."""
        width = self.input_ids.shape[1]
        places = self.token_idx.cpu()
        bounds = [0, *self.segment_ends.tolist()]
        return [
            # row t of a law predicts the token behind its position
            places[begin:end] - row * width + 1 - prompt_length
            for row, (begin, end, prompt_length) in enumerate(
                zip(bounds[:-1], bounds[1:], self.prompt_lengths, strict=True)
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """The texts of a batch in the teacher's tokens, and the chunks in which both sides agree.

    Chunk c is rows student_offsets[c]:student_offsets[c + 1] of the student's law and rows
    teacher_offsets[c]:teacher_offsets[c + 1] of the teacher's: the finest cuts of the bytes that
    both tokenizations have. The chunks tile the trained tokens of both sides.

    Attributes:
        batch: the teacher's side: row t of the teacher's law predicts `batch.token_ids[t]`.
        student_offsets, teacher_offsets: [C + 1] int64.
        is_aligned: [C] bool, both sides have tokens, and the same bytes. What is not is in no loss.
        num_bytes: [C] int64, of the student's tokens; 0 for special tokens with a role.
        chunk_ends: [B] int64 on the CPU, the end of each trajectory's chunks within C.
        num_step_chunks: aligned chunks of the whole optimizer step, what losses are divided by.
    """

    batch: Batch
    student_offsets: Tensor
    teacher_offsets: Tensor
    is_aligned: Tensor
    num_bytes: Tensor
    chunk_ends: Tensor
    num_step_chunks: int

    @property
    def num_chunks(self) -> int:
        """C, the ones that are not aligned included."""
        return len(self.is_aligned)


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: cap(logit_scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, D].
        bias: [V], or None.
        softcap: c of cap(x) = c tanh(x / c), as in Gemma 2; None: no cap.
        logit_scale: as in Cohere; the inverse of Granite's.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def options(self, side: str = "") -> dict[str, Any]:
        """All but the weight, as keyword arguments of the kernels: bias, or student_bias, ..."""
        prefix = f"{side}_" if side else ""
        names = ("bias", "softcap", "logit_scale")
        return {prefix + name: getattr(self, name) for name in names}

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] in float32, formed whole: for checks, not for losses."""
        logits = hidden.float() @ self.weight.float().T
        if self.bias is not None:
            logits = logits + self.bias.float()
        logits = self.logit_scale * logits
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class Law:
    """A model's next-token law at T positions: the softmax of its head's logits, never formed.

    Args:
        forward: returns the hidden states [T, D]; called once, when something first asks.
        head: what makes logits of them.
        vocab_size: the prefix of the vocabulary that the law is over. Default: all of it.
        workspace_bytes: scratch memory of the fused kernels.
    """

    def __init__(
        self,
        forward: Callable[[], Tensor],
        head: Head,
        *,
        vocab_size: int | None = None,
        workspace_bytes: int = 1 << 30,
    ) -> None:
        self._forward = forward
        self.head = head
        self.vocab_size = vocab_size
        self.workspace_bytes = workspace_bytes

    @cached_property
    def _hidden(self) -> Tensor:
        return self._forward()

    def hidden(self) -> Tensor:
        """[T, D] final hidden states, in the dtype of the head."""
        return self._hidden

    def prefetch(
        self, *, num_topk: int = 0, token_ids: Tensor | None = None, temperature: float = 1.0
    ) -> None:
        """Compute what all questions need, so that its time is booked on whoever asks first."""
        self.hidden()

    def topk(
        self, num_topk: int, *, token_ids: Tensor | None = None, temperature: float = 1.0
    ) -> Any:
        """The likeliest tokens: `.ids`, `.logprobs` [T, K], `.tail_logprob`, `.entropy` [T]; and
        `.token_logprobs` [T, J] of `token_ids`. Without gradient."""
        with torch.no_grad():
            return opk.fused_linear_topk(
                self.hidden().detach(),
                self.head.weight,
                num_topk=num_topk,
                token_ids=token_ids,
                temperature=temperature,
                **self.head.options(),
                vocab_size=self.vocab_size,
                workspace_bytes=self.workspace_bytes,
            )

    def samples(
        self,
        num_draws: int,
        *,
        proposal_temperature: float = 1.0,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
    ) -> DrawnRows:
        """Tokens drawn from softmax(z / (temperature proposal_temperature)), with weights that are
        the law on average. Without gradient.

        Args:
            num_draws: N per position.
            proposal_temperature, temperature: as `opd_kernels.fused_linear_sample_tokens`.
            uniforms: [T, N] in [0, 1). Default: from torch's generator.
        """
        with torch.no_grad():
            hidden = self.hidden().detach()
            if uniforms is None:
                shape = (len(hidden), num_draws)
                uniforms = torch.rand(shape, dtype=torch.float64, device=hidden.device)
            drawn = opk.fused_linear_sample_tokens(
                hidden,
                self.head.weight,
                uniforms,
                proposal_temperature=proposal_temperature,
                temperature=temperature,
                **self.head.options(),
                vocab_size=self.vocab_size,
                workspace_bytes=self.workspace_bytes,
            )
            terms = drawn.weights * drawn.logprobs
            entropy = -torch.where(drawn.weights > 0, terms, 0.0).sum(1)
        return DrawnRows(ids=drawn.ids, weights=drawn.weights, entropy=entropy)

    def token_logprobs(self, token_ids: Tensor, *, temperature: float = 1.0) -> Any:
        """Log-probabilities of chosen tokens: `.logprobs`, `.lse`, `.entropy`, [T] each, nats."""
        return opk.fused_linear_token_logprobs(
            self.hidden(),
            self.head.weight,
            token_ids,
            temperature=temperature,
            **self.head.options(),
            vocab_size=self.vocab_size,
            workspace_bytes=self.workspace_bytes,
        )


def law_size(source: Any) -> int:
    """Tokens that a law, or a model's, is over."""
    return len(source.head.weight) if source.vocab_size is None else source.vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What an objective returns: the loss to differentiate, and what it saw on the way.

    Attributes:
        loss: scalar, this batch's share of the step's mean over trained tokens, nats.
        statistics: name -> [T] or [rows that are compared] float, no gradient.
    """

    loss: Tensor
    statistics: dict[str, Tensor]


def collate(
    trajectories: Sequence[Trajectory], *, pad_id: int, device: torch.device | str = "cpu"
) -> Batch:
    """Pad trajectories into one batch and list the positions whose next token is trained."""
    seq_len = max(len(trajectory.ids) for trajectory in trajectories)
    shape = (len(trajectories), seq_len)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    predicted = torch.zeros(shape, dtype=torch.bool)
    with_behaviour = all(t.behaviour_logprobs is not None for t in trajectories)
    behaviour = torch.zeros(shape) if with_behaviour else None
    with_origin = any(t.token_origin is not None for t in trajectories)
    origin = torch.zeros(shape, dtype=torch.uint8) if with_origin else None
    for row, trajectory in enumerate(trajectories):
        length = len(trajectory.ids)
        input_ids[row, :length] = trajectory.ids
        attention_mask[row, :length] = 1
        predicted[row, :length] = trajectory.loss_mask
        if behaviour is not None:
            behaviour[row, :length] = trajectory.behaviour_logprobs
        if origin is not None:
            own = trajectory.token_origin
            origin[row, :length] = WRITERS.index(trajectory.origin) if own is None else own
    # nothing predicts the first token of a sequence
    predicted[:, 0] = False
    flat = predicted.flatten().nonzero().squeeze(1)
    position_ids = torch.arange(seq_len).expand(shape) * attention_mask
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        position_ids=position_ids.to(device),
        token_idx=(flat - 1).to(device),
        token_ids=input_ids.flatten()[flat].to(device),
        segment_ends=predicted.sum(1).cumsum(0),
        lengths=tuple(len(trajectory.ids) for trajectory in trajectories),
        prompt_lengths=tuple(trajectory.prompt_length for trajectory in trajectories),
        behaviour_logprobs=None if behaviour is None else behaviour.flatten()[flat].to(device),
        token_origin=None if origin is None else origin.flatten()[flat].to(device),
        num_input_tokens=sum(len(trajectory.ids) for trajectory in trajectories),
    )


def collate_step(
    trajectories: Sequence[Trajectory],
    *,
    batch_size: int,
    pad_id: int,
    device: torch.device | str = "cpu",
    translated: Any = None,
) -> tuple[list[Batch], int]:
    """The micro-batches of one optimizer step, and the number of tokens the step trains.

    Args:
        trajectories: of the step.
        batch_size: trajectories of a micro-batch.
        pad_id: goes into the padding.
        device: where the batches are wanted.
        translated: an `opd.translation.Translated` of the trajectories; its parts become the
            `translation` of each batch.
    """
    batches = []
    for begin in range(0, len(trajectories), batch_size):
        end = begin + batch_size
        batch = collate(trajectories[begin:end], pad_id=pad_id, device=device)
        if translated is not None:
            batch = replace(batch, translation=translated.part(begin, end, device=device))
        batches.append(batch)
    return batches, sum(batch.num_tokens for batch in batches)
