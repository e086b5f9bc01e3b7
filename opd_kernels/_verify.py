# SPDX-License-Identifier: Apache-2.0
"""Which drafts a teacher keeps and what it puts after them, from rows of both models' logits.

Shared by speculative_verify and fused_linear_speculative_verify. Tensor code without a wait, so
that a GPU runs it unattended; everything is float64 but the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _dispatch, _laws
from .token_logprobs import Law

MODES = ("rejection", "block", "topk", "threshold", "greedy")
# these read the student's law to decide, and the first two to draw
NEEDS_STUDENT = ("rejection", "block", "threshold")
_DRAW_RESIDUAL = ("rejection", "block")
# of a law from another that rounding alone tells apart
NO_DIVERGENCE = 1e-10
_FORWARD_KL = 0
_UNREAD, _NO_TOKEN = -2, -1


class Spec(NamedTuple):
    """What a call decides by. Pairs are of the student, then of the teacher; a Law each."""

    mode: str
    num_topk: int
    threshold: float
    with_acceptance: bool
    laws: tuple[Law, Law]
    top_k: tuple[int, int]
    top_p: tuple[float, float]
    backend: str

    @property
    def numbers(self) -> list[float]:
        return [*self.laws[0].numbers, *self.laws[1].numbers]


class Rows(NamedTuple):
    """What speculative_verify_rows_fwd says of rows, each as [sequences, places]."""

    lse: Tensor
    floor: Tensor
    logprobs: Tensor
    ranks: Tensor
    argmax: Tensor
    largest: Tensor


class FormedAgain(NamedTuple):
    """A student whose logits have made room: what is known of its rows, and how to form some."""

    student: Rows
    form: Callable[[Tensor], Tensor]


class Verdict(NamedTuple):
    """Of n sequences with w drafts; the last place is that of next_token."""

    num_accepted: Tensor
    next_token: Tensor
    accepted: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    acceptance: Tensor
    divergence: Tensor


def empty_verdict(like: Tensor, num_sequences: int, num_drafts: int, spec: Spec) -> Verdict:
    """Outputs of a call, NaN and -1 where nothing is known yet; log-probs in float64."""

    def nan(places: int) -> Tensor:
        return like.new_full((num_sequences, places), math.nan, dtype=torch.float64)

    return Verdict(
        like.new_zeros(num_sequences, dtype=torch.int32),
        like.new_full((num_sequences,), -1, dtype=torch.int32),
        like.new_zeros((num_sequences, num_drafts), dtype=torch.bool),
        nan(num_drafts),
        nan(num_drafts + 1),
        nan(num_drafts if spec.with_acceptance else 0),
        nan(num_drafts if spec.mode == "threshold" else 0),
    )


def verify(
    spec: Spec,
    drafts: Tensor,
    student_logits: Tensor | None,
    teacher_logits: Tensor,
    uniforms: Tensor,
    num_left: Tensor,
    history: Tensor | None,
    formed_again: FormedAgain | None = None,
) -> tuple[Verdict, Tensor]:
    """The verdict on w drafts of n sequences, and [n] bool: whether it is final.

    It is not where all of a sequence's w drafts are kept, more are to come, and the teacher's
    place after them is not among the rows.

    Args:
        drafts: [n, w] int64.
        student_logits: [n * w, V] or None. teacher_logits: [n * w, V] or [n * (w + 1), V].
        uniforms: [n, w + 1] float64: a coin per draft, and the one that draws.
        num_left: [n] int64: drafts that there are, from the first of these on.
        history: [n, window] of mode "threshold", or None.
        formed_again: in the place of student_logits, which are no longer there. On a CPU.
    """
    kernels = _dispatch.row_ops(spec.backend)
    num_sequences, width = drafts.shape
    teacher_width = teacher_logits.shape[0] // max(1, num_sequences)
    left = num_left.unsqueeze(1)
    places = torch.arange(teacher_width, device=drafts.device)
    real = places[:width] < left
    # a negative id would say that the row is not to be read
    ids = torch.where(drafts < 0, spec.laws[1].vocab_size, drafts)
    student = None
    if formed_again is not None:
        student = formed_again.student
    elif student_logits is not None:
        student = student_rows(spec, drafts, student_logits, num_left)
    after = torch.where(places == left, _NO_TOKEN, _UNREAD)
    teacher_ids = torch.where(real, ids, after[:, :width])
    if teacher_width > width:
        teacher_ids = torch.cat([teacher_ids, after[:, width:]], 1)
    teacher = _rows(kernels, spec, 1, teacher_logits, teacher_ids)

    broken = teacher.logprobs[:, :width].isnan()
    if spec.mode in NEEDS_STUDENT:
        broken |= student.logprobs.isnan()
    broken &= real
    coins = uniforms[:, :width]
    weights = divergence = None
    if spec.mode == "block":
        weights = _block_weights(student.logprobs, teacher.logprobs[:, :width])
        sums = _residual(
            kernels,
            spec,
            (student_logits, student),
            (teacher_logits, teacher),
            _every_place(real & ~broken, teacher_width),
            scales=(torch.ones_like(coins), weights[:, :width]),
        )
        num_accepted = _block_length(coins, weights, sums.mass.view_as(coins), left)
        lost = broken.any(1)
        overlap = sums.overlap.view_as(coins)
    else:
        keep, divergence = _kept(
            kernels, spec, ids, coins, student_logits, student, teacher_logits, teacher, history
        )
        num_accepted = (keep & real & ~broken).cumprod(1).sum(1)
        overlap = None
        lost = _at(broken, num_accepted)
    accepted = places[:width] < num_accepted.unsqueeze(1)
    judged = real & (places[:width] <= num_accepted.unsqueeze(1))
    if spec.with_acceptance and overlap is None:
        sums = _residual(
            kernels,
            spec,
            (student_logits, student),
            (teacher_logits, teacher),
            _every_place(judged & ~broken, teacher_width),
        )
        overlap = sums.overlap.view_as(coins)

    refused = num_accepted < num_left.clamp(max=width)
    final = refused | (num_accepted < teacher_width)
    drawn = _draw(
        kernels,
        spec,
        (student_logits, student),
        (teacher_logits, teacher),
        num_accepted,
        refused,
        final & ~lost,
        None if weights is None else weights.gather(1, num_accepted.unsqueeze(1)).squeeze(1),
        uniforms[:, -1],
        formed_again,
    )
    is_next = torch.arange(width + 1, device=drafts.device) == num_accepted.unsqueeze(1)

    def place(of_drafts: Tensor, of_next: Tensor, is_next: Tensor) -> Tensor:
        kept = torch.where(accepted, of_drafts, math.nan)
        kept = torch.nn.functional.pad(kept, (0, is_next.shape[1] - width), value=math.nan)
        return torch.where(is_next, of_next.unsqueeze(1), kept)

    nothing = drawn.mass.new_full((num_sequences, width), math.nan)
    verdict = Verdict(
        num_accepted.to(torch.int32),
        drawn.tokens,
        accepted,
        place(
            nothing if student is None else student.logprobs,
            drawn.student_logprobs,
            is_next[:, :width] & refused.unsqueeze(1),
        ),
        place(teacher.logprobs[:, :width], drawn.teacher_logprobs, is_next),
        torch.where(judged, overlap, math.nan) if spec.with_acceptance else nothing[:, :0],
        nothing[:, :0] if divergence is None else torch.where(judged, divergence, math.nan),
    )
    return verdict, final


def student_rows(spec: Spec, drafts: Tensor, logits: Tensor, num_left: Tensor) -> Rows:
    """What `verify` reads of the student's logits [n * w, V] at every place."""
    real = torch.arange(drafts.shape[1], device=drafts.device) < num_left.unsqueeze(1)
    # a negative id would say that the row is not to be read
    ids = torch.where(drafts < 0, spec.laws[0].vocab_size, drafts)
    kernels = _dispatch.row_ops(spec.backend)
    return _rows(kernels, spec, 0, logits, torch.where(real, ids, _UNREAD))


