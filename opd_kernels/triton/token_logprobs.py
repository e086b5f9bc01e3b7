# SPDX-License-Identifier: Apache-2.0
"""Log-probability of one token, log-sum-exp and entropy of a row of logits, one program per row.

The three launchers have the signatures of the `opd` schemas. With c0 = g_lse - g_logprob -
g_entropy H and c1 = -g_entropy: dz_v = (q_v (c0 + c1 log q_v) + g_logprob 1[v = id]) / temperature.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import exp
from ._rows import launch, load_logits, row_lse, split, tile


@triton.jit
def _token_logprobs_fwd_kernel(
    logits_ptr, token_ids_ptr, logprobs_ptr, lse_ptr, entropy_ptr, vocab_size, stride_logits,
    temperature, HAS_TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    lse = row_lse(row_ptr, vocab_size, temperature, HAS_TEMPERATURE, BLOCK_V)
    high, low = split(lse)
    lanes = tl.arange(0, BLOCK_V)
    entropy = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, vocab_size, BLOCK_V):
        logits = load_logits(row_ptr, begin + lanes, vocab_size, temperature, HAS_TEMPERATURE)
        lq = (logits - high) - low
        q = exp(lq)
        entropy -= tl.where(q == 0.0, 0.0, q * lq)
    token_id = tl.load(token_ids_ptr + row)
    # an id out of range is the caller's error: NaN, not a read beyond the row
    is_token = (token_id >= 0) & (token_id < vocab_size)
    logit = tl.load(row_ptr + token_id, mask=is_token, other=float("nan")).to(tl.float32)
    if HAS_TEMPERATURE:
        logit = tl.div_rn(logit, temperature)
    tl.store(logprobs_ptr + row, (logit - high) - low)
    tl.store(lse_ptr + row, lse)
    tl.store(entropy_ptr + row, tl.sum(entropy, 0))


@triton.jit
def _token_logprobs_bwd_kernel(
    grad_logprobs_ptr, grad_lse_ptr, grad_entropy_ptr, logits_ptr, token_ids_ptr, lse_ptr,
    entropy_ptr, grad_logits_ptr, vocab_size, grad_width, stride_logits, stride_grad, temperature,
    HAS_TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    grad_row_ptr = grad_logits_ptr + row * stride_grad
    grad_logprob = tl.load(grad_logprobs_ptr + row)
    grad_lse = tl.load(grad_lse_ptr + row).to(tl.float32)
    grad_entropy = tl.load(grad_entropy_ptr + row)
    token_id = tl.load(token_ids_ptr + row)
    high, low = split(tl.load(lse_ptr + row))
    c0 = (grad_lse - grad_logprob - grad_entropy * tl.load(entropy_ptr + row)) / temperature
    c1 = -grad_entropy / temperature
    # a row that counts for nothing is not read, so that NaN in it stays there
    is_zero = (grad_logprob == 0.0) & (grad_lse == 0.0) & (grad_entropy == 0.0)
    readable = tl.where(is_zero, 0, vocab_size)
    lanes = tl.arange(0, BLOCK_V)
    for begin in range(0, grad_width, BLOCK_V):
        columns = begin + lanes
        logits = load_logits(row_ptr, columns, readable, temperature, HAS_TEMPERATURE)
        lq = (logits - high) - low
        q = exp(lq)
        gradient = tl.where(q == 0.0, 0.0, q * (c0 + c1 * lq))
        gradient += tl.where(columns == token_id, grad_logprob / temperature, 0.0)
        gradient = tl.where(columns < readable, gradient, 0.0)
        gradient = gradient.to(grad_logits_ptr.dtype.element_ty)
        tl.store(grad_row_ptr + columns, gradient, mask=columns < grad_width)


def token_logprobs_fwd(
    logits: Tensor, token_ids: Tensor, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy) of `opd::token_logprobs_fwd`."""
    num_tokens = logits.shape[0]
    logprobs = logits.new_empty(num_tokens, dtype=torch.float32)
    lse = logits.new_empty(num_tokens, dtype=torch.float64)
    entropy = torch.empty_like(logprobs)
    block_v, num_warps = tile(vocab_size)
    launch(
        _token_logprobs_fwd_kernel, num_tokens, num_warps,
        logits, token_ids, logprobs, lse, entropy, vocab_size, logits.stride(0), temperature,
        HAS_TEMPERATURE=temperature != 1, BLOCK_V=block_v,
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
    temperature: float,
    vocab_size: int,
) -> Tensor:
    """grad_logits of `opd::token_logprobs_bwd`, zero beyond `vocab_size`."""
    grad_logits = logits.new_empty(logits.shape)
    _launch_bwd(
        grad_logprobs, grad_lse, grad_entropy, logits, token_ids, lse, entropy, grad_logits,
        temperature, vocab_size,
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
    temperature: float,
    vocab_size: int,
) -> None:
    """`opd::token_logprobs_bwd_`: the gradient overwrites the float32 logits."""
    _launch_bwd(
        grad_logprobs, grad_lse, grad_entropy, logits, token_ids, lse, entropy, logits,
        temperature, vocab_size,
    )  # fmt: skip


def _launch_bwd(
    grad_logprobs, grad_lse, grad_entropy, logits, token_ids, lse, entropy, grad_logits,
    temperature, vocab_size,
) -> None:  # fmt: skip
    num_tokens, grad_width = logits.shape
    block_v, num_warps = tile(vocab_size)
    launch(
        _token_logprobs_bwd_kernel, num_tokens, num_warps,
        grad_logprobs, grad_lse, grad_entropy, logits, token_ids, lse, entropy, grad_logits,
        vocab_size, grad_width, logits.stride(0), grad_logits.stride(0), temperature,
        HAS_TEMPERATURE=temperature != 1, BLOCK_V=block_v,
    )  # fmt: skip
