# SPDX-License-Identifier: Apache-2.0
"""Scans, reductions and statistics of packed segments, in float64 on the GPU.

A segment is cut into chunks that are counted from its own beginning (or end, for a suffix), never
from the pack's, so that no other segment changes a bit of its result. Segment s owns the slots from
offsets[s] // CHUNK + s on, which are at least as many as it has chunks: so the grid follows from
shapes alone, and a program finds its segment by bisection. With a stride, the residue classes of
positions are lines of their own and a segment owns `stride` slots more instead of one.

Offsets are clamped to [0, N]: wrong ones give wrong values but touch no memory outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import launch

CHUNK = 1024
_NUM_WARPS = 4
# chunk totals that are read at a time
_TOTALS = 128
# lines of a long stride are short: they are summed token by token instead
_MAX_SCAN_STRIDE = 16
# bits of the number of a chunk in its segment
_CHUNK_BITS = 24
_MEAN, _MAX, _MIN = 1, 2, 3
# numbers that change with every pack: a kernel is not compiled again for one that is 1 or 16 n
_SIZES = (
    "num_segments", "num_tokens", "num_slots", "stride", "shift", "half", "num_bits", "first_step",
    "num_steps", "correction",
)  # fmt: skip


@triton.jit
def _scaled(factor, x):
    """factor * x, where a factor that has underflowed does not turn an infinity into NaN."""
    return tl.where(tl.abs(x) == float("inf"), tl.where(factor == 0.0, x, factor * x), factor * x)


@triton.jit
def _float64(high, low):
    """A float64 argument from its two float32 parts."""
    zero = tl.program_id(0).to(tl.float64) * 0.0
    return (zero + high) + (zero + low)


@triton.jit
def _power(base, exponent, NUM_BITS: tl.constexpr):
    """base^exponent by repeated squaring, for exponents in [0, 2^NUM_BITS)."""
    result = exponent.to(tl.float64) * 0.0 + 1.0
    for _ in tl.static_range(NUM_BITS):
        result = tl.where(exponent % 2 == 1, result * base, result)
        exponent = exponent // 2
        base = base * base
    return result


@triton.jit
def _bound(offsets_ptr, index, num_tokens, mask):
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + index, mask=mask, other=0), 0), num_tokens)


@triton.jit
def _segment_of(
    offsets_ptr, num_segments, num_tokens, position, slots, half, num_bits, UNIT: tl.constexpr
):  # fmt: skip
    """The last s with offsets[s] // UNIT + s * slots <= position; a scalar or one per lane."""
    found = position * 0
    step = found + half
    for _ in range(num_bits):
        candidate = found + step
        is_segment = candidate < num_segments
        first = _bound(offsets_ptr, candidate, num_tokens, is_segment) // UNIT + candidate * slots
        found = tl.where(is_segment & (first <= position), candidate, found)
        step = step // 2
    return found


@triton.jit
def _ends(offsets_ptr, segment, num_tokens, mask):
    """(begin, end) of a segment."""
    begin = _bound(offsets_ptr, segment, num_tokens, mask)
    return begin, tl.maximum(begin, _bound(offsets_ptr, segment + 1, num_tokens, mask))


