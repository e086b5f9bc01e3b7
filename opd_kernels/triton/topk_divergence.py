# SPDX-License-Identifier: Apache-2.0
"""What a sparse divergence needs of a row of logits, and the row's gradient, one program per row.

The three launchers have the signatures of the `opd` schemas. Forward: log q at K ids, the log of
all mass off them, log-sum-exp and entropy, each logit read once. The ids are bits in global memory,
one per column; logits off the ids go into one set of running sums and the ids' own, gathered, into
another, so that neither mass is a difference. Backward: dz_v = slope_v q_v grad_rest off the ids
and slope_v grad_ids[k] on them, slope_v = scale / temperature times the softcap's own slope, q_v
relative to any lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._laws import load_side, load_uncapped, slope_of
from ._math import exp, exp_minus_distance, log1p_float64, softcap_slope
from ._packing import _side
from ._rows import COUNTS, gradient_in_place, launch, split, tile

# ids that a program has in registers at a time, where it does not need them all at once
_IDS = 512


@triton.jit
def _open_sums(BLOCK: tl.constexpr):
    """(largest, sum, weighted) of each lane: S = sum e^(z - largest), W = sum e^(...) (...)."""
    zeros = tl.zeros((BLOCK,), tl.float32)
    return tl.full((BLOCK,), float("-inf"), tl.float32), zeros, zeros


@triton.jit
def _add_to_sums(logits, largest, total, weighted):
    """The same, with one more block of logits; -inf adds nothing, NaN stays."""
    decay = tl.where(logits == float("-inf"), 0.0, exp_minus_distance(logits, largest))
    is_larger = logits > largest
    distance = tl.where(decay == 0.0, 0.0, logits - largest)
    moved = decay * (weighted - total * distance)
    weighted = tl.where(is_larger, moved, weighted + decay * distance)
    total = tl.where(is_larger, total * decay + 1.0, total + decay)
    return tl.where(is_larger, logits, largest), total, weighted


@triton.jit
def _close_sums(largest, total, weighted):
    """(largest, S, W) of all lanes, in float64 and relative to their largest."""
    row_largest = tl.max(largest, 0)
    is_nothing = largest == float("-inf")
    decay = tl.where(is_nothing, 1.0, exp_minus_distance(largest, row_largest))
    distance = tl.where(is_nothing | (decay == 0.0), 0.0, largest - row_largest)
    # a lane of nothing but -inf has 0, or NaN if it saw one, but no distance
    row_weighted = tl.sum((decay * (weighted + total * distance)).to(tl.float64), 0)
    return row_largest.to(tl.float64), tl.sum((decay * total).to(tl.float64), 0), row_weighted


@triton.jit
def _moved(largest, total, weighted, reference):
    """(S, W) relative to another, larger or equal logit."""
    is_nothing = largest == float("-inf")
    distance = tl.where(is_nothing, 0.0, largest - reference)
    decay = tl.exp(distance)
    return decay * total, decay * (weighted + total * distance)


@triton.jit(do_not_specialize=COUNTS)
def _topk_divergence_fwd_kernel(
    law, token_ids_ptr, marks_ptr, logprobs_ptr, tail_logprob_ptr, lse_ptr, entropy_ptr, num_ids,
    vocab_size, num_words, BLOCK_IDS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ids_ptr = token_ids_ptr + row * num_ids
    row_marks_ptr = marks_ptr + row * num_words
    lanes = tl.arange(0, BLOCK_V)
    for begin in range(0, num_words, BLOCK_V):
        words = begin + lanes
        tl.store(row_marks_ptr + words, tl.zeros((BLOCK_V,), tl.int32), mask=words < num_words)
    tl.debug_barrier()
    # the ids' own sums; one that another thread has marked has been counted
    on_largest, on_total, on_weighted = _open_sums(BLOCK_IDS)
    for begin in range(0, num_ids, BLOCK_IDS):
        k = begin + tl.arange(0, BLOCK_IDS)
        ids = tl.load(row_ids_ptr + k, mask=k < num_ids, other=-1)
        inside = (ids >= 0) & (ids < vocab_size)
        marks = tl.full((BLOCK_IDS,), 1, tl.int32) << (ids & 31).to(tl.int32)
        before = tl.atomic_or(row_marks_ptr + (ids >> 5), marks, mask=inside, sem="relaxed")
        logits = load_side(law, row, ids, inside & ((before & marks) == 0))
        on_largest, on_total, on_weighted = _add_to_sums(logits, on_largest, on_total, on_weighted)
    tl.debug_barrier()
    off_largest, off_total, off_weighted = _open_sums(BLOCK_V)
    for begin in range(0, vocab_size, BLOCK_V):
        columns = begin + lanes
        inside = columns < vocab_size
        marks = tl.load(row_marks_ptr + (columns >> 5), mask=inside, other=0)
        is_on = ((marks >> (columns & 31)) & 1) != 0
        logits = tl.where(is_on, float("-inf"), load_side(law, row, columns, inside))
        off_largest, off_total, off_weighted = _add_to_sums(
            logits, off_largest, off_total, off_weighted
        )

    on_largest, on_total, on_weighted = _close_sums(on_largest, on_total, on_weighted)
    off_largest, off_total, off_weighted = _close_sums(off_largest, off_total, off_weighted)
    largest = tl.where(off_largest > on_largest, off_largest, on_largest)
    on_part, on_weighted = _moved(on_largest, on_total, on_weighted, largest)
    off_part, off_weighted = _moved(off_largest, off_total, off_weighted, largest)
    total = on_part + off_part
    log_total = tl.log(total)
    # a row without a finite logit has no law: its lse is -inf, the rest NaN
    lse = largest + log_total
    # log sigmoid of how far the rest is ahead: exact where it is nothing and where it is all
    ahead = (off_largest + tl.log(off_total)) - (on_largest + tl.log(on_total))
    size = log1p_float64(tl.exp(tl.where(ahead > 0.0, -ahead, ahead)))
    tl.store(lse_ptr + row, lse)
    tl.store(tail_logprob_ptr + row, tl.where(ahead > 0.0, 0.0 - size, ahead - size))
    tl.store(entropy_ptr + row, log_total - (on_weighted + off_weighted) / total)
    for begin in range(0, num_ids, BLOCK_IDS):
        k = begin + tl.arange(0, BLOCK_IDS)
        ids = tl.load(row_ids_ptr + k, mask=k < num_ids, other=-1)
        logits = load_side(law, row, ids, (ids >= 0) & (ids < vocab_size))
        # an id out of range is the caller's error: NaN, not a read beyond the row
        logits = tl.where(ids < vocab_size, logits, float("nan"))
        logprobs = (logits.to(tl.float64) - lse).to(tl.float32)
        tl.store(logprobs_ptr + row * num_ids + k, logprobs, mask=k < num_ids)


@triton.jit(do_not_specialize=COUNTS)
def _topk_divergence_bwd_kernel(
    law, token_ids_ptr, grad_ids_ptr, grad_rest_ptr, lse_ptr, grad_logits_ptr, num_ids, vocab_size,
    grad_width, stride_grad, NARROWS: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_row_ptr = grad_logits_ptr + row * stride_grad
    slope = slope_of(law, row, 1.0)
    rest = tl.load(grad_rest_ptr + row)
    row_ids_ptr = token_ids_ptr + row * num_ids
    if law.softcap is not None:
        # the slopes of the ids, before the pass overwrites the logits that they are made of
        k = tl.arange(0, BLOCK_IDS)
        ids = tl.load(row_ids_ptr + k, mask=k < num_ids, other=-1)
        is_id = (ids >= 0) & (ids < vocab_size)
        slope_of_ids = slope * softcap_slope(load_uncapped(law, row, ids, is_id), law.softcap)
        tl.debug_barrier()
    high, low = split(tl.load(lse_ptr + row))
    # without a gradient off the ids, nothing there is read, so that NaN in it stays there
    readable = tl.where(rest == 0.0, 0, vocab_size)
    factor = slope * rest
    for begin in range(0, grad_width, BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        inside = columns < readable
        q = exp((load_side(law, row, columns, inside) - high) - low)
        gradient = tl.where(q == 0.0, 0.0, q * factor)
        if law.softcap is not None:
            gradient *= softcap_slope(load_uncapped(law, row, columns, inside), law.softcap)
        gradient = tl.where(inside, gradient, 0.0)
        if NARROWS:
            # what this tile overwrites, other threads have read by now
            tl.debug_barrier()
        gradient = gradient.to(grad_logits_ptr.dtype.element_ty)
        tl.store(grad_row_ptr + columns, gradient, mask=columns < grad_width)
    # the pass has written the columns of the ids, too
    tl.debug_barrier()
    for begin in range(0, num_ids, BLOCK_IDS):
        k = begin + tl.arange(0, BLOCK_IDS)
        ids = tl.load(row_ids_ptr + k, mask=k < num_ids, other=-1)
        is_id = (ids >= 0) & (ids < vocab_size)
        gradient = tl.load(grad_ids_ptr + row * num_ids + k, mask=is_id, other=0.0)
        if law.softcap is not None:
            gradient = tl.where(gradient == 0.0, 0.0, gradient * slope_of_ids)
        else:
            gradient = tl.where(gradient == 0.0, 0.0, gradient * slope)
        gradient = gradient.to(grad_logits_ptr.dtype.element_ty)
        tl.store(grad_row_ptr + ids, gradient, mask=is_id)


def topk_divergence_fwd(
    logits: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, tail_logprob, lse, entropy) of `opd::topk_divergence_fwd`."""
    num_tokens, num_ids = token_ids.shape
    logprobs = logits.new_empty(num_tokens, num_ids, dtype=torch.float32)
    tail_logprob = logits.new_empty(num_tokens, dtype=torch.float64)
    lse = torch.empty_like(tail_logprob)
    entropy = logits.new_empty(num_tokens, dtype=torch.float32)
    # rows of whole cache lines, 32 words each
    num_words = triton.cdiv(vocab_size, 1024) * 32
    marks = logits.new_empty(num_tokens, num_words, dtype=torch.int32)
    block_v, num_warps = tile(vocab_size)
    launch(
        _topk_divergence_fwd_kernel, num_tokens, num_warps,
        _side(logits, bias, numbers, temperatures), token_ids, marks, logprobs, tail_logprob, lse,
        entropy, num_ids, vocab_size, num_words,
        BLOCK_IDS=min(_block_of(num_ids, num_warps), _IDS), BLOCK_V=block_v,
    )  # fmt: skip
    return logprobs, tail_logprob, lse, entropy


