# SPDX-License-Identifier: Apache-2.0
"""A sparse teacher as a row of cells: one per id and, with a bucket, one for all the rest.

What topk_divergence and its fused twin share: which ids count, the teacher's cells, the student's
cells from what the row kernel returns, and the way back from gradients of cells to those of logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks
from ._registration import register

_OP = "topk_divergence"
BUCKET, RENORMALIZE_BOTH, RENORMALIZE_TEACHER, DROP = range(4)
TAILS = ("bucket", "renormalize_both", "renormalize_teacher", "drop")
SUPPORTS = ("teacher", "student", "union", "given")
# of a table of ids, as in opd.h
MAX_IDS = 8192
# what probabilities may sum to above 1, or differ from it, beyond the digits of their dtype
_ROUNDING = 1e-3


def has_tail_cell(tail: int) -> bool:
    """Whether there is a cell for what is off the ids."""
    return tail in (BUCKET, RENORMALIZE_TEACHER)


def repeated(ids: Tensor) -> Tensor:
    """[T, K] bool: ids (not negative ones) that an earlier column of their row has too."""
    ascending, columns = ids.sort(dim=1, stable=True)
    is_repeat = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    return torch.zeros_like(ids, dtype=torch.bool).scatter(1, columns[:, 1:], is_repeat)


def log_complement(logprob: Tensor) -> Tensor:
    """log(1 - exp(logprob)), right at both ends; -inf from 0 upwards."""
    below = torch.where(logprob < 0, logprob, -1.0)
    small = torch.log(-torch.expm1(below))
    large = torch.log1p(-torch.exp(below))
    value = torch.where(below > -math.log(2.0), small, large)
    value = torch.where(logprob < 0, value, -math.inf)
    return torch.where(logprob.isnan(), logprob, value)


def log_rest(logprobs: Tensor, dtype: torch.dtype, is_all: Tensor) -> Tensor:
    """log(1 - sum_k exp logprobs_k) of float64 values that were given in `dtype`.

    -inf where the ids are the whole vocabulary (`is_all` [T]). Elsewhere a sum of 1, or a little
    more, is rounding: what is left is not 0, which would make a divergence infinite, but less than
    numbers of this dtype tell apart from it, and counts as one unit of theirs.
    """
    rest = log_complement(logprobs.logsumexp(1))
    rest = rest.masked_fill(rest == -math.inf, math.log(torch.finfo(dtype).eps))
    return rest.masked_fill(is_all, -math.inf)


def _cells(
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    tail_logprob: Tensor | None,
    token_weights: Tensor | None,
    vocab_size: int,
    tail: int,
    in_float64: bool,
) -> tuple[Tensor, Tensor]:
    ids = teacher_ids.to(torch.int64)
    # a sum of K probabilities near 1 says something of the tail in float64 only
    logprobs = teacher_logprobs.to(torch.float64)
    rest = None if tail_logprob is None else tail_logprob.to(torch.float64)
    if token_weights is not None:
        # of a token that does not count nothing is read: all of its mass is off no ids
        dead = token_weights == 0
        ids = ids.masked_fill(dead.unsqueeze(1), -1)
        logprobs = logprobs.masked_fill(dead.unsqueeze(1), -math.inf)
        rest = None if rest is None else rest.masked_fill(dead, 0.0)
    _checks.token_ids_in_range(_OP, ids, vocab_size, "teacher_ids", padding=True)
    ids = ids.masked_fill(repeated(ids) | (ids < 0), -1)
    # NaN marks a row that has no law, also where it comes without an id
    logprobs = logprobs.masked_fill((ids < 0) & ~logprobs.isnan(), -math.inf)
    mass = logprobs.logsumexp(1)
    most = math.log1p(_tolerance(teacher_logprobs))
    _check_mass(mass, most)
    # beyond that they are no probabilities: said in words on a CPU, NaN elsewhere
    logprobs = torch.where((mass > most).unsqueeze(1), math.nan, logprobs)
    if tail == BUCKET:
        if rest is None:
            rest = log_rest(logprobs, teacher_logprobs.dtype, (ids >= 0).sum(1) == vocab_size)
        else:
            most = max(most, math.log1p(_tolerance(tail_logprob)))
            _check_whole(torch.logaddexp(mass, rest), most)
    elif tail == RENORMALIZE_TEACHER:
        rest = torch.full_like(mass, -math.inf)
    if tail in (RENORMALIZE_BOTH, RENORMALIZE_TEACHER):
        _check_some_id(mass, token_weights)
    if has_tail_cell(tail):
        logprobs = torch.cat([logprobs, rest.unsqueeze(1)], dim=1)
    real = torch.float64 if in_float64 else torch.float32
    return ids.contiguous(), logprobs.to(real).contiguous()


def _tolerance(logprobs: Tensor) -> float:
    return max(_ROUNDING, 4 * torch.finfo(logprobs.dtype).eps)


def _check_mass(mass: Tensor, most: float) -> None:
    """On CPU: elsewhere it would wait."""
    if mass.device.type != "cpu" or mass.numel() == 0:
        return
    above = mass > most
    if bool(above.any()):
        position = int(above.to(torch.int32).argmax())
        raise ValueError(
            f"{_OP}: teacher_logprobs must be log-probabilities, whose probabilities sum to at "
            f"most 1, got exp(teacher_logprobs) that sum to {math.exp(mass[position]):.6g} at "
            f"position {position}. Logits become log-probabilities through log_softmax over the "
            "whole vocabulary."
        )


def _check_some_id(mass: Tensor, token_weights: Tensor | None) -> None:
    """On CPU: elsewhere it would wait, and such a row is NaN."""
    if mass.device.type != "cpu" or mass.numel() == 0:
        return
    is_empty = mass == -math.inf
    if token_weights is not None:
        is_empty &= token_weights != 0
    if bool(is_empty.any()):
        position = int(is_empty.to(torch.int32).argmax())
        raise ValueError(
            f"{_OP}: teacher_ids must name a token of some probability in every row that counts "
            f"where the teacher is renormalized, got none at position {position}. Give the row the "
            "token weight 0, or use tail='bucket', of which such a row is 0."
        )


def _check_whole(total: Tensor, most: float) -> None:
    """On CPU: elsewhere it would wait."""
    if total.device.type != "cpu" or total.numel() == 0:
        return
    outside = total.abs() > most
    if bool(outside.any()):
        position = int(outside.to(torch.int32).argmax())
        raise ValueError(
            f"{_OP}: tail_logprob must be the log of what teacher_logprobs leave of 1, got "
            f"probabilities and a tail that sum to {math.exp(total[position]):.6g} at position "
            f"{position}. Columns beyond the top k that hold another id take from the tail; "
            "tail_logprob=None computes it."
        )


def _cells_fake(ids, logprobs, tail_logprob, token_weights, vocab_size, tail, in_float64):
    num_tokens, num_ids = ids.shape
    real = torch.float64 if in_float64 else torch.float32
    cells = logprobs.new_empty((num_tokens, num_ids + has_tail_cell(tail)), dtype=real)
    return ids.new_empty(ids.shape, dtype=torch.int64), cells


def teacher_cells(
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    tail_logprob: Tensor | None,
    token_weights: Tensor | None,
    vocab_size: int,
    tail: int,
    real: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(ids [T, K] for the row kernels, the teacher's log-masses [T, K] or [T, K + 1])."""
    return torch.ops.opd.topk_divergence_cells(
        teacher_ids,
        teacher_logprobs,
        tail_logprob,
        token_weights,
        vocab_size,
        tail,
        real == torch.float64,
    )


