# SPDX-License-Identifier: Apache-2.0
"""What every row kernel does: log-sum-exp online in lanes, split a float64 shift, launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ._math import exp_minus_distance

# integers that change from batch to batch: no kernel is compiled again for 1 or a multiple of 16.
# In a tuple they would be specialised whatever a kernel says
COUNTS = (
    "num_tokens", "num_labels", "num_topk_ids", "num_ids", "num_programs", "num_columns",
    "num_rows", "num_teacher_rows", "num_student_rows", "first_column",
)  # fmt: skip


def tile(vocab_size: int) -> tuple[int, int]:
    """(BLOCK_V, num_warps) for rows of this length.

    8 columns per thread keep two rows and their sums in registers (tests/triton_offline.py counts
    them); 8 warps leave room for a second program on the SM, which streams while this one reduces.
    """
    block_v = min(max(triton.next_power_of_2(vocab_size), 128), 2048)
    return block_v, max(block_v // 256, 1)


@triton.jit
def open_lanes(BLOCK_V: tl.constexpr):
    """(largest, sum relative to it, column of the largest) of each lane: so far, of nothing."""
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    return largest, tl.zeros((BLOCK_V,), tl.float32), tl.arange(0, BLOCK_V)


@triton.jit
def add_to_lanes(logits, columns, largest, total, where_largest):
    """The same, with one more block of logits."""
    # of exp(old max - new max) and exp(logit - new max) one is 1, so a lane needs one exp, and
    # the loop no reduction; -inf adds nothing, NaN stays
    decay = tl.where(logits == float("-inf"), 0.0, exp_minus_distance(logits, largest))
    is_larger = logits > largest
    total = tl.where(is_larger, total * decay + 1.0, total + decay)
    where_largest = tl.where(is_larger, columns, where_largest)
    return tl.where(is_larger, logits, largest), total, where_largest


@triton.jit
def close_lanes(largest, total, where_largest, vocab_size):
    """(largest, sum relative to it in float64, first column of the largest) of all lanes."""
    row_largest = tl.max(largest, 0)
    # a lane of nothing but -inf has 0, or NaN if it saw one, but no distance
    scaled = total * exp_minus_distance(largest, row_largest)
    scaled = tl.where(largest == float("-inf"), total, scaled)
    argmax = tl.min(tl.where(largest == row_largest, where_largest, vocab_size), 0)
    return row_largest, tl.sum(scaled.to(tl.float64), 0), argmax


@triton.jit
def split(lse):
    """A float64 shift as two float32, so that the rounding of a large lse does not scale a row."""
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    # inf - inf would hide that the row has no finite logit
    return high, tl.where(tl.abs(high) == float("inf"), 0.0, low)


# opd_dtype_t of the gradients that may be narrower than their float32 logits
_NARROW = {2: torch.bfloat16, 3: torch.float16}


def gradient_in_place(logits: torch.Tensor, grad_dtype: int) -> torch.Tensor:
    """[T, V] that the gradient of these logits goes to: themselves, or the first half of each row.

    A kernel that narrows reads a tile, waits for its other threads, and writes the tile's 16-bit
    values, in ascending order: what they cover of the row was read with them or with a tile before.

    Raises:
        RuntimeError: the dtype is neither that of the logits (-1) nor 16 bits of float32 ones.
    """
    if grad_dtype == -1:
        return logits
    if grad_dtype not in _NARROW or logits.dtype != torch.float32:
        raise RuntimeError(
            "opd: grad_dtype must be -1, or 2 (bfloat16) or 3 (float16) with float32 logits, got "
            f"{grad_dtype} with {logits.dtype}"
        )
    return logits.view(_NARROW[grad_dtype])[:, : logits.shape[1]]


def launch(kernel, num_programs: int, num_warps: int, *args, **constants) -> None:
    """Runs the programs on the device of the first tensor in the arguments; none, no launch."""
    if num_programs == 0:
        return
    device = next(_tensors(args)).device
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device:
        kernel[(num_programs,)](*args, **constants, num_warps=num_warps)


def _tensors(args: tuple) -> Iterator[torch.Tensor]:
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
