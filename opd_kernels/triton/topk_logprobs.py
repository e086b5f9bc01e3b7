# SPDX-License-Identifier: Apache-2.0
"""The num_topk largest entries of a row, its log-sum-exp and entropy, and the mass of the rest.

The launcher has the signature of the `opd` schema. A program takes rows one after another and reads
each twice. The first time each of LANES lanes keeps its largest entry; the num_topk-th of these is
a threshold that num_topk entries reach, and fewer than num_topk lanes have an entry above it, which
bounds how many are. The second time those entries are listed, with the first num_topk equal to the
threshold, and all others go into sums of the tail. The best of the list are found by bisection and
placed by counting how many are better. Nothing depends on the order of threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._laws import load_side
from ._math import exp_minus_distance, log1p_float64
from ._packing import _side
from ._rows import COUNTS, launch, tile

# the list of a program holds what a hostile row may put there; programs share this much memory
_LIST_BYTES = 64 << 20
_MOST_PROGRAMS = 1024


@triton.jit
def _order(values):
    """int32 that increase with the values; -0 and +0 are one."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(keys):
    order = (keys >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key(order, columns):
    """int64: the larger value first, of equal ones the smaller column."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def _id_of(keys):
    return (0x7FFFFFFF - (keys & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _add_to_tail(values, largest, total, moment):
    """Lanes of (largest, sum of e^x, sum of x e^x), x = value - largest, with more values."""
    decay = tl.where(values == float("-inf"), 0.0, exp_minus_distance(values, largest))
    is_larger = values > largest
    size = tl.abs(values - largest)
    # an infinite distance, of nothing seen yet, times nothing
    scaled = tl.where(decay == 0.0, 0.0, decay * (moment - total * size))
    added = moment - tl.where(decay == 0.0, 0.0, decay * size)
    moment = tl.where(is_larger, scaled, added)
    total = tl.where(is_larger, total * decay + 1.0, total + decay)
    return tl.where(is_larger, values, largest), total, moment


@triton.jit
def _close_tail(largest, total, moment):
    """(largest, sum, moment) of all lanes, the sums in float64 relative to it."""
    of_row = tl.max(largest, 0)
    is_empty = total == 0.0
    distance = tl.where(is_empty, 0.0, (largest - of_row).to(tl.float64))
    decay = tl.where(is_empty, 0.0, tl.exp(distance))
    total = total.to(tl.float64)
    moments = decay * (moment.to(tl.float64) + distance * total)
    return of_row, tl.sum(decay * total, 0), tl.sum(moments, 0)


@triton.jit
def _sampled_order(law, row, vocab_size, num_topk, LANES: tl.constexpr):
    """(order that num_topk entries reach, whether the row has a NaN or a +inf)."""
    lanes = tl.arange(0, LANES)
    largest = tl.full((LANES,), float("-inf"), tl.float32)
    is_broken = tl.zeros((LANES,), tl.int32)
    for begin in range(0, vocab_size, LANES):
        columns = begin + lanes
        logits = load_side(law, row, columns, columns < vocab_size)
        is_broken |= ((logits != logits) | (logits == float("inf"))).to(tl.int32)
        largest = tl.where(logits > largest, logits, largest)
    order = _order(largest)
    low = tl.min(order, 0).to(tl.int64)
    high = tl.max(order, 0).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        reach = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), 0)
        is_low = reach >= num_topk
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
    return low.to(tl.int32), tl.max(is_broken, 0) != 0


@triton.jit
def _list_above(law, row, vocab_size, num_topk, threshold, keys_ptr, BLOCK_V: tl.constexpr):
    """(entries listed, lanes of the tail): those above the threshold, and equals while wanted."""
    lanes = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    moment = tl.zeros((BLOCK_V,), tl.float32)
    count = tl.full((), 0, tl.int32)
    num_equal = tl.full((), 0, tl.int32)
    for begin in range(0, vocab_size, BLOCK_V):
        columns = begin + lanes
        logits = load_side(law, row, columns, columns < vocab_size)
        order = _order(logits)
        is_real = (logits == logits) & (logits != float("-inf"))
        is_listed = (order >= threshold) & is_real
        if tl.max(is_listed.to(tl.int32), 0) != 0:
            is_equal = is_listed & (order == threshold)
            place = num_equal + tl.cumsum(is_equal.to(tl.int32), 0)
            is_listed = is_listed & ((order > threshold) | (place <= num_topk))
            at = count + tl.cumsum(is_listed.to(tl.int32), 0) - 1
            tl.store(keys_ptr + at, _key(order, columns), mask=is_listed)
            count += tl.sum(is_listed.to(tl.int32), 0)
            num_equal += tl.sum(is_equal.to(tl.int32), 0)
        rest = tl.where(is_listed, float("-inf"), logits)
        largest, total, moment = _add_to_tail(rest, largest, total, moment)
    return count, largest, total, moment


@triton.jit
def _bound(keys_ptr, count, wanted, BLOCK_V: tl.constexpr):
    """The key that the `wanted` best of the list reach, and no other; all of them if fewer."""
    lanes = tl.arange(0, BLOCK_V)
    low = tl.full((), -0x7FFFFFFFFFFFFFFF, tl.int64)
    high = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    reach = count
    while reach > wanted:
        # the sum of both may not fit
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        found = tl.full((), 0, tl.int32)
        for begin in range(0, count, BLOCK_V):
            at = begin + lanes
            keys = tl.load(keys_ptr + at, mask=at < count, other=-0x7FFFFFFFFFFFFFFF)
            found += tl.sum((keys >= middle).to(tl.int32), 0)
        is_low = found >= wanted
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
        reach = tl.where(is_low, found, reach)
    return low


@triton.jit
def _split_list(keys_ptr, best_ptr, count, bound, largest, total, moment, BLOCK_V: tl.constexpr):
    """Moves the keys from `bound` on to best_ptr, adds the others to the tail."""
    lanes = tl.arange(0, BLOCK_V)
    moved = tl.full((), 0, tl.int32)
    for begin in range(0, count, BLOCK_V):
        at = begin + lanes
        keys = tl.load(keys_ptr + at, mask=at < count, other=-0x7FFFFFFFFFFFFFFF)
        is_best = (at < count) & (keys >= bound)
        to = moved + tl.cumsum(is_best.to(tl.int32), 0) - 1
        tl.store(best_ptr + to, keys, mask=is_best)
        moved += tl.sum(is_best.to(tl.int32), 0)
        rest = tl.where((at < count) & (keys < bound), _value_of(keys), float("-inf"))
        largest, total, moment = _add_to_tail(rest, largest, total, moment)
    return moved, largest, total, moment


@triton.jit
def _sums_of_best(best_ptr, count, BLOCK_V: tl.constexpr):
    """(largest, sum, moment) beside the largest itself, whose term is 1; float64."""
    lanes = tl.arange(0, BLOCK_V)
    best = tl.full((), -0x7FFFFFFFFFFFFFFF, tl.int64)
    for begin in range(0, count, BLOCK_V):
        at = begin + lanes
        keys = tl.load(best_ptr + at, mask=at < count, other=-0x7FFFFFFFFFFFFFFF)
        best = tl.maximum(best, tl.max(keys, 0))
    largest = _value_of(best).to(tl.float64)
    total = tl.zeros((BLOCK_V,), tl.float64)
    moment = tl.zeros((BLOCK_V,), tl.float64)
    for begin in range(0, count, BLOCK_V):
        at = begin + lanes
        keys = tl.load(best_ptr + at, mask=at < count, other=0)
        is_term = (at < count) & (keys != best)
        distance = tl.where(is_term, _value_of(keys).to(tl.float64) - largest, 0.0)
        term = tl.where(is_term, tl.exp(distance), 0.0)
        total += term
        moment += term * distance
    return largest, tl.sum(total, 0), tl.sum(moment, 0)


@triton.jit
def _store_best(
    best_ptr, ids_ptr, logprobs_ptr, count, num_topk, lse, has_law, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Ids and log-probabilities, each at the place that the number of better ones says."""
    for begin in range(0, num_topk, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        is_there = k < count
        keys = tl.load(best_ptr + k, mask=is_there, other=-0x7FFFFFFFFFFFFFFF)
        place = tl.zeros((BLOCK_K,), tl.int32)
        for first in range(0, count, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            others = tl.load(best_ptr + j, mask=j < count, other=-0x7FFFFFFFFFFFFFFF)
            place += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), 1)
        place = tl.where(is_there, place, k)
        is_there = is_there & has_law
        logprobs = (_value_of(keys).to(tl.float64) - lse).to(tl.float32)
        logprobs = tl.where(is_there, logprobs, float("-inf"))
        tl.store(ids_ptr + place, tl.where(is_there, _id_of(keys), -1), mask=k < num_topk)
        logprobs = tl.where(has_law, logprobs, float("nan"))
        tl.store(logprobs_ptr + place, logprobs, mask=k < num_topk)


@triton.jit
def _store_token_logprobs(
    law, row, vocab_size, token_ids_ptr, out_ptr, num_ids, lse, has_law, BLOCK_K: tl.constexpr
):
    for begin in range(0, num_ids, BLOCK_K):
        j = begin + tl.arange(0, BLOCK_K)
        ids = tl.load(token_ids_ptr + j, mask=j < num_ids, other=-1)
        # an id out of range is the caller's error: NaN, not a read beyond the row
        is_token = (ids >= 0) & (ids < vocab_size)
        logits = load_side(law, row, ids, is_token)
        logprobs = (logits.to(tl.float64) - lse).to(tl.float32)
        logprobs = tl.where(ids < 0, float("-inf"), logprobs)
        is_number = has_law & (ids < vocab_size)
        tl.store(out_ptr + j, tl.where(is_number, logprobs, float("nan")), mask=j < num_ids)


@triton.jit(do_not_specialize=COUNTS)
def _topk_logprobs_fwd_kernel(
    law, token_ids_ptr, ids_ptr, logprobs_ptr, lse_ptr, tail_logprob_ptr, entropy_ptr,
    token_logprobs_ptr, lists_ptr, num_tokens, vocab_size, num_topk, num_ids, num_programs,
    list_size, LANES: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    keys_ptr = lists_ptr + program.to(tl.int64) * (list_size + num_topk)
    best_ptr = keys_ptr + list_size
    nan = tl.full((), float("nan"), tl.float64)
    for at in range(program, num_tokens, num_programs):
        row = tl.full((), 0, tl.int64) + at
        threshold, is_broken = _sampled_order(law, row, vocab_size, num_topk, LANES)
        count, largest, total, moment = _list_above(
            law, row, vocab_size, num_topk, threshold, keys_ptr, BLOCK_V
        )
        # other threads have written what this one reads
        tl.debug_barrier()
        bound = _bound(keys_ptr, count, num_topk, BLOCK_V)
        num_best, largest, total, moment = _split_list(
            keys_ptr, best_ptr, count, bound, largest, total, moment, BLOCK_V
        )
        tl.debug_barrier()
        tail_largest, tail_total, tail_moment = _close_tail(largest, total, moment)
        best, row_total, row_moment = _sums_of_best(best_ptr, num_best, BLOCK_V)
        has_tail = tail_total > 0.0
        distance = tl.where(has_tail, tail_largest.to(tl.float64) - best, 0.0)
        decay = tl.where(has_tail, tl.exp(distance), 0.0)
        row_total += decay * tail_total
        row_moment += decay * (tail_moment + distance * tail_total)
        log_total = log1p_float64(row_total)
        has_law = (num_best > 0) & (is_broken == 0)
        lse = tl.where(has_law, best + log_total, nan)
        lse = tl.where((num_best == 0) & (is_broken == 0), float("-inf"), lse)
        entropy = log_total - row_moment / (1.0 + row_total)
        tail_log = tl.log(tl.where(has_tail, tail_total, 1.0))
        tail = tl.where(has_tail, distance + tail_log - log_total, float("-inf"))
        tl.store(lse_ptr + row, lse)
        tl.store(entropy_ptr + row, tl.where(has_law, entropy, nan).to(tl.float32))
        tl.store(tail_logprob_ptr + row, tl.where(has_law, tail, nan).to(tl.float32))
        _store_best(
            best_ptr, ids_ptr + row * num_topk, logprobs_ptr + row * num_topk, num_best, num_topk,
            lse, has_law, BLOCK_K, BLOCK_J,
        )  # fmt: skip
        if token_ids_ptr is not None:
            _store_token_logprobs(
                law, row, vocab_size, token_ids_ptr + row * num_ids,
                token_logprobs_ptr + row * num_ids, num_ids, lse, has_law, BLOCK_K,
            )  # fmt: skip
        # before the list of the next row
        tl.debug_barrier()


def topk_logprobs_fwd(
    logits: Tensor,
    token_ids: Tensor | None,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
    num_topk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids, logprobs, lse, tail_logprob, entropy, token_logprobs) of `opd::topk_logprobs_fwd`."""
    num_tokens = logits.shape[0]
    num_ids = 0 if token_ids is None else token_ids.shape[1]
    logprobs = logits.new_empty((num_tokens, num_topk), dtype=torch.float32)
    ids = torch.empty_like(logprobs, dtype=torch.int32)
    lse = logits.new_empty(num_tokens, dtype=torch.float64)
    tail_logprob, entropy = (torch.empty_like(lse, dtype=torch.float32) for _ in range(2))
    token_logprobs = logprobs.new_empty((num_tokens, num_ids))
    block_v, num_warps = tile(vocab_size)
    lanes = max(block_v, triton.next_power_of_2(2 * num_topk))
    # a column has a key, a place and three sums, for which half of the registers would be too few
    block_v = min(block_v, 1024)
    # fewer than num_topk lanes hold more than the threshold, each at most this many
    list_size = min(vocab_size, num_topk * (triton.cdiv(vocab_size, lanes) + 1))
    programs = min(num_tokens, _MOST_PROGRAMS, max(_LIST_BYTES // (8 * (list_size + num_topk)), 1))
    lists = logits.new_empty(programs * (list_size + num_topk), dtype=torch.int64)
    launch(
        _topk_logprobs_fwd_kernel, programs, num_warps,
        _side(logits, bias, numbers, temperatures), token_ids if num_ids else None, ids, logprobs,
        lse, tail_logprob, entropy, token_logprobs, lists, num_tokens, vocab_size, num_topk,
        num_ids, programs, list_size, LANES=lanes, BLOCK_V=block_v, BLOCK_K=64,
        BLOCK_J=min(max(triton.next_power_of_2(num_topk), 16), 128),
    )  # fmt: skip
    return ids, logprobs, lse, tail_logprob, entropy, token_logprobs