def _rows(kernels, spec: Spec, side: int, logits: Tensor, ids: Tensor) -> Rows:
    values = kernels.speculative_verify_rows_fwd(
        logits, ids.reshape(-1), *spec.laws[side], spec.top_k[side], spec.top_p[side]
    )
    return Rows(*(value.view(ids.shape) for value in values))


def _at(values: Tensor, place: Tensor) -> Tensor:
    """values[b, place[b]], False beyond the last."""
    return torch.nn.functional.pad(values, (0, 1)).gather(1, place.unsqueeze(1)).squeeze(1)


# -- decisions -----------------------------------------------------------------------------------


def _ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """p / q: 0 where p is, whatever q; inf where only q is 0."""
    return torch.where(teacher == -math.inf, 0.0, (teacher - student).exp())


def _kept(
    kernels, spec, ids, coins, student_logits, student, teacher_logits, teacher, history
) -> tuple[Tensor, Tensor | None]:
    """[n, w]: whether each draft is kept if those before it are; d of mode threshold, or None."""
    width = ids.shape[1]
    if spec.mode == "rejection":
        return coins < _ratio(student.logprobs, teacher.logprobs[:, :width]), None
    if spec.mode == "topk":
        return teacher.ranks[:, :width] < spec.num_topk, None
    if spec.mode == "greedy":
        return ids == teacher.argmax[:, :width], None
    if width == 0:
        return coins < 0, coins
    divergence = _divergences(kernels, spec, student_logits, teacher_logits, *ids.shape)
    divergence = torch.where(divergence < NO_DIVERGENCE, 0.0, divergence)
    before = divergence if history is None else torch.cat([history, divergence], 1)
    before = torch.where(before < NO_DIVERGENCE, 0.0, before)
    window = width if history is None else history.shape[1]
    before = torch.nn.functional.pad(before, (width + window - before.shape[1], 0), value=math.nan)
    means = torch.stack([before[:, i : i + window].mean(1) for i in range(width)], 1)
    # a mean with an unknown value is NaN, and so is inf times a mean of 0: neither refuses
    limits = spec.threshold * means
    if spec.threshold == 0:
        limits = torch.where(means == math.inf, 0.0, limits)
    return ~(divergence > limits), divergence