def student_cells(logprobs: Tensor, tail_logprob: Tensor, tail: int) -> Tensor:
    """The student's log-masses beside those of `teacher_cells`."""
    if not has_tail_cell(tail):
        return logprobs
    return torch.cat([logprobs, tail_logprob.to(logprobs.dtype).unsqueeze(1)], dim=1)


def logit_gradients(
    grad_logprobs: Tensor,
    grad_tail: Tensor | None,
    logprobs: Tensor,
    tail_logprob: Tensor,
    lse: Tensor,
    *,
    only_ratios: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_ids, grad_rest, lse) of topk_divergence_bwd, from d / d log-mass of each cell.

    With G their sum, d / dz_v = g_v - q_v G at the ids, and (g_tail / q_tail - G) q_v off them,
    where q_v = q_tail exp(z_v - lse - log q_tail): g_tail - q_tail G, divided among the tail.
    `only_ratios` of the masses matter: G is 0 but for its rounding, and so is all off the ids.
    """
    real = logprobs.dtype
    if only_ratios:
        return grad_logprobs.to(real).contiguous(), torch.zeros_like(lse, dtype=real), lse
    total = grad_logprobs.sum(1, dtype=torch.float64)
    if grad_tail is not None:
        total = total + grad_tail
    # of rows that do not count nothing may come back, not even NaN
    is_zero = total == 0
    pull = logprobs.to(torch.float64).exp() * total.unsqueeze(1)
    at_ids = grad_logprobs - torch.where(is_zero.unsqueeze(1), 0.0, pull)
    has_tail = tail_logprob != -math.inf
    rest = torch.where(is_zero, 0.0, -tail_logprob.exp() * total)
    if grad_tail is not None:
        rest = rest + grad_tail
    # without a tail its entries are -inf and get 0
    rest = torch.where(has_tail, rest, -total)
    relative = torch.where(has_tail, lse + tail_logprob, lse)
    return at_ids.to(real).contiguous(), rest.to(real), relative


register("topk_divergence_cells", fake=_cells_fake, python=_cells)
