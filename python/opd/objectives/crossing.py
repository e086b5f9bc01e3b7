# SPDX-License-Identifier: Apache-2.0
"""What objectives across two tokenizers share: the rows of chunks, and the shared tokens."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import PrivateAttr
from torch import Tensor

import opd_kernels as opk
from opd.batch import Batch, Law, Signal, law_size
from opd.objectives.base import ObjectiveSection, Parts
from opd.schema import ConfigError


class Chunks(NamedTuple):
    """The aligned chunks of a batch, A of them; rows are those of the two laws.

    Attributes:
        index: [A] int64, their places among all chunks.
        student_offsets, teacher_offsets: [C + 1] int64, of all chunks.
        student_first, teacher_first: [A] int64, the row that predicts a chunk's first token.
        is_span: [A] bool, several tokens on a side.
        teacher_batch: the texts in the teacher's tokens.
        num_step_chunks: aligned chunks of the optimizer step, at least 1.
    """

    index: Tensor
    student_offsets: Tensor
    teacher_offsets: Tensor
    student_first: Tensor
    teacher_first: Tensor
    is_span: Tensor
    teacher_batch: Batch
    num_step_chunks: int

    def weights(self) -> Tensor:
        """[A] of 1 / num_step_chunks."""
        return torch.full(
            self.index.shape, 1.0 / self.num_step_chunks, device=self.student_first.device
        )


def chunks_of(batch: Batch, num_step_tokens: int) -> Chunks:
    """The aligned chunks. Waits for the device once; without a translation every token is one."""
    translation = batch.translation
    if translation is None:
        every = torch.arange(batch.num_tokens + 1, device=batch.token_ids.device)
        own = every[:-1]
        is_span = torch.zeros_like(own, dtype=torch.bool)
        return Chunks(own, every, every, own, own, is_span, batch, max(1, num_step_tokens))
    index = translation.is_aligned.nonzero().squeeze(1)
    sides = [
        opk.chunk_index(offsets)
        for offsets in (translation.student_offsets, translation.teacher_offsets)
    ]
    return Chunks(
        index,
        translation.student_offsets,
        translation.teacher_offsets,
        *(side.first[index] for side in sides),
        ((sides[0].length > 1) | (sides[1].length > 1))[index],
        translation.batch,
        max(1, translation.num_step_chunks),
    )


class Pairs(NamedTuple):
    """Rows of both laws that are compared, M pairs of them.

    Attributes:
        student, teacher: [M] int64, rows of the laws.
        text: [M] int64 on the CPU, ascending: which of the batch's texts a pair is of.
        count: what a sum over the pairs of the step is divided by.
    """

    student: Tensor
    teacher: Tensor
    text: Tensor
    count: int

    def weights(self) -> Tensor:
        """[M] of 1 / count."""
        weight = 1.0 / self.count
        return torch.full(
            self.student.shape, weight, dtype=torch.float64, device=self.student.device
        )


def pairs_of(batch: Batch, pairing: str, num_step_tokens: int) -> Pairs:
    """The rows to compare.

    "chunks": where the first tokens of each aligned chunk are predicted; for the chunks of the
    step. "positions": token i of a text beside token i of it in the teacher's tokens, up to the
    shorter of the two; for the student's tokens of the step.
    """
    translation = batch.translation
    if pairing == "chunks":
        chunks = chunks_of(batch, num_step_tokens)
        ends = batch.segment_ends if translation is None else translation.chunk_ends
        text = torch.searchsorted(ends.cpu(), chunks.index.cpu(), right=True)
        return Pairs(chunks.student_first, chunks.teacher_first, text, chunks.num_step_chunks)
    taught = batch if translation is None else translation.batch
    ends = [side.segment_ends.cpu() for side in (batch, taught)]
    starts = [torch.cat([end.new_zeros(1), end[:-1]]) for end in ends]
    lengths = torch.minimum(*(end - start for end, start in zip(ends, starts, strict=True)))
    text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    # of each pair in its text
    place = torch.arange(len(text)) - (lengths.cumsum(0) - lengths)[text]
    rows = ((start[text] + place).to(batch.token_ids.device) for start in starts)
    return Pairs(*rows, text, max(1, num_step_tokens))


class SharedVocab:
    """What the vocabularies of a run share; of one tokenizer everything.

    Attributes:
        projection: as `opd_kernels.project_vocab` makes it, None for one tokenizer.
    """

    def __init__(self, parts: Parts) -> None:
        self.projection: opk.VocabProjection | None = None
        if parts.student_bytes is not parts.teacher_bytes:
            self.projection = opk.project_vocab(parts.student_bytes, parts.teacher_bytes)

    def require_pairs(self, kind: str) -> None:
        """Refuses vocabularies without a token in common.

        Raises:
            ConfigError: naming the objective.
        """
        if self.projection is not None and len(self.projection.student_ids) == 0:
            raise ConfigError(
                f"objective.kind: {kind} compares the tokens that both vocabularies have, and "
                f"these have none in common ({self.projection.student_size} and "
                f"{self.projection.teacher_size} tokens). Use alm or uld, which need none."
            )

    def operands(self, student: Law, teacher: Law) -> dict[str, Any]:
        """Keyword arguments of `fused_linear_overlap_divergence`: ids and vocabulary sizes."""
        sizes = [law_size(law) for law in (student, teacher)]
        device = student.head.weight.device
        if self.projection is None:
            sizes = [min(sizes)] * 2
            ids = [None, None]
        else:
            ids = self.projection.student_ids, self.projection.teacher_ids
            # tokens that a tokenizer has and the head has no row for
            has_rows = (ids[0] < sizes[0]) & (ids[1] < sizes[1])
            ids = [side[has_rows].to(device) for side in ids]
        names = ("student_ids", "teacher_ids", "student_vocab_size", "teacher_vocab_size")
        return dict(zip(names, (*ids, *sizes), strict=True))

    def nearest(self, teacher_ids: Tensor, *, exact: bool) -> Tensor:
        """The student's ids for the teacher's, -1 for none; `exact`: of the same bytes only."""
        if self.projection is None:
            return teacher_ids.to(torch.int64)
        move = self.projection.map_ids if exact else self.projection.nearest
        return move(teacher_ids)


class OnSharedTokens(ObjectiveSection):
    """An objective bound to what the vocabularies of the run share. `needs_pairs`: it refuses those
    that share nothing."""

    needs_pairs: ClassVar[bool] = False
    _shared: SharedVocab | None = PrivateAttr(None)

    @property
    def reads_shared(self) -> bool:
        """Whether its options ask for what is shared, which takes seconds to find."""
        return True

    def bind(self, parts: Parts) -> Self:
        """With what the vocabularies of the run share.

        Raises:
            ConfigError: they share no token, and it needs some.
        """
        if not self.reads_shared:
            return self
        bound = self.model_copy()
        bound._shared = SharedVocab(parts)
        if self.needs_pairs:
            bound._shared.require_pairs(self.kind)
        return bound


def overlap_divergence(
    shared: SharedVocab, student: Law, teacher: Law, chunks: Chunks, **options: Any
) -> opk.FusedLinearOverlapDivergenceOutput:
    """`fused_linear_overlap_divergence` of the rows that predict the first tokens of the chunks."""
    return opk.fused_linear_overlap_divergence(
        student.hidden()[chunks.student_first],
        student.head.weight,
        teacher.hidden()[chunks.teacher_first],
        teacher.head.weight,
        **shared.operands(student, teacher),
        **student.head.options("student"),
        **teacher.head.options("teacher"),
        token_weights=chunks.weights(),
        workspace_bytes=student.workspace_bytes,
        compact_tokens=False,
        **options,
    )


def with_cross_entropy(
    signal: Signal, weight: float, student: Law, batch: Batch, num_step_tokens: int
) -> Signal:
    """The loss plus `weight` times the share of the mean -log Q(y_t) of the batch's own tokens."""
    if weight == 0:
        return signal
    chosen = student.token_logprobs(batch.token_ids)
    mean = -chosen.logprobs.sum() / max(1, num_step_tokens)
    statistics = signal.statistics | {"entropy": chosen.entropy.detach()}
    return Signal(loss=signal.loss + weight * mean, statistics=statistics)


def label_logits(law: Law, token_ids: Tensor) -> Tensor:
    """cap(scale * (hidden[t] . W[token_ids[t]] + bias)) for each t, [T], and no other logit."""
    head, hidden = law.head, law.hidden()
    real = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden.to(real) * head.weight[token_ids].to(real)).sum(1)
    if head.bias is not None:
        logits = logits + head.bias[token_ids].to(real)
    logits = head.logit_scale * logits
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
