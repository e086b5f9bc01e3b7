# SPDX-License-Identifier: Apache-2.0
"""Log-probability of one token, log-sum-exp and entropy of a row of logits, one program per row.

The three launchers have the signatures of the `opd` schemas. With c0 = g_lse - g_logprob -
g_entropy H and c1 = -g_entropy: dz_v = slope_v (q_v (c0 + c1 log q_v) + g_logprob 1[v = id]),
slope_v = scale / temperature, times the softcap's own slope.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._laws import load_side, load_uncapped, slope_of
from ._math import exp, softcap_slope
from ._packing import _side
from ._rows import add_to_lanes, close_lanes, gradient_in_place, launch, open_lanes, split, tile


@triton.jit
def _row_lse(law, row, vocab_size, BLOCK_V: tl.constexpr):
    """Log-sum-exp of one row in float64."""
    largest, total, where_largest = open_lanes(BLOCK_V)
    for begin in range(0, vocab_size, BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        logits = load_side(law, row, columns, columns < vocab_size)
        largest, total, where_largest = add_to_lanes(logits, columns, largest, total, where_largest)
    row_largest, row_total, _ = close_lanes(largest, total, where_largest, vocab_size)
    return row_largest.to(tl.float64) + tl.log(row_total)


@triton.jit
def _token_logprobs_fwd_kernel(
    law, token_ids_ptr, logprobs_ptr, lse_ptr, entropy_ptr, vocab_size, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lse = _row_lse(law, row, vocab_size, BLOCK_V)
    high, low = split(lse)
    entropy = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, vocab_size, BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        lq = (load_side(law, row, columns, columns < vocab_size) - high) - low
        q = exp(lq)
        entropy -= tl.where(q == 0.0, 0.0, q * lq)
    token_id = tl.load(token_ids_ptr + row)
    # an id out of range is the caller's error: NaN, not a read beyond the row
    is_token = (token_id >= 0) & (token_id < vocab_size)
    logprob = (load_side(law, row, token_id, is_token) - high) - low
    tl.store(logprobs_ptr + row, tl.where(is_token, logprob, float("nan")))
    tl.store(lse_ptr + row, lse)
    tl.store(entropy_ptr + row, tl.sum(entropy, 0))


@triton.jit
def _token_logprobs_bwd_kernel(
    law, grad_logprobs_ptr, grad_lse_ptr, grad_entropy_ptr, token_ids_ptr, lse_ptr, entropy_ptr,
    grad_logits_ptr, vocab_size, grad_width, stride_grad, NARROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_row_ptr = grad_logits_ptr + row * stride_grad
    grad_logprob = tl.load(grad_logprobs_ptr + row)
    grad_lse = tl.load(grad_lse_ptr + row).to(tl.float32)
    grad_entropy = tl.load(grad_entropy_ptr + row)
    token_id = tl.load(token_ids_ptr + row)
    high, low = split(tl.load(lse_ptr + row))
    # a row that counts for nothing is not read, so that NaN in it stays there
    is_zero = (grad_logprob == 0.0) & (grad_lse == 0.0) & (grad_entropy == 0.0)
    readable = tl.where(is_zero, 0, vocab_size)
    slope = slope_of(law, row, 1.0)
    c0 = slope * (grad_lse - grad_logprob - grad_entropy * tl.load(entropy_ptr + row))
    c1 = -slope * grad_entropy
    for begin in range(0, grad_width, BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        inside = columns < readable
        lq = (load_side(law, row, columns, inside) - high) - low
        q = exp(lq)
        gradient = tl.where(q == 0.0, 0.0, q * (c0 + c1 * lq))
        gradient += tl.where(columns == token_id, slope * grad_logprob, 0.0)
        if law.softcap is not None:
            gradient *= softcap_slope(load_uncapped(law, row, columns, inside), law.softcap)
        gradient = tl.where(inside, gradient, 0.0)
        gradient = gradient.to(grad_logits_ptr.dtype.element_ty)
        if NARROWS:
            # what this tile overwrites, other threads have read by now
            tl.debug_barrier()
        tl.store(grad_row_ptr + columns, gradient, mask=columns < grad_width)


def token_logprobs_fwd(
    logits: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy) of `opd::token_logprobs_fwd`."""
    num_tokens = logits.shape[0]
    logprobs = logits.new_empty(num_tokens, dtype=torch.float32)
    lse = logits.new_empty(num_tokens, dtype=torch.float64)
    entropy = torch.empty_like(logprobs)
    block_v, num_warps = tile(vocab_size)
    launch(
        _token_logprobs_fwd_kernel, num_tokens, num_warps,
        _side(logits, bias, numbers, temperatures), token_ids, logprobs, lse, entropy, vocab_size,
        BLOCK_V=block_v,
    )  # fmt: skip
    return logprobs, lse, entropy


def token_logprobs_bwd(
    grad_logprobs: Tensor,
    grad_lse: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
) -> Tensor:
    """grad_logits of `opd::token_logprobs_bwd`, zero beyond `vocab_size`."""
    grad_logits = logits.new_empty(logits.shape)
    _launch_bwd(
        _side(logits, bias, numbers, temperatures), grad_logprobs, grad_lse, grad_entropy,
        token_ids, lse, entropy, grad_logits, vocab_size,
    )  # fmt: skip
    return grad_logits


def token_logprobs_bwd_(
    grad_logprobs: Tensor,
    grad_lse: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
    grad_dtype: int,
) -> None:
    """`opd::token_logprobs_bwd_`: the gradient overwrites the float32 logits."""
    _launch_bwd(
        _side(logits, bias, numbers, temperatures), grad_logprobs, grad_lse, grad_entropy,
        token_ids, lse, entropy, gradient_in_place(logits, grad_dtype), vocab_size,
        narrows=grad_dtype != -1,
    )  # fmt: skip


def _launch_bwd(
    law, grad_logprobs, grad_lse, grad_entropy, token_ids, lse, entropy, grad_logits, vocab_size,
    narrows=False,
) -> None:  # fmt: skip
    num_tokens, grad_width = grad_logits.shape
    block_v, num_warps = tile(vocab_size)
    launch(
        _token_logprobs_bwd_kernel, num_tokens, num_warps,
        law, grad_logprobs, grad_lse, grad_entropy, token_ids, lse, entropy, grad_logits,
        vocab_size, grad_width, grad_logits.stride(0), NARROWS=narrows, BLOCK_V=block_v,
    )  # fmt: skip