def topk_divergence_bwd(
    logits: Tensor,
    token_ids: Tensor,
    grad_ids: Tensor,
    grad_rest: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
) -> Tensor:
    """grad_logits of `opd::topk_divergence_bwd`, zero beyond `vocab_size`."""
    grad_logits = logits.new_empty(logits.shape)
    _launch_bwd(
        _side(logits, bias, numbers, temperatures), token_ids, grad_ids, grad_rest, lse,
        grad_logits, vocab_size,
    )  # fmt: skip
    return grad_logits


def topk_divergence_bwd_(
    logits: Tensor,
    token_ids: Tensor,
    grad_ids: Tensor,
    grad_rest: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
    grad_dtype: int,
) -> None:
    """`opd::topk_divergence_bwd_`: the gradient overwrites the logits."""
    _launch_bwd(
        _side(logits, bias, numbers, temperatures), token_ids, grad_ids, grad_rest, lse,
        gradient_in_place(logits, grad_dtype), vocab_size, narrows=grad_dtype != -1,
    )  # fmt: skip


def _launch_bwd(
    law, token_ids, grad_ids, grad_rest, lse, grad_logits, vocab_size, narrows=False
) -> None:
    num_tokens, grad_width = grad_logits.shape
    num_ids = token_ids.shape[1]
    block_v, num_warps = tile(vocab_size)
    block_ids = _block_of(num_ids, num_warps)
    max_registers = None
    if law.softcap is None:
        block_ids = min(block_ids, _IDS)
    elif block_ids <= _IDS and num_warps == 8:
        # two programs on an SM: unasked, the assembler tries five and spills
        max_registers = 128
    launch(
        _topk_divergence_bwd_kernel, num_tokens, num_warps,
        law, token_ids, grad_ids, grad_rest, lse, grad_logits, num_ids, vocab_size, grad_width,
        grad_logits.stride(0), NARROWS=narrows, BLOCK_IDS=block_ids, BLOCK_V=block_v,
        maxnreg=max_registers,
    )  # fmt: skip


def _block_of(num_ids: int, num_warps: int) -> int:
    """Ids in a block of all of them: a power of two, and no id in two threads."""
    return max(triton.next_power_of_2(num_ids), 32 * num_warps)
