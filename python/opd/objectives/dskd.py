# SPDX-License-Identifier: Apache-2.0
"""Dual-space distillation: each model's hidden states, projected, read through the other's head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import opd_kernels as opk
from opd.batch import Batch, Head, Law, Signal
from opd.objectives.base import ObjectiveSection, OfHiddenStates, Parts, teacher_divergence
from opd.objectives.crossing import SharedVocab, chunks_of
from opd.objectives.projectors import LogitMap, attend, linear, project, standardised
from opd.schema import ConfigError


class Dskd(OfHiddenStates, ObjectiveSection):
    """loss = (1 - kd_rate) / N sum_t -log Q(y_t)
         + kd_rate / N' sum_t [-log P_t2s(l_t) + m_t D(P_t2s, Q) + D(P, Q_s2t)],
    P_t2s = softmax(W_S t2s(h_T)), Q_s2t = softmax(W_T s2t(h_S)): h_T, h_S the hidden states, W_T,
    W_S the heads, without gradient in these two laws; P_t2s has none in D. m_t = 1 where
    argmax P_t2s = l_t, else 0.

    v1: l_t = y_t. t2s and s2t are linear and trained, D(P, Q_s2t) is the forward KL. With one
    tokenizer m_t = 1. With two, each student's token sees all of the teacher's and the other way
    (cross-model attention): A = query([e_S(x_t); e_S(y_t)]) [e_T(x_t'); e_T(y_t')]^T / sqrt(2 D_T),
    e embeddings of a position's token and the next, t2s(softmax(A) (h_T + e_T(y))) and
    softmax(A^T) s2t(h_S) in place of t2s(h_T) and s2t(h_S); e_T and h_T over their deviation in
    the sequence. The sums are over the trained tokens of the side whose law it is, N' = N those of
    the student in the step.

    v2: l_t = argmax P. t2s is trained, from (W_S)^+ W_T on; s2t is (W_T)^+ W_S at every step, over
    the tokens that both vocabularies have. With two tokenizers, t are the chunks of one token on
    each side, whose argmax P the student's vocabulary has; N' the aligned chunks of the step.

    With one tokenizer, the same head and t2s = s2t = 1, the two D are each that of `full_vocab`.

    Attributes:
        version: `v1` or `v2`.
        kd_rate: weight of the second line, in (0, 1]; 1 for the student's own completions, whose
            y_t are no labels.
        divergence: a name out of `opd_kernels.divergences.DIVERGENCES`.
        params: its parameters by name, as in {beta: 0.3} of `jsd`.
        temperature: divides the logits of both laws in D. No implicit temperature**2 factor.
        mask: `agreed` or `none` (m_t = 1) for all cases; `auto`: as above.
        projector_learning_rate: of what is trained beside the student, on its schedule.

    Source: DSKD, arXiv:2406.17328; DSKD-v2, arXiv:2504.11426. Their code takes deviations over a
    padded micro-batch, and divides v2's sums by the pairs, the masked one by the agreed pairs, of
    the micro-batch: here no split of a step changes its loss. It pairs tokens by their text.
    """

    crosses_tokenizers: ClassVar[bool] = True

    kind: Literal["dskd"] = "dskd"
    version: Literal["v1", "v2"] = "v2"
    kd_rate: float = Field(0.5, gt=0, le=1)
    divergence: str = "forward_kl"
    params: dict[str, float | bool | tuple[str, str]] = Field(default_factory=dict)
    temperature: float = Field(1.0, gt=0)
    mask: Literal["auto", "agreed", "none"] = "auto"
    projector_learning_rate: float = Field(1e-3, gt=0)

    @model_validator(mode="after")
    def _check_divergence(self) -> Self:
        _ = self.parsed_divergence
        return self

    @cached_property
    def parsed_divergence(self) -> Any:
        """The divergence of the student's space."""
        return teacher_divergence(self.divergence, self.params)

    def bind(self, parts: Parts) -> BoundDskd:
        """With projectors between the two models of the run."""
        return BoundDskd(self, parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Views:
    """Rows [n] of the student's law and [m] of the teacher's with their counterparts.

    Attributes:
        student_hidden, taught: [n, Ds], the student's and what stands for the teacher's.
        teacher_hidden, shown: [m, Dt], the teacher's and what stands for the student's.
        labels: [n] int64 in the student's vocabulary.
        student_weights: [n], teacher_weights: [m]; kd_rate / N', 0 on rows that do not count.
    """

    student_hidden: Tensor
    taught: Tensor
    teacher_hidden: Tensor
    shown: Tensor
    labels: Tensor
    student_weights: Tensor
    teacher_weights: Tensor


class BoundDskd(OfHiddenStates):
    """`Dskd` between two models: its projectors, and its loss."""

    crosses_tokenizers: ClassVar[bool] = True
    kind: ClassVar[str] = "dskd"

    def __init__(self, section: Dskd, parts: Parts) -> None:
        self._section, self._parts = section, parts
        self._is_v2 = section.version == "v2"
        self._one_vocabulary = parts.student_bytes is parts.teacher_bytes
        self._attends = not (self._is_v2 or self._one_vocabulary)
        masks = self._is_v2 or self._attends if section.mask == "auto" else section.mask == "agreed"
        self._masks = masks
        self.module_learning_rate = section.projector_learning_rate
        student, teacher = (_constant(side.head) for side in (parts.student, parts.teacher))
        sizes = student.weight.shape[1], teacher.weight.shape[1]
        options = {"bias": not self._is_v2, "seed": parts.seed}
        layers = {"t2s": linear(sizes[1], sizes[0], **options)}
        if not self._is_v2:
            layers["s2t"] = linear(*sizes, **options)
        if self._attends:
            widths = [_embedding_size(side) for side in (parts.student, parts.teacher)]
            if widths[1] != sizes[1]:
                raise ConfigError(
                    "objective.version: must be 'v2' with a teacher whose embeddings have "
                    f"{widths[1]} dimensions and whose hidden states {sizes[1]}: v1 adds them"
                )
            layers["query"] = linear(2 * widths[0], 2 * widths[1], **options)
        precision = torch.promote_types(student.weight.dtype, torch.float32)
        self.module = nn.ModuleDict(layers).to(student.weight.device, precision)
        if self._is_v2:
            self._start_from_heads()

    def _start_from_heads(self) -> None:
        """The vocabulary that both have, and t2s from both heads."""
        parts = self._parts
        self._shared = SharedVocab(parts)
        found = self._shared.operands(parts.student, parts.teacher)
        self._rows = found["student_ids"], found["teacher_ids"]
        self._student_size = found["student_vocab_size"]
        if self._rows[0] is not None and len(self._rows[0]) == 0:
            raise ConfigError(
                "objective.version: must be 'v1' with a teacher that has no token in common with "
                "the student"
            )
        student = _leading(parts.student.head, self._student_size)
        teacher = _leading(parts.teacher.head, found["teacher_vocab_size"])
        workspace = {"workspace_bytes": parts.student.workspace_bytes}
        onto_student = LogitMap(student, self._rows[0], **workspace)
        with torch.no_grad():
            self.module["t2s"].weight.copy_(onto_student.of(teacher, self._rows[1]))
        self._onto_teacher = LogitMap(teacher, self._rows[1], **workspace)
        self._s2t: tuple[tuple[int, int], Tensor] | None = None

    def __call__(
        self, student: Law, teacher: Law | None, batch: Batch, num_step_tokens: int
    ) -> Signal:
        """The batch's share of the step's loss, with the likelihood of the labels, how many t2s
        agrees with, and the forward KL in both spaces; 0 for a row that does not count."""
        assert teacher is not None
        section = self._section
        views = self._views(student, teacher, batch, num_step_tokens)
        student_head, teacher_head = _constant(student.head), _constant(teacher.head)
        taught = Law(
            lambda: views.taught,
            student_head,
            vocab_size=student.vocab_size,
            workspace_bytes=student.workspace_bytes,
        )
        labelled = taught.token_logprobs(views.labels).logprobs
        statistics = {"t2s_nll": -labelled.detach() * (views.student_weights > 0)}
        weights = views.student_weights
        if self._masks:
            weights = weights * (taught.topk(1).ids[:, 0] == views.labels)
            statistics["t2s_agreement"] = (weights > 0).float()
        in_student_space, statistics["t2s_forward_kl"] = self._divergence(
            Law(lambda: views.student_hidden, student.head, **_limits(student)),
            taught,
            weights,
            section.parsed_divergence,
        )
        in_teacher_space, statistics["s2t_forward_kl"] = self._divergence(
            Law(lambda: views.shown, teacher_head, **_limits(teacher)),
            Law(lambda: views.teacher_hidden, teacher_head, **_limits(teacher)),
            views.teacher_weights,
            section.parsed_divergence if self._is_v2 else "forward_kl",
        )
        loss = in_student_space + in_teacher_space - (labelled * views.student_weights).sum()
        if section.kd_rate < 1:
            chosen = student.token_logprobs(batch.token_ids)
            loss = loss - (1 - section.kd_rate) / num_step_tokens * chosen.logprobs.sum()
            statistics["entropy"] = chosen.entropy.detach()
        return Signal(loss=loss, statistics=statistics)

    def _divergence(
        self, student: Law, teacher: Law, weights: Tensor, divergence: Any
    ) -> tuple[Tensor, Tensor]:
        """sum_t weights[t] D(teacher, student), and the forward KL of each row."""
        out = opk.fused_linear_divergence(
            student.hidden(),
            student.head.weight,
            teacher.hidden().detach(),
            teacher.head.weight,
            **student.head.options("student"),
            **teacher.head.options("teacher"),
            divergence=divergence,
            temperature=self._section.temperature,
            token_weights=weights,
            statistics=("forward_kl",),
            **_limits(student),
        )
        return out.loss, out.statistics["forward_kl"]

    def _views(self, student: Law, teacher: Law, batch: Batch, num_step_tokens: int) -> _Views:
        own, theirs = student.hidden(), teacher.hidden().detach()
        if self._attends:
            return self._attended(own, theirs, batch, self._section.kd_rate / num_step_tokens)
        labels, weight = batch.token_ids, self._section.kd_rate / num_step_tokens
        if batch.translation is not None:
            chunks = chunks_of(batch, num_step_tokens)
            pairs = (~chunks.is_span).nonzero().squeeze(1)
            rows = chunks.student_first[pairs]
            own = own.index_select(0, rows)
            theirs = theirs.index_select(0, chunks.teacher_first[pairs])
            labels = labels.index_select(0, rows)
            weight = self._section.kd_rate / chunks.num_step_chunks
        weights = own.new_full((len(own),), weight, dtype=self._precision)
        if self._is_v2:
            best = Law(lambda: theirs, teacher.head, **_limits(teacher)).topk(1).ids[:, 0]
            labels = self._shared.nearest(best, exact=True)
            is_known = (labels >= 0) & (labels < self._student_size)
            weights, labels = weights * is_known, labels.where(is_known, 0)
        return _Views(
            student_hidden=own,
            taught=self._project("t2s", theirs, student.head),
            teacher_hidden=theirs,
            shown=self._shown(own, student.head, teacher.head),
            labels=labels,
            student_weights=weights,
            teacher_weights=weights,
        )

    def _shown(self, own: Tensor, student: Head, teacher: Head) -> Tensor:
        """[n, Dt]: what the student's hidden states are in the teacher's space."""
        if not self._is_v2:
            return self._project("s2t", own, teacher)
        # once a step: in-place updates raise the version
        key = (student.weight.data_ptr(), student.weight._version)
        if self._s2t is None or self._s2t[0] != key:
            head = _leading(student, self._student_size)
            found = self._onto_teacher.of(head, self._rows[0], self._precision)
            self._s2t = (key, found.to(self._precision))
        return project(own, self._s2t[1], dtype=teacher.weight.dtype)

    def _attended(self, own: Tensor, theirs: Tensor, batch: Batch, weight: float) -> _Views:
        """Cross-model attention: every row of each side, and the other side's mixture for it."""
        parts, translation = self._parts, batch.translation
        assert translation is not None
        other = translation.batch
        ends, their_ends = batch.segment_ends.cpu(), other.segment_ends.cpu()
        here, there = parts.student.head, parts.teacher.head
        keys, next_keys = _embeddings(parts.teacher.model, other, self._precision)
        key = standardised(torch.cat([keys, next_keys], 1), their_ends)
        values = standardised(theirs.to(self._precision), their_ends)
        values = values + standardised(next_keys, their_ends)
        found = attend(
            self._project(
                "query", torch.cat(_embeddings(parts.student.model, batch, self._precision), 1)
            ),
            key,
            self._project("t2s", values),
            self._project("s2t", own),
            ends,
            their_ends,
        )
        return _Views(
            student_hidden=own,
            taught=found.to_student.to(here.weight.dtype),
            teacher_hidden=theirs,
            shown=found.to_teacher.to(there.weight.dtype),
            labels=batch.token_ids,
            student_weights=weight * found.has_teacher.to(self._precision),
            teacher_weights=weight * found.has_student.to(self._precision),
        )

    @property
    def _precision(self) -> torch.dtype:
        return self.module["t2s"].weight.dtype

    def _project(self, name: str, hidden: Tensor, onto: Head | None = None) -> Tensor:
        layer = self.module[name]
        dtype = None if onto is None else onto.weight.dtype
        return project(hidden, layer.weight, layer.bias, dtype=dtype)


def _constant(head: Head) -> Head:
    """The same without gradient."""
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)


def _leading(head: Head, vocab_size: int) -> Head:
    """A constant head, its weight cut to what a law is over."""
    return replace(_constant(head), weight=head.weight.detach()[:vocab_size], bias=None)


def _limits(law: Law) -> dict[str, Any]:
    return {"vocab_size": law.vocab_size, "workspace_bytes": law.workspace_bytes}


def _embedding_size(side: Any) -> int:
    model = getattr(side, "model", None)
    if model is None:
        raise ConfigError(
            "objective.version: must be 'v2' with a teacher that is not in this process: v1 reads "
            "its embeddings of tokens"
        )
    return model.get_input_embeddings().weight.shape[1]


@torch.no_grad()
def _embeddings(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[T, D] of the token at each row's position, and of the one that the row predicts."""
    table = model.get_input_embeddings()
    read = batch.input_ids.flatten().index_select(0, batch.token_idx)
    return table(read).to(dtype), table(batch.token_ids).to(dtype)