def _divergences(kernels, spec, student_logits, teacher_logits, num_sequences, width) -> Tensor:
    """KL(teacher || student) at each place, of the laws before they are cut."""
    student, teacher = spec.laws
    laws = _laws.Laws(
        student_bias=student.bias,
        teacher_bias=teacher.bias,
        reference_bias=None,
        student_temperatures=None,
        teacher_temperatures=None,
        token_weights=None,
        coefficients=None,
        mixture_weights=None,
        labels=None,
        label_weights=None,
        token_ids=None,
        topk_ids=None,
        divergences=[_FORWARD_KL],
        params=[0.0, 0.0],
        numbers=[*spec.numbers, 1.0, 0.0, 0.0, 1.0, 0.0],
        target=0,
        live_target=False,
        vocab_size=teacher.vocab_size,
    )
    stride = teacher_logits.shape[0] // max(1, num_sequences)

    def of_rows(student_rows: slice, teacher_rows: slice) -> Tensor:
        return kernels.divergence_fwd(
            student_logits[student_rows], teacher_logits[teacher_rows], None, *laws, False
        )[0]

    # a launch takes rows of one stride: those of a sequence or those of a place, which are fewer
    if num_sequences <= width:
        starts = ((i * width, i * stride) for i in range(num_sequences))
        losses = [of_rows(slice(q, q + width), slice(p, p + width)) for q, p in starts]
        return torch.stack(losses).double()
    losses = [of_rows(slice(i, None, width), slice(i, None, stride)) for i in range(width)]
    return torch.stack(losses, 1).double()


def _block_weights(student: Tensor, teacher: Tensor) -> Tensor:
    """[n, w + 1]: w_0 = 1, w_i = min(1, w_{i-1} p / q)."""
    ratio = _ratio(student, teacher)
    weights = [ratio.new_ones(ratio.shape[0])]
    for i in range(ratio.shape[1]):
        last = weights[-1]
        # 0 times an infinite ratio stays 0
        weights.append(torch.where(last == 0, last, last * ratio[:, i]).clamp(max=1.0))
    return torch.stack(weights, 1)


