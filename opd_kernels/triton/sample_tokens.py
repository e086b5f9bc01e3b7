# SPDX-License-Identifier: Apache-2.0
"""Draws from a row's proposal by its inverse distribution function; distinct tokens, weighted.

The launcher has the signature of the `opd` schema. A program takes rows one after another: the
largest logit; the sum of each block, kept as sums up to its end; then, one draw after another, the
block that holds its place and the column inside it. Draws of one token are counted against each
other, so their order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._laws import load_side
from ._math import exp
from ._packing import _side
from ._rows import COUNTS, launch

_BLOCK_V, _BLOCK_N, _NUM_WARPS = 1024, 64, 8
_MOST_PROGRAMS = 1024


@triton.jit
def _largest(law, row, vocab_size, BLOCK_V: tl.constexpr):
    """(largest logit, whether the row has a NaN or a +inf)."""
    lanes = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    is_broken = tl.zeros((BLOCK_V,), tl.int32)
    for begin in range(0, vocab_size, BLOCK_V):
        columns = begin + lanes
        logits = load_side(law, row, columns, columns < vocab_size)
        is_broken |= ((logits != logits) | (logits == float("inf"))).to(tl.int32)
        largest = tl.where(logits > largest, logits, largest)
    return tl.max(largest, 0), tl.max(is_broken, 0) != 0


@triton.jit
def _sums(law, row, vocab_size, reference, factor, ends_ptr, BLOCK_V: tl.constexpr):
    """Sums of the law and of the proposal relative to the reference; the latter's at each end."""
    lanes = tl.arange(0, BLOCK_V)
    of_law = tl.full((), 0.0, tl.float64)
    of_proposal = tl.full((), 0.0, tl.float64)
    for begin in range(0, vocab_size, BLOCK_V):
        columns = begin + lanes
        x = load_side(law, row, columns, columns < vocab_size) - reference
        of_law += tl.sum(exp(x).to(tl.float64), 0)
        of_proposal += tl.sum(exp(factor * x).to(tl.float64), 0)
        tl.store(ends_ptr + begin // BLOCK_V, of_proposal)
    return of_law, of_proposal


@triton.jit
def _draw(
    law, row, vocab_size, reference, factor, ends, num_blocks, total, place,
    BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The first column at which the proposal's sum exceeds `place`."""
    blocks = tl.arange(0, BLOCK_E)
    is_block = blocks < num_blocks
    # where rounding has brought a place to the end of all: the last block that adds anything
    block = tl.sum((is_block & (ends <= place) & (ends < total)).to(tl.int32), 0)
    before = tl.max(tl.where(blocks < block, ends, 0.0), 0)
    lanes = tl.arange(0, BLOCK_V)
    columns = block * BLOCK_V + lanes
    x = load_side(law, row, columns, columns < vocab_size) - reference
    terms = exp(factor * x)
    upto = before + tl.cumsum(terms.to(tl.float64), 0)
    is_possible = terms > 0.0
    first = tl.min(tl.where(is_possible & (upto > place), lanes, BLOCK_V), 0)
    last = tl.max(tl.where(is_possible, lanes, 0), 0)
    return block * BLOCK_V + tl.minimum(first, last)


@triton.jit
def _count(draws_ptr, counts_ptr, num_draws, BLOCK_N: tl.constexpr):
    """How often each token was drawn, at its first draw; 0 at the others."""
    for begin in range(0, num_draws, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        ids = tl.load(draws_ptr + n, mask=n < num_draws, other=-1)
        count = tl.zeros((BLOCK_N,), tl.int32)
        earlier = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, num_draws, BLOCK_N):
            m = start + tl.arange(0, BLOCK_N)
            others = tl.load(draws_ptr + m, mask=m < num_draws, other=-2)
            is_same = others[None, :] == ids[:, None]
            count += tl.sum(is_same.to(tl.int32), 1)
            earlier += tl.sum((is_same & (m[None, :] < n[:, None])).to(tl.int32), 1)
        tl.store(counts_ptr + n, tl.where(earlier == 0, count, 0), mask=n < num_draws)


@triton.jit
def _store_draws(
    law, row, draws_ptr, counts_ptr, ids_ptr, weights_ptr, logprobs_ptr, num_draws, largest,
    factor, lse, log_law, log_proposal, has_law, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each distinct token at the place that the number of smaller ones says; then none."""
    for begin in range(0, num_draws, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        inside = n < num_draws
        ids = tl.load(draws_ptr + n, mask=inside, other=0)
        count = tl.load(counts_ptr + n, mask=inside, other=0)
        place = tl.zeros((BLOCK_N,), tl.int32)
        num_distinct = tl.full((), 0, tl.int32)
        for start in range(0, num_draws, BLOCK_N):
            m = start + tl.arange(0, BLOCK_N)
            others = tl.load(draws_ptr + m, mask=m < num_draws, other=0)
            is_first = tl.load(counts_ptr + m, mask=m < num_draws, other=0) > 0
            num_distinct += tl.sum(is_first.to(tl.int32), 0)
            is_smaller = is_first[None, :] & (others[None, :] < ids[:, None])
            place += tl.sum(is_smaller.to(tl.int32), 1)
        logits = load_side(law, row, ids, inside)
        x = (logits - largest).to(tl.float64)
        ratio = tl.exp((x - log_law) - (x * factor.to(tl.float64) - log_proposal))
        weights = count.to(tl.float64) / num_draws * ratio
        logprobs = (logits.to(tl.float64) - lse).to(tl.float32)
        is_there = inside & (count > 0) & has_law
        tl.store(ids_ptr + place, ids, mask=is_there)
        tl.store(weights_ptr + place, weights.to(tl.float32), mask=is_there)
        tl.store(logprobs_ptr + place, logprobs, mask=is_there)
        is_none = inside & ((n >= num_distinct) | (has_law == 0))
        nan = tl.full((BLOCK_N,), float("nan"), tl.float32)
        tl.store(ids_ptr + n, tl.full((BLOCK_N,), -1, tl.int32), mask=is_none)
        tl.store(weights_ptr + n, tl.where(has_law, 0.0, nan), mask=is_none)
        tl.store(logprobs_ptr + n, tl.where(has_law, float("-inf"), nan), mask=is_none)


@triton.jit(do_not_specialize=COUNTS)
def _sample_tokens_fwd_kernel(
    law, uniforms_ptr, ids_ptr, weights_ptr, logprobs_ptr, lse_ptr, ends_ptr, draws_ptr,
    num_tokens, vocab_size, num_draws, num_programs, num_blocks, factor, BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    own_ends_ptr = ends_ptr + program * num_blocks
    own_draws_ptr = draws_ptr + program * 2 * num_draws
    counts_ptr = own_draws_ptr + num_draws
    blocks = tl.arange(0, BLOCK_E)
    # a number, also where it is 1, which a kernel is compiled for
    factor = tl.full((), 0.0, tl.float32) + factor
    for at in range(tl.program_id(0), num_tokens, num_programs):
        row = tl.full((), 0, tl.int64) + at
        largest, is_broken = _largest(law, row, vocab_size, BLOCK_V)
        reference = tl.where(largest == float("-inf"), 0.0, largest)
        of_law, of_proposal = _sums(law, row, vocab_size, reference, factor, own_ends_ptr, BLOCK_V)
        # other threads have written what this one reads
        tl.debug_barrier()
        has_law = (is_broken == 0) & (largest > float("-inf"))
        log_law = tl.log(tl.where(has_law, of_law, 1.0))
        log_proposal = tl.log(tl.where(has_law, of_proposal, 1.0))
        lse = tl.where(has_law, largest.to(tl.float64) + log_law, float("-inf"))
        tl.store(lse_ptr + row, tl.where(is_broken, float("nan"), lse))
        ends = tl.load(own_ends_ptr + blocks, mask=blocks < num_blocks, other=float("inf"))
        for n in range(0, num_draws):
            place = tl.load(uniforms_ptr + row * num_draws + n) * of_proposal
            column = _draw(
                law, row, vocab_size, reference, factor, ends, num_blocks, of_proposal, place,
                BLOCK_V, BLOCK_E,
            )  # fmt: skip
            tl.store(own_draws_ptr + n, column)
        tl.debug_barrier()
        _count(own_draws_ptr, counts_ptr, num_draws, BLOCK_N)
        tl.debug_barrier()
        _store_draws(
            law, row, own_draws_ptr, counts_ptr, ids_ptr + row * num_draws,
            weights_ptr + row * num_draws, logprobs_ptr + row * num_draws, num_draws, reference,
            factor, lse, log_law, log_proposal, has_law, BLOCK_N,
        )  # fmt: skip
        # before the sums and draws of the next row
        tl.debug_barrier()


def sample_tokens_fwd(
    logits: Tensor,
    uniforms: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
    proposal_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, weights, logprobs, lse) of `opd::sample_tokens_fwd`."""
    num_tokens, num_draws = uniforms.shape
    weights = logits.new_empty((num_tokens, num_draws), dtype=torch.float32)
    ids, logprobs = torch.empty_like(weights, dtype=torch.int32), torch.empty_like(weights)
    lse = logits.new_empty(num_tokens, dtype=torch.float64)
    num_blocks = triton.cdiv(vocab_size, _BLOCK_V)
    programs = min(num_tokens, _MOST_PROGRAMS)
    ends = logits.new_empty(programs * num_blocks, dtype=torch.float64)
    draws = logits.new_empty(programs * 2 * num_draws, dtype=torch.int32)
    launch(
        _sample_tokens_fwd_kernel, programs, _NUM_WARPS,
        _side(logits, bias, numbers, temperatures), uniforms, ids, weights, logprobs, lse, ends,
        draws, num_tokens, vocab_size, num_draws, programs, num_blocks, 1.0 / proposal_temperature,
        BLOCK_V=_BLOCK_V, BLOCK_E=triton.next_power_of_2(num_blocks), BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    return ids, weights, logprobs, lse
