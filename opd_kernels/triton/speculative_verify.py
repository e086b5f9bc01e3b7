# SPDX-License-Identifier: Apache-2.0
"""What verification needs of each row, and the residual law of a pair of rows with a draw from it.

The launchers have the signatures of the `opd` schemas. Rows are cut into tiles, a program each, so
that few rows fill a GPU; a second kernel puts a row's tiles together in their order and looks for
the token in the one tile that has it. Short rows share a program. Where top-k or top-p cut, a third
kernel finds the cut by counting entries, or adding up their mass, above several candidates at once;
it reads the tiles whose largest entry may be kept.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._laws import load_side
from ._math import exp
from ._packing import _side
from ._rows import COUNTS, launch, split
from .topk_logprobs import _order

_COLUMNS = 2048
# of a cut: columns at a time, and candidates of a round
_CUT_COLUMNS, _CANDIDATES = 512, 4


class Sizes(NamedTuple):
    """Columns of a row, tiles of a row."""

    vocab_size: Any
    num_tiles: Any


class CutLaw(NamedTuple):
    """A side of the residual law: logits with what rows_fwd says of them; rows, factors [N]."""

    side: Any
    lse: Any
    floor: Any
    rows: Any
    scale: Any


def _tiling(vocab_size: int) -> tuple[int, int, int, int]:
    """(rows of a program, columns of a tile, tiles of a row, num_warps)."""
    columns = min(max(triton.next_power_of_2(vocab_size), 16), _COLUMNS)
    rows = _COLUMNS // columns
    # many rows have values of their own
    return rows, columns, triton.cdiv(vocab_size, columns), 4 if rows == 1 else 8


@triton.jit
def _rows_of(program, num_rows, ROWS: tl.constexpr):
    """(the program's rows, whether there is such a row); row 0 stands in for one that is not."""
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    return tl.where(is_row, rows, 0), is_row


@triton.jit
def _load(side, rows, columns, inside):
    """[rows, columns] logits; -inf where not inside."""
    return load_side(side, rows[:, None], columns, inside)


@triton.jit(do_not_specialize=COUNTS)
def _row_tiles_kernel(
    law, token_ids_ptr, sums_ptr, largest_ptr, argmax_ptr, before_ptr, sizes, num_rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program // sizes.num_tiles
    tile = program - group * sizes.num_tiles
    rows, is_row = _rows_of(group, num_rows, ROWS)
    ids = tl.load(token_ids_ptr + rows)
    # an id that no row can have is the caller's error: no answer, and no read beyond the row
    is_read = is_row & (ids >= -1) & (ids < sizes.vocab_size)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    z = _load(law, rows, columns, is_read[:, None] & (columns < sizes.vocab_size))
    has_id = is_read & (ids >= 0)
    of_id = load_side(law, rows, tl.where(has_id, ids, 0), has_id)
    # nothing is above a NaN
    of_id = tl.where(has_id, of_id, float("nan"))[:, None]
    # a NaN is not the largest, and shows in the sum
    largest = tl.max(tl.where(z == z, z, float("-inf")), 1)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(exp(z - reference[:, None]), 1)
    argmax = tl.min(tl.where(z == largest[:, None], columns, 0x7FFFFFFF), 1)
    is_before = (z > of_id) | ((z == of_id) & (columns < ids[:, None]))
    at = rows * sizes.num_tiles + tile
    tl.store(sums_ptr + at, total.to(tl.float64), mask=is_row)
    tl.store(largest_ptr + at, largest, mask=is_row)
    tl.store(argmax_ptr + at, argmax, mask=is_row)
    tl.store(before_ptr + at, tl.sum(is_before.to(tl.int32), 1), mask=is_row)


@triton.jit(do_not_specialize=COUNTS)
def _close_rows_kernel(
    law, token_ids_ptr, sums_ptr, largest_ptr, argmax_ptr, before_ptr, lse_ptr, floor_ptr,
    logprobs_ptr, ranks_ptr, row_argmax_ptr, row_largest_ptr, sizes, num_rows,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    rows, is_row = _rows_of(tl.program_id(0), num_rows, ROWS)
    tiles = tl.arange(0, TILES)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    inside = is_row[:, None] & (tiles < sizes.num_tiles)
    at = rows[:, None] * sizes.num_tiles + tiles
    of_tile = tl.load(largest_ptr + at, mask=inside, other=float("-inf"))
    largest = tl.max(of_tile, 1)
    sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
    # a tile of nothing but -inf adds 0, or NaN if it saw one
    distance = of_tile.to(tl.float64) - largest.to(tl.float64)[:, None]
    distance = tl.where(of_tile == float("-inf"), 0.0, distance)
    total = tl.sum(sums * tl.exp(distance), 1)
    column = tl.load(argmax_ptr + at, mask=inside, other=0x7FFFFFFF)
    is_best = of_tile == largest[:, None]
    argmax = tl.min(tl.where(is_best, column, 0x7FFFFFFF), 1)
    before = tl.sum(tl.load(before_ptr + at, mask=inside, other=0), 1)

    ids = tl.load(token_ids_ptr + rows)
    is_read = (ids >= -1) & (ids < sizes.vocab_size)
    is_broken = (total != total) | (largest == float("inf")) | (is_read == 0)
    has_law = (is_broken == 0) & (largest > float("-inf"))
    has_id = has_law & (ids >= 0)
    lse = largest.to(tl.float64) + tl.log(tl.where(has_law, total, 1.0))
    of_id = load_side(law, rows, tl.where(has_id, ids, 0), has_id)
    logprob = of_id.to(tl.float64) - lse
    tl.store(lse_ptr + rows, tl.where(is_broken, float("nan"), lse), mask=is_row)
    tl.store(floor_ptr + rows, tl.where(has_law, float("-inf"), float("nan")), mask=is_row)
    tl.store(logprobs_ptr + rows, tl.where(has_id, logprob, float("nan")), mask=is_row)
    tl.store(ranks_ptr + rows, tl.where(has_id, before, -1), mask=is_row)
    tl.store(row_argmax_ptr + rows, tl.where(has_law, argmax, -1), mask=is_row)
    tl.store(row_largest_ptr + rows, tl.where(is_broken, float("nan"), largest), mask=is_row)


@triton.jit
def _value_at(order):
    """The float of an order, as _order has it."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _lowest_wanted(largest_ptr, num_tiles, wanted, TILES: tl.constexpr):
    """An order that at least `wanted` entries reach: that many tiles have one."""
    tiles = tl.arange(0, TILES)
    inside = tiles < num_tiles
    order = _order(tl.load(largest_ptr + tiles, mask=inside, other=float("-inf")))
    low = _order(tl.full((), float("-inf"), tl.float32)).to(tl.int64)
    high = tl.max(order, 0).to(tl.int64) + 1
    high = tl.where(wanted <= num_tiles, high, low)
    while high - low > 1:
        middle = low + (high - low) // 2
        reach = tl.sum((inside & (order >= middle.to(tl.int32))).to(tl.int32), 0)
        low = tl.where(reach >= wanted, middle, low)
        high = tl.where(reach >= wanted, high, middle)
    return low


@triton.jit
def _reach(
    law, row, largest_ptr, largest, sizes, low, wanted, BY_MASS: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The largest order from which up the entries are `wanted`, or have that mass.

    What there is from `low` on is enough, but for rounding.
    """
    candidate = tl.arange(0, CANDIDATES)
    high = _order(largest).to(tl.int64) + 1
    while high - low > 1:
        orders = low + (high - low) * (candidate + 1) // (CANDIDATES + 1)
        bottom = _value_at(low.to(tl.int32))
        reach = tl.zeros((CANDIDATES, COLUMNS), tl.float64)
        for tile in range(0, sizes.num_tiles):
            if tl.load(largest_ptr + tile) >= bottom:
                for begin in range(tile * TILE, tile * TILE + TILE, COLUMNS):
                    columns = begin + tl.arange(0, COLUMNS)
                    z = load_side(law, row, columns, columns < sizes.vocab_size)
                    is_above = _order(z)[None, :] >= orders.to(tl.int32)[:, None]
                    if BY_MASS:
                        mass = exp(z - largest).to(tl.float64)[None, :]
                        reach += tl.where(is_above, mass, 0.0)
                    else:
                        is_above = is_above & (columns < sizes.vocab_size)[None, :]
                        reach += is_above.to(tl.float64)
        is_reached = tl.sum(reach, 1) >= wanted
        # candidates ascend: those that are reached come first
        low = tl.maximum(low, tl.max(tl.where(is_reached, orders, low), 0))
        high = tl.minimum(high, tl.min(tl.where(is_reached, high, orders), 0))
    return low


@triton.jit
def _sum_from(
    law, row, largest_ptr, largest, sizes, floor, TILE: tl.constexpr, COLUMNS: tl.constexpr
):
    """(sum of e^(z - largest) over z >= floor, how many they are)."""
    total = tl.zeros((COLUMNS,), tl.float64)
    count = tl.zeros((COLUMNS,), tl.int32)
    for tile in range(0, sizes.num_tiles):
        if tl.load(largest_ptr + tile) >= floor:
            for begin in range(tile * TILE, tile * TILE + TILE, COLUMNS):
                columns = begin + tl.arange(0, COLUMNS)
                z = load_side(law, row, columns, columns < sizes.vocab_size)
                is_kept = z >= floor
                total += tl.where(is_kept, exp(z - largest), 0.0).to(tl.float64)
                count += is_kept.to(tl.int32)
    return tl.sum(total, 0), tl.sum(count, 0)


@triton.jit
def _cut_rows_kernel(
    law, token_ids_ptr, largest_ptr, lse_ptr, floor_ptr, logprobs_ptr, row_largest_ptr, sizes,
    top_k, top_p_high, top_p_low, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tiles_ptr = largest_ptr + row * sizes.num_tiles
    largest = tl.load(row_largest_ptr + row)
    lse = tl.load(lse_ptr + row)
    if tl.abs(lse) < float("inf"):
        floor = tl.full((), float("-inf"), tl.float32)
        kept = tl.exp(lse - largest.to(tl.float64))
        count = tl.full((), 0, tl.int32) + sizes.vocab_size
        if HAS_TOP_K:
            low = _lowest_wanted(tiles_ptr, sizes.num_tiles, top_k, TILES)
            low = _reach(
                law, row, tiles_ptr, largest, sizes, low, top_k, False, TILE, COLUMNS, CANDIDATES
            )
            floor = _value_at(low.to(tl.int32))
            kept, count = _sum_from(law, row, tiles_ptr, largest, sizes, floor, TILE, COLUMNS)
        if HAS_TOP_P:
            # as a float64: what a kernel is given has 24 bits
            top_p = tl.full((), 0.0, tl.float64) + top_p_high + top_p_low
            # all entries below this one together have less than may be left out
            share = tl.log((1.0 - top_p) * kept / count) - 1e-3
            low = (largest.to(tl.float64) + share).to(tl.float32)
            low = _order(tl.minimum(tl.maximum(low, floor), largest)).to(tl.int64)
            low = _reach(
                law, row, tiles_ptr, largest, sizes, low, top_p * kept, True, TILE, COLUMNS,
                CANDIDATES,
            )  # fmt: skip
            floor = _value_at(low.to(tl.int32))
            kept, count = _sum_from(law, row, tiles_ptr, largest, sizes, floor, TILE, COLUMNS)
        lse = largest.to(tl.float64) + tl.log(kept)
        tl.store(lse_ptr + row, lse)
        tl.store(floor_ptr + row, floor)
        token_id = tl.load(token_ids_ptr + row)
        if token_id >= 0:
            of_id = load_side(law, row, token_id, token_id >= 0)
            logprob = tl.where(of_id >= floor, of_id.to(tl.float64) - lse, float("-inf"))
            tl.store(logprobs_ptr + row, logprob)


@triton.jit
def _law_rows(law, num_rows, at, is_row):
    """(rows of a side that rows `at` of the call take, whether there is one, lse, floor, scale)."""
    rows = tl.load(law.rows + at, mask=is_row, other=-1)
    has_row = (rows >= 0) & (rows < num_rows)
    rows = tl.where(has_row, rows, 0)
    lse = tl.load(law.lse + rows, mask=has_row, other=float("nan"))
    floor = tl.load(law.floor + rows, mask=has_row, other=float("nan"))
    return rows, has_row, lse, floor, tl.load(law.scale + at, mask=is_row, other=0.0)


@triton.jit
def _probabilities(law, rows, lse, floor, columns, inside):
    high, low = split(lse)
    z = _load(law.side, rows, columns, inside)
    p = exp((z - high[:, None]) - low[:, None])
    return tl.where(inside & (z >= floor[:, None]), p, 0.0)


@triton.jit
def _logprobs(law, rows, has_row, lse, floor, ids):
    has_law = has_row & (tl.abs(lse) < float("inf")) & (ids >= 0)
    z = load_side(law.side, rows, tl.where(has_law, ids, 0), has_law)
    logprobs = tl.where(z >= floor, z.to(tl.float64) - lse, float("-inf"))
    return tl.where(has_law, logprobs, float("nan"))


@triton.jit(do_not_specialize=COUNTS)
def _pair_tiles_kernel(
    teacher, student, mass_ptr, overlap_ptr, of_teacher_ptr, sizes, num_rows, num_teacher_rows,
    num_student_rows, HAS_STUDENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program // sizes.num_tiles
    tile = program - group * sizes.num_tiles
    at, is_row = _rows_of(group, num_rows, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    is_column = columns < sizes.vocab_size
    rows, has_row, lse, floor, factor = _law_rows(teacher, num_teacher_rows, at, is_row)
    has_law = has_row & (tl.abs(lse) < float("inf"))
    p = _probabilities(teacher, rows, lse, floor, columns, has_law[:, None] & is_column)
    r = factor.to(tl.float32)[:, None] * p
    least = tl.zeros_like(p)
    if HAS_STUDENT:
        rows, has_row, lse, floor, factor = _law_rows(student, num_student_rows, at, is_row)
        has_law = has_law & has_row & (factor != 0.0) & (tl.abs(lse) < float("inf"))
        q = _probabilities(student, rows, lse, floor, columns, has_law[:, None] & is_column)
        r -= factor.to(tl.float32)[:, None] * q
        least = tl.minimum(p, q)
    to = at * sizes.num_tiles + tile
    tl.store(mass_ptr + to, tl.sum(tl.where(r > 0.0, r, 0.0).to(tl.float64), 1), mask=is_row)
    tl.store(overlap_ptr + to, tl.sum(least.to(tl.float64), 1), mask=is_row)
    tl.store(of_teacher_ptr + to, tl.sum(p.to(tl.float64), 1), mask=is_row)


@triton.jit(do_not_specialize=COUNTS)
def _draw_kernel(
    teacher, student, uniforms_ptr, mass_ptr, overlap_ptr, of_teacher_ptr, row_mass_ptr,
    row_overlap_ptr, tokens_ptr, student_logprobs_ptr, teacher_logprobs_ptr, sizes, num_rows,
    num_teacher_rows, num_student_rows, HAS_STUDENT: tl.constexpr, DRAWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    at, is_row = _rows_of(tl.program_id(0), num_rows, ROWS)
    tiles = tl.arange(0, TILES)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    inside = is_row[:, None] & (tiles < sizes.num_tiles)
    from_tile = at[:, None] * sizes.num_tiles + tiles
    sums = tl.load(mass_ptr + from_tile, mask=inside, other=0.0)
    mass = tl.sum(sums, 1)
    overlap = tl.sum(tl.load(overlap_ptr + from_tile, mask=inside, other=0.0), 1)
    rows, has_row, lse, floor, factor = _law_rows(teacher, num_teacher_rows, at, is_row)
    has_law = has_row & (tl.abs(lse) < float("inf"))
    nan = tl.full((ROWS,), float("nan"), tl.float64)
    student_logprob = nan
    teacher_logprob = nan
    token = tl.full((ROWS,), -1, tl.int32)
    has_student = tl.zeros((ROWS,), tl.int1)
    if HAS_STUDENT:
        student_rows, has_student_row, student_lse, student_floor, less = _law_rows(
            student, num_student_rows, at, is_row
        )
        has_student = has_student_row & (less != 0.0)
        is_sound = tl.abs(student_lse) < float("inf")
        has_law = has_law & (is_sound | (has_student == 0))
    tl.store(row_mass_ptr + at, tl.where(has_law, mass, nan), mask=is_row)
    tl.store(row_overlap_ptr + at, tl.where(has_law & has_student, overlap, nan), mask=is_row)
    if DRAWS:
        # of a residual without mass the teacher's law itself
        is_residual = mass > 0.0
        of_teacher = tl.load(of_teacher_ptr + from_tile, mask=inside, other=0.0)
        sums = tl.where(is_residual[:, None], sums, of_teacher)
        factor = tl.where(is_residual, factor, 1.0).to(tl.float32)
        ends = tl.cumsum(sums, 1)
        has_any = sums > 0.0
        last = tl.max(tl.where(has_any, tiles, -1), 1)
        total = tl.max(tl.where(has_any, ends, 0.0), 1)
        place = tl.load(uniforms_ptr + at, mask=is_row, other=0.0) * total
        # where rounding has brought a place to the end of all: the last that adds anything
        is_here = has_any & ((ends > place[:, None]) | (tiles == last[:, None]))
        tile = tl.min(tl.where(is_here, tiles, TILES), 1)
        has_law = has_law & (tile < TILES)
        before = tl.sum(tl.where(tiles == tile[:, None], ends - sums, 0.0), 1)
        columns = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        readable = has_law[:, None] & (columns < sizes.vocab_size)
        r = factor[:, None] * _probabilities(teacher, rows, lse, floor, columns, readable)
        if HAS_STUDENT:
            is_read = readable & (has_student & is_residual)[:, None]
            q = _probabilities(student, student_rows, student_lse, student_floor, columns, is_read)
            r -= less.to(tl.float32)[:, None] * q
        terms = tl.where(r > 0.0, r, 0.0)
        upto = before[:, None] + tl.cumsum(terms.to(tl.float64), 1)
        is_possible = terms > 0.0
        last = tl.max(tl.where(is_possible, columns, -1), 1)
        is_here = is_possible & ((upto > place[:, None]) | (columns == last[:, None]))
        token = tl.min(tl.where(is_here, columns, 0x7FFFFFFF), 1)
        token = tl.where(has_law & (last >= 0), token, -1)
        teacher_logprob = _logprobs(teacher, rows, has_row, lse, floor, token)
        if HAS_STUDENT:
            student_logprob = _logprobs(
                student, student_rows, has_student_row, student_lse, student_floor, token
            )
    tl.store(tokens_ptr + at, token, mask=is_row)
    tl.store(student_logprobs_ptr + at, student_logprob, mask=is_row)
    tl.store(teacher_logprobs_ptr + at, teacher_logprob, mask=is_row)


def speculative_verify_rows_fwd(
    logits: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lse, floor, logprobs, ranks, argmax, largest) of `opd::speculative_verify_rows_fwd`."""
    num_rows = len(token_ids)
    rows, columns, num_tiles, num_warps = _tiling(vocab_size)
    tiles = triton.next_power_of_2(num_tiles)
    law, sizes = _side(logits, bias, numbers, temperatures), Sizes(vocab_size, num_tiles)
    lse, logprobs = (logits.new_empty(num_rows, dtype=torch.float64) for _ in range(2))
    floor, row_largest = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    ranks, row_argmax = (logits.new_empty(num_rows, dtype=torch.int32) for _ in range(2))
    sums = logits.new_empty((num_rows, num_tiles), dtype=torch.float64)
    largest = torch.empty_like(sums, dtype=torch.float32)
    argmax, before = (torch.empty_like(sums, dtype=torch.int32) for _ in range(2))
    groups = triton.cdiv(num_rows, rows)
    of_tiles = sums, largest, argmax, before
    launch(
        _row_tiles_kernel, groups * num_tiles, num_warps, law, token_ids, *of_tiles, sizes,
        num_rows, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    launch(
        _close_rows_kernel, groups, num_warps, law, token_ids, *of_tiles, lse, floor, logprobs,
        ranks, row_argmax, row_largest, sizes, num_rows, ROWS=rows, TILES=tiles,
    )  # fmt: skip
    has_top_k, has_top_p = 0 < top_k < vocab_size, top_p < 1.0
    if has_top_k or has_top_p:
        (high,) = struct.unpack("f", struct.pack("f", top_p))
        launch(
            _cut_rows_kernel, num_rows, num_warps, law, token_ids, largest, lse, floor, logprobs,
            row_largest, sizes, top_k, high, top_p - high, HAS_TOP_K=has_top_k,
            HAS_TOP_P=has_top_p, TILES=tiles, TILE=columns, COLUMNS=min(columns, _CUT_COLUMNS),
            CANDIDATES=_CANDIDATES,
        )  # fmt: skip
    return lse, floor, logprobs, ranks, row_argmax, row_largest


def speculative_verify_residual_fwd(
    teacher_logits: Tensor,
    student_logits: Tensor | None,
    teacher_rows: Tensor,
    student_rows: Tensor,
    teacher_lse: Tensor,
    teacher_floor: Tensor,
    student_lse: Tensor | None,
    student_floor: Tensor | None,
    teacher_scale: Tensor,
    student_scale: Tensor,
    uniforms: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_temperatures: Tensor | None,
    teacher_temperatures: Tensor | None,
    numbers: list[float],
    vocab_size: int,
    draws: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mass, overlap, tokens, student_logprobs, teacher_logprobs) of the schema of this name."""
    num_rows = len(teacher_rows)
    rows, columns, num_tiles, num_warps = _tiling(vocab_size)
    teacher = CutLaw(
        _side(teacher_logits, teacher_bias, numbers[3:6], teacher_temperatures),
        teacher_lse, teacher_floor, teacher_rows, teacher_scale,
    )  # fmt: skip
    student = None
    if student_logits is not None and len(student_logits) > 0:
        student = CutLaw(
            _side(student_logits, student_bias, numbers[0:3], student_temperatures),
            student_lse, student_floor, student_rows, student_scale,
        )  # fmt: skip
    # Triton 3.6 cannot ask whether a tuple with a None in it is None
    has_student = student is not None
    sizes = Sizes(vocab_size, num_tiles)
    num_student_rows = len(student_logits) if has_student else 0
    counts = num_rows, len(teacher_logits), num_student_rows
    # each of its own: a third of one piece would be aligned for some numbers of rows only
    of_tiles = [teacher_lse.new_empty((num_rows, num_tiles)) for _ in range(3)]
    mass, overlap, student_logprobs, teacher_logprobs = (
        teacher_lse.new_empty(num_rows) for _ in range(4)
    )
    tokens = torch.empty_like(mass, dtype=torch.int32)
    groups = triton.cdiv(num_rows, rows)
    launch(
        _pair_tiles_kernel, groups * num_tiles, num_warps, teacher, student, *of_tiles, sizes,
        *counts, HAS_STUDENT=has_student, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    launch(
        _draw_kernel, groups, num_warps, teacher, student, uniforms, *of_tiles, mass, overlap,
        tokens, student_logprobs, teacher_logprobs, sizes, *counts, HAS_STUDENT=has_student,
        DRAWS=draws, ROWS=rows, COLUMNS=columns, TILES=triton.next_power_of_2(num_tiles),
    )  # fmt: skip
    return mass, overlap, tokens, student_logprobs, teacher_logprobs
