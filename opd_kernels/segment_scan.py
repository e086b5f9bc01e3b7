# SPDX-License-Identifier: Apache-2.0
"""Sums over packed segments: out[i] = sum_k discount^k values[i + k stride], and what goes with it.

A pack is values [N] and offsets [S + 1]: segment s (a sequence, a turn, a group of rollouts) is
values[offsets[s]:offsets[s + 1]]. All four functions are one family under the name `segment_scan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, reference
from ._registration import register

_OP = "segment_scan"
REDUCTIONS = ("sum", "mean", "max", "min")  # positions are ids of opd_reduction_t
_SUM, _MEAN = 0, 1
_DIRECTIONS = ("suffix", "prefix")
_WHOLE_SEGMENT = (1 << 63) - 1


class GroupStatistics(NamedTuple):
    """count [S] int64, mean [S], std [S], leave_one_out_mean [N]: constants, without gradient."""

    count: Tensor
    mean: Tensor
    std: Tensor
    leave_one_out_mean: Tensor


def segment_scan(
    values: Tensor,
    offsets: Tensor,
    *,
    discount: float = 1.0,
    first_step: int = 0,
    num_steps: int | None = None,
    stride: int = 1,
    direction: str = "suffix",
    backend: str | None = None,
) -> Tensor:
    """Discounted sums from every token towards the end (or the beginning) of its segment.

    out[i] = sum_k discount^k values[i + k stride],  first_step <= k < first_step + num_steps,
    over the k whose token is in the segment of i; i - k stride for direction="prefix". 0^0 = 1.

    The defaults are reward-to-go. With num_steps=K it is the sum of a K-step return, whose
    bootstrap is segment_scan(v, offsets, discount=g, first_step=K, num_steps=1); first_step=1
    leaves the token itself out; stride=K takes every K-th token.

    Args:
        values: [N], float32 | float64 | bfloat16 | float16 (float64 not on Triton). Differentiable.
        offsets: [S + 1] int64 or int32, from 0 to N, never decreasing; two equal neighbours are an
            empty segment. Checked on CPU; on a GPU it is the caller's contract.
        discount: in [0, 1]. 0 keeps only k = 0: what it would multiply is not read.
        first_step: the first k; >= 0.
        num_steps: how many k; >= 1. None: to the end of the segment.
        stride: tokens per step; >= 1.
        direction: "suffix" looks ahead, "prefix" looks back.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one.

    Returns:
        [N] float32 (float64 for float64 values), in the unit of the values (nats for log-ratios).
        Linear, so its gradient is the scan in the other direction, of any order.

    Raises:
        ValueError: shapes or numbers that do not fit. TypeError: unsupported dtype.
        RuntimeError: offsets that are not offsets (on CPU). UnsupportedBackendError.

    Source: the discounted, length-normalised returns of arXiv:2306.08543 (MiniLLM) and the K-step
    returns of arXiv:2504.19024 (KETCHUP).
    """
    offsets = _offsets("segment_scan", offsets, _values("segment_scan", "values", values))
    discount = _discount(discount)
    first_step = _integer("segment_scan", "first_step", first_step, 0)
    if num_steps is not None:
        num_steps = _integer("segment_scan", "num_steps", num_steps, 1)
    stride = _integer("segment_scan", "stride", stride, 1)
    _checks.one_of("segment_scan", "direction", direction, _DIRECTIONS)
    real = _checks.real_dtype(values)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(values), backend)
    if chosen == "reference":
        return reference.segment_scan(
            values,
            offsets,
            discount=discount,
            first_step=first_step,
            num_steps=num_steps,
            stride=stride,
            direction=direction,
        ).to(real)
    return _dispatch.row_ops(chosen).segment_scan_fwd(
        values.to(real).contiguous(),
        offsets,
        discount,
        first_step,
        _WHOLE_SEGMENT if num_steps is None else num_steps,
        stride,
        direction == "prefix",
    )


def segment_reduce(
    values: Tensor,
    offsets: Tensor,
    *,
    reduction: str = "sum",
    token_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One number per segment: per sequence, per turn, per chunk.

    sum: sum_i w_i x_i.  mean: sum_i w_i x_i / sum_i w_i.  max, min: over the tokens with w_i != 0.

    Args:
        values: [N], as for `segment_scan`. Differentiable.
        offsets: [S + 1], as for `segment_scan`.
        reduction: "sum" | "mean" | "max" | "min".
        token_weights: [N] numbers or bool, without gradient; default ones. A token of weight 0
            does not count and may hold anything, NaN included.
        backend: as for `segment_scan`.

    Returns:
        [S] float32 (float64 for float64 values). A segment in which nothing counts gives 0 (sum,
        mean), -inf (max) or inf (min); so does the mean of a segment whose weights sum to 0 give 0.
        The gradient of max and min goes to the first token that attains it.

    Raises:
        As `segment_scan`.
    """
    offsets = _offsets("segment_reduce", offsets, _values("segment_reduce", "values", values))
    _checks.one_of("segment_reduce", "reduction", reduction, REDUCTIONS)
    real = _checks.real_dtype(values)
    token_weights = _token_weights("segment_reduce", token_weights, values, real)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(values), backend)
    if chosen == "reference":
        return reference.segment_reduce(
            values, offsets, reduction=reduction, token_weights=token_weights
        ).to(real)
    reduced, _ = _dispatch.row_ops(chosen).segment_scan_reduce(
        values.to(real).contiguous(), token_weights, offsets, REDUCTIONS.index(reduction)
    )
    return reduced


