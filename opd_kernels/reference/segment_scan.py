# SPDX-License-Identifier: Apache-2.0
"""Scans, reductions and statistics of packed segments, in float64, one segment at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_EMPTY = {"max": -torch.inf, "min": torch.inf}


class GroupStatistics(NamedTuple):
    """count [S] int64; mean [S], std [S], leave_one_out_mean [N] float64."""

    count: Tensor
    mean: Tensor
    std: Tensor
    leave_one_out_mean: Tensor


def _segments(offsets: Tensor, num_tokens: int) -> Iterator[slice]:
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or sorted(bounds) != bounds:
        raise ValueError(f"offsets must go from 0 to {num_tokens} and not decrease, got {bounds}.")
    for begin, end in pairwise(bounds):
        yield slice(begin, end)


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    # without a piece, an empty part of the input keeps the graph
    return torch.cat(pieces) if pieces else like.to(torch.float64)[:0]


def segment_scan(
    values: Tensor,
    offsets: Tensor,
    *,
    discount: float = 1.0,
    first_step: int = 0,
    num_steps: int | None = None,
    stride: int = 1,
    direction: str = "suffix",
) -> Tensor:
    """Discounted sums within segments.

    out[i] = sum_k discount^k values[i + k stride] (i - k stride for "prefix"), first_step <= k <
    first_step + num_steps, over the k whose token is in the segment of i.

    Args:
        values: [N], any floating dtype; upcast to float64. Differentiable.
        offsets: [S + 1] integers from 0 to N.
        discount: in [0, 1]; 0^0 = 1, and 0 times anything is 0.
        first_step, num_steps, stride: as in the formula; num_steps None: no limit.
        direction: "suffix" or "prefix".

    Returns:
        [N] float64.

    Source: the return of a Markov decision process; arXiv:2306.08543, arXiv:2504.19024.
    """
    pieces = []
    for segment in _segments(offsets, values.shape[0]):
        x = values[segment].to(torch.float64)
        x = x.flip(0) if direction == "suffix" else x
        length = x.shape[0]
        total = torch.zeros_like(x)
        k = first_step
        while k * stride < length and (num_steps is None or k < first_step + num_steps):
            if discount > 0 or k == 0:
                shifted = x[: length - k * stride]
                total = total + torch.cat([x.new_zeros(k * stride), discount**k * shifted])
            k += 1
        pieces.append(total.flip(0) if direction == "suffix" else total)
    return _joined(pieces, values)


def segment_reduce(
    values: Tensor,
    offsets: Tensor,
    *,
    reduction: str = "sum",
    token_weights: Tensor | None = None,
) -> Tensor:
    """sum w x, sum w x / sum w, or the extreme of the x with w != 0, of each segment.

    Args:
        values: [N], any floating dtype; upcast to float64. Differentiable.
        offsets: [S + 1] integers from 0 to N.
        reduction: "sum", "mean", "max" or "min".
        token_weights: [N]; default ones.

    Returns:
        [S] float64; where nothing counts, 0 (sum, mean), -inf (max), inf (min).
    """
    pieces = []
    for segment in _segments(offsets, values.shape[0]):
        x = values[segment].to(torch.float64)
        w = torch.ones_like(x) if token_weights is None else token_weights[segment].to(x.dtype)
        x, w = x[w != 0], w[w != 0]
        if reduction == "sum":
            reduced = (w * x).sum()
        elif reduction == "mean":
            reduced = (w * x).sum() / w.sum() if w.sum() != 0 else 0.0 * w.sum()
        elif x.shape[0] == 0:
            reduced = x.new_tensor(_EMPTY[reduction])
        else:
            # with an index, for the gradient to go to one token
            reduced = (x.max(0) if reduction == "max" else x.min(0)).values
        pieces.append(reduced.reshape(1))
    return _joined(pieces, values)


def segment_broadcast(segment_values: Tensor, offsets: Tensor, *, num_tokens: int) -> Tensor:
    """out[i] = segment_values[segment of i].

    Args:
        segment_values: [S], any floating dtype; upcast to float64. Differentiable.
        offsets: [S + 1] integers from 0 to num_tokens.
        num_tokens: N.

    Returns:
        [N] float64.
    """
    pieces = [
        segment_values[s].to(torch.float64).expand(segment.stop - segment.start)
        for s, segment in enumerate(_segments(offsets, num_tokens))
    ]
    return _joined(pieces, segment_values)


def group_statistics(
    values: Tensor, offsets: Tensor, *, mask: Tensor | None = None, correction: int = 1
) -> GroupStatistics:
    """count, mean, std and leave-one-out means of each group.

    Args:
        values: [N], any floating dtype; upcast to float64.
        offsets: [S + 1] integers from 0 to N.
        mask: [N]; members that count. Default: all.
        correction: 0 (population) or 1 (sample).

    Returns:
        GroupStatistics; a mean of nothing is 0, a std of at most `correction` values is 0.

    Source: the textbook; leave-one-out as the baseline of arXiv:2402.14740 (RLOO).
    """
    counts, means, stds, others = [], [], [], []
    for segment in _segments(offsets, values.shape[0]):
        x = values[segment].detach().to(torch.float64).tolist()
        included = [True] * len(x) if mask is None else [bool(m) for m in mask[segment].tolist()]
        members = [value for value, counted in zip(x, included, strict=True) if counted]
        mean = sum(members) / len(members) if members else 0.0
        squares = sum((value - mean) * (value - mean) for value in members)
        degrees = len(members) - correction
        counts.append(len(members))
        means.append(mean)
        stds.append((squares / degrees) ** 0.5 if degrees > 0 else 0.0)
        for i in range(len(x)):
            rest = [x[j] for j in range(len(x)) if j != i and included[j]]
            others.append(sum(rest) / len(rest) if rest else 0.0)
    count = torch.tensor(counts, dtype=torch.int64, device=values.device)
    real = (values.new_tensor(column, dtype=torch.float64) for column in (means, stds, others))
    return GroupStatistics(count, *real)