@triton.jit
def _chunk_of(
    offsets_ptr, num_segments, num_tokens, stride, half, num_bits, CHUNK: tl.constexpr
):  # fmt: skip
    """(segment's begin, length, residue, chunk of the residue's line, first slot of that line).

    The length is 0 where the slot of this program belongs to no chunk.
    """
    slot = tl.program_id(0).to(tl.int64)
    segment = _segment_of(
        offsets_ptr, num_segments, num_tokens, slot, stride, half, num_bits, CHUNK
    )
    begin, end = _ends(offsets_ptr, segment, num_tokens, segment < num_segments)
    length = end - begin
    line_chunks = tl.maximum((length + stride * CHUNK - 1) // (stride * CHUNK), 1)
    # negative only where offsets are wrong
    number = tl.maximum(slot - (begin // CHUNK + segment * stride), 0)
    residue = number // line_chunks
    chunk = number % line_chunks
    return begin, tl.where(residue < stride, length, 0), residue, chunk, slot - chunk


@triton.jit
def _chunk_values(
    values_ptr, begin, length, residue, chunk, stride, PREFIX: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """(values as float64, their positions in the segment, counted the way the sum runs)."""
    position = residue + (chunk * CHUNK + tl.arange(0, CHUNK)) * stride
    token = begin + (position if PREFIX else length - 1 - position)
    return tl.load(values_ptr + token, mask=position < length, other=0.0).to(tl.float64), position


@triton.jit(do_not_specialize=_SIZES)
def _scan_totals_kernel(
    values_ptr, offsets_ptr, totals_ptr, num_segments, num_tokens, stride, half, num_bits,
    discount_high, discount_low, PREFIX: tl.constexpr, HAS_DISCOUNT: tl.constexpr,
    LANE_BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The scan at the last position of each chunk, of the chunk alone."""
    begin, length, residue, chunk, first_slot = _chunk_of(
        offsets_ptr, num_segments, num_tokens, stride, half, num_bits, CHUNK
    )
    x, _ = _chunk_values(values_ptr, begin, length, residue, chunk, stride, PREFIX, CHUNK)
    if HAS_DISCOUNT:
        discount = _float64(discount_high, discount_low)
        x = _scaled(_power(discount, CHUNK - 1 - tl.arange(0, CHUNK), LANE_BITS), x)
    tl.store(totals_ptr + first_slot + chunk, tl.sum(x, 0))


@triton.jit
def _combine(factor, sum_, next_factor, next_sum):
    return factor * next_factor, next_sum + _scaled(next_factor, sum_)


@triton.jit(do_not_specialize=_SIZES)
def _scan_kernel(
    values_ptr, offsets_ptr, totals_ptr, out_ptr, num_segments, num_tokens, stride, shift, half,
    num_bits, discount_high, discount_low, scale_high, scale_low, PREFIX: tl.constexpr,
    HAS_DISCOUNT: tl.constexpr, LANE_BITS: tl.constexpr, CHUNK_BITS: tl.constexpr,
    TOTALS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The scan of a chunk, with what the chunks before it add; written `shift` positions on."""
    begin, length, residue, chunk, first_slot = _chunk_of(
        offsets_ptr, num_segments, num_tokens, stride, half, num_bits, CHUNK
    )
    discount = _float64(discount_high, discount_low)
    scale = _float64(scale_high, scale_low)
    lanes = tl.arange(0, CHUNK)
    per_chunk = _power(discount, chunk * 0 + CHUNK, LANE_BITS)
    carried = tl.zeros((TOTALS,), tl.float64)
    # a program without a chunk reads no totals
    for earlier in range(0, tl.where(length > 0, chunk, 0), TOTALS):
        other = earlier + tl.arange(0, TOTALS)
        is_earlier = other < chunk
        totals = tl.load(totals_ptr + first_slot + other, mask=is_earlier, other=0.0)
        if HAS_DISCOUNT:
            age = tl.where(is_earlier, chunk - 1 - other, 0)
            totals = _scaled(_power(per_chunk, age, CHUNK_BITS), totals)
        carried += totals
    carry = tl.sum(carried, 0)
    x, position = _chunk_values(values_ptr, begin, length, residue, chunk, stride, PREFIX, CHUNK)
    if HAS_DISCOUNT:
        _, sums = tl.associative_scan((lanes.to(tl.float64) * 0.0 + discount, x), 0, _combine)
        sums += _scaled(_power(discount, lanes + 1, LANE_BITS), carry)
    else:
        sums = tl.cumsum(x, 0) + carry
    target = position + shift
    token = begin + (target if PREFIX else length - 1 - target)
    sums = _scaled(scale, sums).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token, sums, mask=target < length)
    token = begin + (position if PREFIX else length - 1 - position)
    tl.store(out_ptr + token, 0.0, mask=position < tl.minimum(shift, length))


@triton.jit(do_not_specialize=_SIZES)
def _window_kernel(
    values_ptr, offsets_ptr, out_ptr, num_segments, num_tokens, first_step, num_steps, stride, half,
    num_bits, discount_high, discount_low, scale_high, scale_low, PREFIX: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Each token sums its own few terms, nearest first."""
    token = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    is_token = token < num_tokens
    segment = _segment_of(offsets_ptr, num_segments, num_tokens, token, 0, half, num_bits, 1)
    begin, end = _ends(offsets_ptr, segment, num_tokens, is_token)
    position = token - begin if PREFIX else end - 1 - token
    # a position outside of the segment (of a pack whose offsets are wrong) has no term
    steps = tl.where(position < 0, 0, position // stride - first_step + 1)
    steps = tl.where(is_token, tl.minimum(steps, num_steps), 0)
    discount = _float64(discount_high, discount_low)
    factor = _float64(scale_high, scale_low)
    distance = (token * 0 + first_step) * stride
    total = tl.zeros((CHUNK,), tl.float64)
    for step in range(0, tl.max(steps, 0)):
        source = token - distance if PREFIX else token + distance
        x = tl.load(values_ptr + source, mask=step < steps, other=0.0).to(tl.float64)
        total += _scaled(factor, x)
        factor *= discount
        distance += stride
    tl.store(out_ptr + token, total.to(out_ptr.dtype.element_ty), mask=is_token)


@triton.jit
def _extreme(x, token, counts, none, SIGN: tl.constexpr):
    """(the largest SIGN * x, the first token that has it, or the first NaN); `none` if none."""
    is_number = counts & (x == x)
    first_nan = tl.min(tl.where(counts & (x != x), token, none), 0)
    best = tl.max(tl.where(is_number, SIGN * x, float("-inf")), 0)
    first = tl.min(tl.where(is_number & (SIGN * x == best), token, none), 0)
    has_nan = first_nan < none
    return tl.where(has_nan, float("nan"), SIGN * best), tl.where(has_nan, first_nan, first)


@triton.jit(do_not_specialize=_SIZES)
def _reduce_chunks_kernel(
    values_ptr, weights_ptr, offsets_ptr, partial_ptr, weight_ptr, index_ptr, num_segments,
    num_tokens, half, num_bits, HAS_WEIGHTS: tl.constexpr, SIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Per chunk the sum and the weight, or with SIGN != 0 the extreme and its token."""
    slot = tl.program_id(0).to(tl.int64)
    begin, length, _, chunk, _ = _chunk_of(
        offsets_ptr, num_segments, num_tokens, 1, half, num_bits, CHUNK
    )
    x, position = _chunk_values(values_ptr, begin, length, 0, chunk, 1, True, CHUNK)
    counts = position < length
    weight = tl.where(counts, 1.0, 0.0).to(tl.float64)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + begin + position, mask=counts, other=0.0).to(tl.float64)
        counts = counts & (weight != 0.0)
    if SIGN == 0:
        tl.store(partial_ptr + slot, tl.sum(tl.where(counts, weight * x, 0.0), 0))
        tl.store(weight_ptr + slot, tl.sum(weight, 0))
    else:
        value, token = _extreme(x, begin + position, counts, num_tokens, SIGN)
        tl.store(partial_ptr + slot, value)
        tl.store(index_ptr + slot, token)


@triton.jit(do_not_specialize=_SIZES)
def _reduce_segments_kernel(
    offsets_ptr, partial_ptr, weight_ptr, index_ptr, out_ptr, out_index_ptr, num_tokens, num_slots,
    IS_MEAN: tl.constexpr, SIGN: tl.constexpr, TOTALS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Joins the chunks of a segment, one program per segment."""
    segment = tl.program_id(0).to(tl.int64)
    begin, end = _ends(offsets_ptr, segment, num_tokens, True)
    num_chunks = (end - begin + CHUNK - 1) // CHUNK
    first_slot = begin // CHUNK + segment
    lanes = tl.arange(0, TOTALS)
    if SIGN == 0:
        sums = tl.zeros((TOTALS,), tl.float64)
        weights = tl.zeros((TOTALS,), tl.float64)
        for earlier in range(0, num_chunks, TOTALS):
            slot = first_slot + earlier + lanes
            is_chunk = (earlier + lanes < num_chunks) & (slot < num_slots)
            sums += tl.load(partial_ptr + slot, mask=is_chunk, other=0.0)
            weights += tl.load(weight_ptr + slot, mask=is_chunk, other=0.0)
        value = tl.sum(sums, 0)
        if IS_MEAN:
            weight = tl.sum(weights, 0)
            value = tl.where(weight == 0.0, 0.0, value / tl.where(weight == 0.0, 1.0, weight))
        tl.store(out_ptr + segment, value.to(out_ptr.dtype.element_ty))
    else:
        best = begin.to(tl.float64) * 0.0 - SIGN * float("inf")
        token = begin * 0 + num_tokens
        for earlier in range(0, num_chunks, TOTALS):
            slot = first_slot + earlier + lanes
            is_chunk = (earlier + lanes < num_chunks) & (slot < num_slots)
            values = tl.load(partial_ptr + slot, mask=is_chunk, other=0.0)
            tokens = tl.load(index_ptr + slot, mask=is_chunk, other=0)
            counts = is_chunk & (tokens < num_tokens)
            value, first = _extreme(values, tokens, counts, num_tokens, SIGN)
            is_better = (best == best) & ((value != value) | (SIGN * value > SIGN * best))
            takes = (first < num_tokens) & ((token == num_tokens) | is_better)
            best = tl.where(takes, value, best)
            token = tl.where(takes, first, token)
        tl.store(out_ptr + segment, best.to(out_ptr.dtype.element_ty))
        tl.store(out_index_ptr + segment, tl.where(token == num_tokens, -1, token))


@triton.jit(do_not_specialize=_SIZES)
def _broadcast_kernel(
    segment_values_ptr, weights_ptr, offsets_ptr, out_ptr, num_segments, num_tokens, half, num_bits,
    HAS_WEIGHTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    is_token = token < num_tokens
    segment = _segment_of(offsets_ptr, num_segments, num_tokens, token, 0, half, num_bits, 1)
    value = tl.load(segment_values_ptr + segment, mask=is_token, other=0.0)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + token, mask=is_token, other=0.0)
        value = tl.where(weight == 0.0, 0.0, weight * value)
    tl.store(out_ptr + token, value, mask=is_token)


@triton.jit
def _members(values_ptr, mask_ptr, token, end, HAS_MASK: tl.constexpr):
    counts = token < end
    if HAS_MASK:
        counts = counts & (tl.load(mask_ptr + token, mask=counts, other=0) != 0)
    return tl.load(values_ptr + token, mask=counts, other=0.0).to(tl.float64), counts


@triton.jit(do_not_specialize=_SIZES)
def _group_statistics_kernel(
    values_ptr, mask_ptr, offsets_ptr, count_ptr, mean_ptr, std_ptr, others_ptr, num_tokens,
    correction, HAS_MASK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per group. Its members are float32, so n equal ones sum to n times them."""
    group = tl.program_id(0).to(tl.int64)
    begin, end = _ends(offsets_ptr, group, num_tokens, True)
    lanes = tl.arange(0, CHUNK)
    members = tl.zeros((CHUNK,), tl.int64)
    finite_members = tl.zeros((CHUNK,), tl.int64)
    sums = tl.zeros((CHUNK,), tl.float64)
    finite_sums = tl.zeros((CHUNK,), tl.float64)
    for first in range(begin, end, CHUNK):
        x, counts = _members(values_ptr, mask_ptr, first + lanes, end, HAS_MASK)
        is_finite = counts & (x - x == 0.0)
        members += counts.to(tl.int64)
        finite_members += is_finite.to(tl.int64)
        sums += x
        finite_sums += tl.where(is_finite, x, 0.0)
    count = tl.sum(members, 0)
    num_finite = tl.sum(finite_members, 0)
    finite_sum = tl.sum(finite_sums, 0)
    mean = tl.sum(sums, 0) / tl.maximum(count, 1).to(tl.float64)
    squares = tl.zeros((CHUNK,), tl.float64)
    for first in range(begin, end, CHUNK):
        x, counts = _members(values_ptr, mask_ptr, first + lanes, end, HAS_MASK)
        squares += tl.where(counts, (x - mean) * (x - mean), 0.0)
    degrees = count - correction
    variance = tl.sum(squares, 0) / tl.maximum(degrees, 1).to(tl.float64)
    std = tl.where(degrees > 0, tl.sqrt(variance), 0.0)
    tl.store(count_ptr + group, count)
    tl.store(mean_ptr + group, mean.to(mean_ptr.dtype.element_ty))
    tl.store(std_ptr + group, std.to(std_ptr.dtype.element_ty))
    for first in range(begin, end, CHUNK):
        x, counts = _members(values_ptr, mask_ptr, first + lanes, end, HAS_MASK)
        others = count - counts.to(tl.int64)
        divisor = tl.maximum(others, 1).to(tl.float64)
        # leaving out the one member that is not finite leaves a finite mean
        is_odd_one = counts & (num_finite == others) & (x - x != 0.0)
        without = tl.where(is_odd_one, finite_sum / divisor, mean + (mean - x) / divisor)
        is_hopeless = (num_finite < count) & (is_odd_one == 0)
        value = tl.where(counts & (is_hopeless == 0), without, mean)
        value = tl.where(others == 0, 0.0, value).to(others_ptr.dtype.element_ty)
        tl.store(others_ptr + first + lanes, value, mask=first + lanes < end)


def _split(value: float) -> tuple[float, float]:
    """A float64 as two float32, which is what a kernel gets of a number."""
    high = torch.tensor(value, dtype=torch.float32).double()
    return float(high), value - float(high)


def _bisection(num_segments: int) -> tuple[int, int]:
    """(first step, number of steps) of the search for one of `num_segments`."""
    num_bits = max(num_segments - 1, 1).bit_length()
    return 1 << (num_bits - 1), num_bits


def segment_scan_fwd(
    values: Tensor,
    offsets: Tensor,
    discount: float,
    first_step: int,
    num_steps: int,
    stride: int,
    prefix: bool,
) -> Tensor:
    """`opd::segment_scan_fwd`. Given num_steps it takes time in proportion to them."""
    num_tokens, num_segments = values.shape[0], offsets.shape[0] - 1
    # a step beyond every token is a step beyond every token, however long
    stride, first_step = min(stride, max(num_tokens, 1)), min(first_step, num_tokens)
    if num_tokens == 0 or num_segments == 0 or (discount == 0 and first_step > 0):
        return torch.zeros_like(values)
    out = torch.empty_like(values)
    half, num_bits = _bisection(num_segments)
    factors = (*_split(discount), *_split(discount**first_step))
    is_whole = num_steps == (1 << 63) - 1 and discount > 0 and stride <= _MAX_SCAN_STRIDE
    if not is_whole:
        num_steps = 1 if discount == 0 else min(num_steps, num_tokens)
        launch(
            _window_kernel, triton.cdiv(num_tokens, CHUNK), _NUM_WARPS,
            values, offsets, out, num_segments, num_tokens, first_step, num_steps, stride, half,
            num_bits, *factors, PREFIX=prefix, CHUNK=CHUNK,
        )  # fmt: skip
        return out
    num_slots = num_tokens // CHUNK + num_segments * stride
    totals = values.new_empty(num_slots, dtype=torch.float64)
    constants = {"PREFIX": prefix, "HAS_DISCOUNT": discount != 1, "LANE_BITS": CHUNK.bit_length()}
    launch(
        _scan_totals_kernel, num_slots, _NUM_WARPS,
        values, offsets, totals, num_segments, num_tokens, stride, half, num_bits, *factors[:2],
        **constants, CHUNK=CHUNK,
    )  # fmt: skip
    launch(
        _scan_kernel, num_slots, _NUM_WARPS,
        values, offsets, totals, out, num_segments, num_tokens, stride, first_step * stride, half,
        num_bits, *factors, **constants, CHUNK_BITS=_CHUNK_BITS, TOTALS=_TOTALS, CHUNK=CHUNK,
    )  # fmt: skip
    return out


def segment_scan_reduce(
    values: Tensor, weights: Tensor | None, offsets: Tensor, reduction: int
) -> tuple[Tensor, Tensor]:
    """(reduced, index) of `opd::segment_scan_reduce`."""
    num_tokens, num_segments = values.shape[0], offsets.shape[0] - 1
    sign = {_MAX: 1, _MIN: -1}.get(reduction, 0)
    out = values.new_empty(num_segments)
    out_index = values.new_empty(num_segments if sign else 0, dtype=torch.int64)
    num_slots = num_tokens // CHUNK + num_segments
    partial = values.new_empty(num_slots, dtype=torch.float64)
    weight = values.new_empty(0 if sign else num_slots, dtype=torch.float64)
    index = values.new_empty(num_slots if sign else 0, dtype=torch.int64)
    half, num_bits = _bisection(num_segments)
    if num_segments == 0:
        return out, out_index
    launch(
        _reduce_chunks_kernel, num_slots, _NUM_WARPS,
        values, values if weights is None else weights, offsets, partial, weight, index,
        num_segments, num_tokens, half, num_bits, HAS_WEIGHTS=weights is not None, SIGN=sign,
        CHUNK=CHUNK,
    )  # fmt: skip
    launch(
        _reduce_segments_kernel, num_segments, 1,
        offsets, partial, weight, index, out, out_index, num_tokens, num_slots,
        IS_MEAN=reduction == _MEAN, SIGN=sign, TOTALS=_TOTALS, CHUNK=CHUNK,
    )  # fmt: skip
    return out, out_index


def segment_scan_broadcast(
    segment_values: Tensor, weights: Tensor | None, offsets: Tensor, num_tokens: int
) -> Tensor:
    """`opd::segment_scan_broadcast`."""
    num_segments = offsets.shape[0] - 1
    out = segment_values.new_empty(num_tokens)
    if num_segments == 0:
        return out.zero_()
    half, num_bits = _bisection(num_segments)
    launch(
        _broadcast_kernel, triton.cdiv(num_tokens, CHUNK), _NUM_WARPS,
        segment_values, segment_values if weights is None else weights, offsets, out, num_segments,
        num_tokens, half, num_bits, HAS_WEIGHTS=weights is not None, CHUNK=CHUNK,
    )  # fmt: skip
    return out


def segment_scan_group_statistics(
    values: Tensor, mask: Tensor | None, offsets: Tensor, correction: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(count, mean, std, leave_one_out_mean) of `opd::segment_scan_group_statistics`."""
    num_groups = offsets.shape[0] - 1
    count = values.new_empty(num_groups, dtype=torch.int64)
    mean, std = values.new_empty(num_groups), values.new_empty(num_groups)
    others = torch.empty_like(values)
    launch(
        _group_statistics_kernel, num_groups, _NUM_WARPS,
        values, values if mask is None else mask, offsets, count, mean, std, others,
        values.shape[0], correction, HAS_MASK=mask is not None, CHUNK=CHUNK,
    )  # fmt: skip
    return count, mean, std, others