def segment_broadcast(
    segment_values: Tensor,
    offsets: Tensor,
    *,
    num_tokens: int,
    backend: str | None = None,
) -> Tensor:
    """Gives every token the value of its segment: out[i] = segment_values[segment of i].

    Args:
        segment_values: [S], as the values of `segment_scan`. Differentiable.
        offsets: [S + 1], as for `segment_scan`.
        num_tokens: N, the last offset, which would have to be waited for on a GPU.
        backend: as for `segment_scan`.

    Returns:
        [N] float32 (float64 for float64 values); its gradient is the sum of each segment.

    Raises:
        As `segment_scan`.
    """
    op = "segment_broadcast"
    offsets = _offsets(op, offsets, _values(op, "segment_values", segment_values))
    _checks.length(op, "offsets", offsets, segment_values.shape[0] + 1, "segment_values plus one")
    num_tokens = _integer(op, "num_tokens", num_tokens, 0)
    real = _checks.real_dtype(segment_values)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(segment_values), backend)
    if chosen == "reference":
        return reference.segment_broadcast(segment_values, offsets, num_tokens=num_tokens).to(real)
    return _dispatch.row_ops(chosen).segment_scan_broadcast(
        segment_values.to(real).contiguous(), None, offsets, num_tokens
    )


def group_statistics(
    values: Tensor,
    offsets: Tensor,
    *,
    mask: Tensor | None = None,
    correction: int = 1,
    backend: str | None = None,
) -> GroupStatistics:
    """Mean, standard deviation and leave-one-out means of ragged groups, for advantages.

    mean[s] = sum_i x_i / n_s,  std[s] = sqrt(sum_i (x_i - mean[s])^2 / (n_s - correction)),
    leave_one_out_mean[i] = mean of the x_j of i's group with j != i; all over the n_s that count.

    Finite values give finite statistics: the mean of no value is 0 (that of an empty group; the
    leave-one-out mean in a group of one, whose advantage is then its reward), and the standard
    deviation of too few (n_s <= correction) or of equal values is exactly 0.

    Args:
        values: [N], one per rollout: rewards, scores. Must not require grad.
        offsets: [S + 1] of the groups, as for `segment_scan`.
        mask: [N] bool; False = the value does not count and may hold anything. Such a member still
            gets a leave-one-out mean: that of all who count. Default: all count.
        correction: 1 divides by n - 1 (sample, as torch.std), 0 by n (population).
        backend: as for `segment_scan`.

    Returns:
        GroupStatistics: count [S] int64; mean [S], std [S], leave_one_out_mean [N] in float32
        (float64 for float64 values).

    Raises:
        As `segment_scan`.
    """
    op = "group_statistics"
    offsets = _offsets(op, offsets, _values(op, "values", values))
    if values.requires_grad:
        raise ValueError(
            f"{op}: values must not require grad, got a tensor that does. Baselines are constants "
            "of the loss; detach() them."
        )
    if mask is not None:
        _per_token(op, "mask", mask, values)
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool, got {mask.dtype}.")
        mask = mask.to(torch.uint8).contiguous()
    if isinstance(correction, bool) or correction not in (0, 1):
        raise ValueError(f"{op}: correction must be 0 or 1, got {correction!r}.")
    real = _checks.real_dtype(values)
    chosen = _dispatch.select(_OP, _dispatch.meta_of(values), backend)
    if chosen == "reference":
        count, *rest = reference.group_statistics(values, offsets, mask=mask, correction=correction)
        return GroupStatistics(count, *(value.to(real) for value in rest))
    return GroupStatistics(
        *_dispatch.row_ops(chosen).segment_scan_group_statistics(
            values.to(real).contiguous(), mask, offsets, correction
        )
    )


def _values(op: str, name: str, value: Tensor) -> Tensor:
    _checks.tensor(op, name, value, 1)
    _checks.floating(op, **{name: value})
    return value


def _offsets(op: str, value: Tensor, like: Tensor) -> Tensor:
    """Contiguous int64 offsets; what they hold is checked by the kernel, on CPU."""
    _checks.tensor(op, "offsets", value, 1)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: offsets must be int64 or int32, got {value.dtype}.")
    if value.shape[0] == 0:
        raise ValueError(f"{op}: offsets must hold at least one value (0), got none.")
    if value.device != like.device:
        raise ValueError(f"{op}: offsets must be on {like.device}, got {value.device}.")
    return value.to(torch.int64).contiguous()