def _block_length(coins: Tensor, weights: Tensor, mass: Tensor, left: Tensor) -> Tensor:
    """tau: the largest i whose coin is below h_i, 0 if none is."""
    width = coins.shape[1]
    length = torch.arange(1, width + 1, device=coins.device)
    weight = weights[:, 1:]
    # mass[i] is that of max(w_i p - q, 0) at the place after i drafts
    after = torch.nn.functional.pad(mass[:, 1:], (0, min(1, width)))
    chance = torch.where(after > 0, after / (after + 1 - weight), 0.0 * after)
    chance = torch.where(length == left, weight, chance)
    passed = (coins < chance) & (length <= left)
    return (passed * length).amax(1) if width else left.squeeze(1) * 0


# -- the residual law ----------------------------------------------------------------------------


class _Sums(NamedTuple):
    """The outputs of speculative_verify_residual_fwd."""

    mass: Tensor
    overlap: Tensor
    tokens: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor


def _every_place(wanted: Tensor, teacher_width: int) -> tuple[Tensor, Tensor]:
    """Rows (student's, teacher's) of each draft's place that is wanted, else -1."""
    num_sequences, width = wanted.shape
    sequence = torch.arange(num_sequences, device=wanted.device).unsqueeze(1)
    place = torch.arange(width, device=wanted.device)
    return (
        torch.where(wanted, sequence * width + place, -1),
        torch.where(wanted, sequence * teacher_width + place, -1),
    )


def _residual(
    kernels,
    spec: Spec,
    student: tuple[Tensor | None, Rows | None],
    teacher: tuple[Tensor, Rows],
    rows: tuple[Tensor, Tensor],
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    uniforms: Tensor | None = None,
    floor: Tensor | None = None,
) -> _Sums:
    """max(scale p - scale q, 0) of pairs of rows; a token of each where uniforms are given."""
    student_logits, of_student = student
    teacher_logits, of_teacher = teacher
    rows = tuple(row.reshape(-1) for row in rows)
    if scales is None:
        scales = (torch.ones_like(rows[0], dtype=torch.float64),) * 2
    scales = tuple(scale.reshape(-1).contiguous() for scale in scales)
    laws = spec.laws
    values = kernels.speculative_verify_residual_fwd(
        teacher_logits,
        student_logits,
        rows[1],
        rows[0],
        of_teacher.lse.reshape(-1),
        (of_teacher.floor if floor is None else floor).reshape(-1),
        None if of_student is None else of_student.lse.reshape(-1),
        None if of_student is None else of_student.floor.reshape(-1),
        scales[1],
        scales[0],
        scales[0] if uniforms is None else uniforms.contiguous(),
        laws[0].bias,
        laws[1].bias,
        None,
        None,
        spec.numbers,
        laws[1].vocab_size,
        uniforms is not None,
    )
    return _Sums(*values)


def _draw(
    kernels, spec, student, teacher, num_accepted, refused, wanted, weights, uniforms, formed_again
) -> _Sums:
    """next_token of each sequence that wants one, from max(w p - q, 0), p or the best of p."""
    num_sequences = len(num_accepted)
    sequence = torch.arange(num_sequences, device=num_accepted.device)
    of_teacher = teacher[1]
    teacher_width = of_teacher.lse.shape[1]
    width = 0 if student[1] is None else student[1].lse.shape[1]
    student_rows = torch.full_like(num_accepted, -1)
    if student[1] is not None:
        student_rows = torch.where(refused & wanted, sequence * width + num_accepted, -1)
    teacher_rows = torch.where(wanted, sequence * teacher_width + num_accepted, -1)
    if formed_again is not None:
        # other products of the same rows may round otherwise: so their sums and cuts as well
        again = (student_rows >= 0).nonzero().squeeze(1)
        logits = formed_again.form(student_rows[again])
        nothing = torch.full((1, len(again)), _NO_TOKEN)
        student = (logits, _rows(kernels, spec, 0, logits, nothing))
        student_rows[again] = torch.arange(len(again))
    ones = torch.ones_like(uniforms)
    is_residual = refused if spec.mode in _DRAW_RESIDUAL else torch.zeros_like(refused)
    if weights is None:
        weights = ones
    floor = None
    if spec.mode == "greedy":
        # of p cut to its best entries the smallest id
        floor, uniforms = of_teacher.largest, torch.zeros_like(uniforms)
    return _residual(
        kernels,
        spec,
        student,
        teacher,
        (student_rows, teacher_rows),
        scales=(is_residual.double(), torch.where(refused, weights, ones)),
        uniforms=uniforms,
        floor=floor,
    )