def _per_token(op: str, name: str, value: Tensor, like: Tensor) -> None:
    _checks.tensor(op, name, value, 1)
    _checks.length(op, name, value, like.shape[0], "values")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}.")


def _token_weights(op: str, value: Tensor | None, like: Tensor, real: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    _per_token(op, "token_weights", value, like)
    if value.requires_grad:
        raise ValueError(
            f"{op}: token_weights must not require grad, got a tensor that does. They are "
            "constants of the loss; detach() them."
        )
    return value.to(real).contiguous()


def _integer(op: str, name: str, value: int, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}.")
    if value < smallest:
        raise ValueError(f"{op}: {name} must be at least {smallest}, got {value}.")
    return value


def _discount(value: float) -> float:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{_OP}: discount must be a number, got {type(value).__name__}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{_OP}: discount must be in [0, 1], got {value}.")
    return float(value)


# -- the scan: linear, its gradient is itself in the other direction -------------------------------


def _scan_fake(values, offsets, discount, first_step, num_steps, stride, prefix):
    return values.new_empty(values.shape)


def _scan_setup_context(ctx, inputs, output):
    _, offsets, *ctx.options = inputs
    ctx.save_for_backward(offsets)


def _scan_backward(namespace):
    def backward(ctx, grad):
        (offsets,) = ctx.saved_tensors
        *options, prefix = ctx.options
        scan = getattr(torch.ops, namespace).segment_scan_fwd
        return scan(grad.contiguous(), offsets, *options, not prefix), *(None,) * 6

    return backward


# -- sums and broadcasts: each is the other's gradient ---------------------------------------------


def num_index(offsets: Tensor, reduction: int) -> int:
    """Length of the index output of `segment_scan_reduce`."""
    return offsets.shape[0] - 1 if reduction > _MEAN else 0


def _reduce_fake(values, weights, offsets, reduction):
    return (
        values.new_empty(offsets.shape[0] - 1),
        values.new_empty(num_index(offsets, reduction), dtype=torch.int64),
    )


def _reduce_setup_context(ctx, inputs, output):
    values, weights, offsets, ctx.reduction = inputs
    ctx.num_tokens = values.shape[0]
    ctx.save_for_backward(weights, offsets, output[1])


def _reduce_backward(namespace):
    def backward(ctx, grad, _):
        weights, offsets, index = ctx.saved_tensors
        ops = getattr(torch.ops, namespace)
        if ctx.reduction > _MEAN:
            # one more place at the end takes what belongs to segments in which nothing counts
            place = torch.where(index < 0, ctx.num_tokens, index)
            spread = grad.new_zeros(ctx.num_tokens + 1).index_add(0, place, grad)
            return spread[: ctx.num_tokens], None, None, None
        if ctx.reduction == _MEAN:
            if weights is None:
                total = (offsets[1:] - offsets[:-1]).to(grad.dtype)
            else:
                total, _ = ops.segment_scan_reduce(weights, None, offsets, _SUM)
            grad = torch.where(total == 0, 0, grad / torch.where(total == 0, 1, total))
        spread = ops.segment_scan_broadcast(grad.contiguous(), weights, offsets, ctx.num_tokens)
        return spread, None, None, None

    return backward


def _broadcast_fake(segment_values, weights, offsets, num_tokens):
    return segment_values.new_empty(num_tokens)


def _broadcast_setup_context(ctx, inputs, output):
    _, weights, offsets, _ = inputs
    ctx.save_for_backward(weights, offsets)


def _broadcast_backward(namespace):
    def backward(ctx, grad):
        ops = getattr(torch.ops, namespace)
        reduced, _ = ops.segment_scan_reduce(grad.contiguous(), *ctx.saved_tensors, _SUM)
        return reduced, None, None, None

    return backward


def _group_fake(values, mask, offsets, correction):
    num_groups = offsets.shape[0] - 1
    return (
        values.new_empty(num_groups, dtype=torch.int64),
        values.new_empty(num_groups),
        values.new_empty(num_groups),
        values.new_empty(values.shape),
    )


def _triton(name):
    def launcher(*arguments):
        from .triton import segment_scan as kernels

        return getattr(kernels, name)(*arguments)

    return launcher


register(
    "segment_scan_fwd",
    fake=_scan_fake,
    setup_context=_scan_setup_context,
    backward=_scan_backward,
    triton=_triton("segment_scan_fwd"),
)
register(
    "segment_scan_reduce",
    fake=_reduce_fake,
    setup_context=_reduce_setup_context,
    backward=_reduce_backward,
    triton=_triton("segment_scan_reduce"),
)
register(
    "segment_scan_broadcast",
    fake=_broadcast_fake,
    setup_context=_broadcast_setup_context,
    backward=_broadcast_backward,
    triton=_triton("segment_scan_broadcast"),
)
register(
    "segment_scan_group_statistics",
    fake=_group_fake,
    triton=_triton("segment_scan_group_statistics"),
)
