# SPDX-License-Identifier: Apache-2.0
"""Alignment of tokens from its definition: all cheapest paths of the edit graph, counted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_UNK = 16
# a symbol is a byte, or the roles of a special token as ("special", roles); an empty token is that
# of a role which only empty tokens have
_EMPTY_ROLE = 32


class Alignment(NamedTuple):
    """student_offsets, teacher_offsets [C + 1] int64, is_aligned [C] bool, num_bytes [C] int64."""

    student_offsets: Tensor
    teacher_offsets: Tensor
    is_aligned: Tensor
    num_bytes: Tensor


class AlignedBatch(NamedTuple):
    """Alignments one after another, offsets in packed tokens; chunk_ends [B] int64."""

    student_offsets: Tensor
    teacher_offsets: Tensor
    is_aligned: Tensor
    num_bytes: Tensor
    chunk_ends: Tensor


def _is_special(symbol: Any) -> bool:
    return not isinstance(symbol, int)


def _roles(x: Any, y: Any) -> int:
    return x[1] & y[1] if _is_special(x) and _is_special(y) else 0


def _match(x: Any, y: Any) -> bool:
    return x == y or _roles(x, y) != 0


def _is_same(x: Any, y: Any) -> bool:
    return _roles(x, y) & ~_UNK != 0 if _is_special(x) else x == y


def _symbols(ids: Any, token_bytes: Any) -> tuple[list[Any], list[int]]:
    """The stream of symbols, and where in it each token ends."""
    roles = getattr(token_bytes, "symbols", None)
    stream: list[Any] = []
    ends = []
    for token_id in (int(token_id) for token_id in ids):
        role = 0 if roles is None else int(roles[token_id])
        data = b"" if role else token_bytes[token_id]
        stream += data if data else [("special", role or _EMPTY_ROLE)]
        ends.append(len(stream))
    return stream, ends


def _shared_nodes(x: list[Any], y: list[Any], max_edits: int) -> list[tuple[int, int]]:
    """Nodes of the edit graph on every path of minimum cost."""
    n, m = len(x), len(y)

    def edges(i: int, j: int) -> list[tuple[int, int, int]]:
        """(i, j, cost) of what node (i, j) leads to."""
        found = [(i + 1, j, 1)] if i < n else []
        found += [(i, j + 1, 1)] if j < m else []
        if i < n and j < m:
            if _match(x[i], y[j]):
                found.append((i + 1, j + 1, 0))
            elif not _is_special(x[i]) and not _is_special(y[j]):
                found.append((i + 1, j + 1, 1))
        return found

    # cost to the end, and the number of ways that have it
    cost: dict[tuple[int, int], int] = {(n, m): 0}
    ways: dict[tuple[int, int], int] = {(n, m): 1}
    order = [(i, j) for i in range(n, -1, -1) for j in range(m, -1, -1)]
    for node in order[1:]:
        options = [((i, j), price + cost[i, j]) for i, j, price in edges(*node)]
        cost[node] = min(total for _, total in options)
        ways[node] = sum(ways[to] for to, total in options if total == cost[node])
    if cost[0, 0] > max_edits and n > 0 and m > 0:
        front = back = 0
        while front < min(n, m) and _match(x[front], y[front]):
            front += 1
        while back < min(n, m) - front and _match(x[n - 1 - back], y[m - 1 - back]):
            back += 1
        return [(i, i) for i in range(front + 1)] + [(n - i, m - i) for i in range(back, -1, -1)]
    # ways from the start to a node, along cheapest edges alone
    reached = dict.fromkeys(order, 0)
    reached[0, 0] = 1
    for node in reversed(order):
        for i, j, price in edges(*node):
            if price + cost[i, j] == cost[node]:
                reached[i, j] += reached[node]
    return [node for node in reversed(order) if reached[node] * ways[node] == ways[0, 0]]


def _gaps(stream: list[Any]) -> list[list[Any]]:
    """The special symbols before the first byte, between each two, and after the last."""
    gaps: list[list[Any]] = [[]]
    for symbol in stream:
        if _is_special(symbol):
            gaps[-1].append(symbol)
        else:
            gaps.append([])
    return gaps


def _nodes(x: list[Any], y: list[Any], mode: str, max_edits: int) -> list[tuple[int, int]]:
    bytes_x, bytes_y = ([s for s in stream if not _is_special(s)] for stream in (x, y))
    if bytes_x != bytes_y:
        if mode == "strict":
            raise ValueError("align_tokens: the bytes of both sides must be the same.")
        return _shared_nodes(x, y, max_edits)
    nodes, i, j = [], 0, 0
    for gap_x, gap_y in zip(_gaps(x), _gaps(y), strict=True):
        nodes += [(i + a, j + b) for a, b in _shared_nodes(gap_x, gap_y, max_edits)]
        # and on to behind the next byte
        i, j = i + len(gap_x) + 1, j + len(gap_y) + 1
    return nodes


def align_tokens(
    student_ids: Any,
    teacher_ids: Any,
    student_bytes: Any,
    teacher_bytes: Any,
    *,
    mode: str = "strict",
    max_edits: int = 1024,
) -> Alignment:
    """Boundaries = nodes of the edit graph on every cheapest path, where tokens of both sides end.

    Where both sides have the same bytes, the paths are those that keep all of them and insert or
    delete special tokens; else, in "repair", those of minimum edit distance.

    Args:
        student_ids, teacher_ids: [T], [T'] integers.
        student_bytes, teacher_bytes: [id] -> bytes; `symbols`, where it has any, are roles.
        mode: "strict" or "repair".
        max_edits: of a stretch of both sides; above it, only what they begin and end with.

    Returns:
        Alignment; memory and time grow with the product of both lengths.

    Raises:
        ValueError: (strict) the bytes differ.
    """
    x, ends_x = _symbols(student_ids, student_bytes)
    y, ends_y = _symbols(teacher_ids, teacher_bytes)
    tokens_x = {0: 0} | {end: count for count, end in enumerate(ends_x, 1)}
    tokens_y = {0: 0} | {end: count for count, end in enumerate(ends_y, 1)}
    boundaries = [
        (i, j) for i, j in _nodes(x, y, mode, max_edits) if i in tokens_x and j in tokens_y
    ]
    is_aligned, num_bytes = [], []
    for (i, j), (next_i, next_j) in pairwise(boundaries):
        mine, other = x[i:next_i], y[j:next_j]
        is_aligned.append(
            len(mine) == len(other)
            and all(_is_same(*pair) for pair in zip(mine, other, strict=True))
        )
        num_bytes.append(sum(not _is_special(symbol) for symbol in mine))
    return Alignment(
        torch.tensor([tokens_x[i] for i, _ in boundaries]),
        torch.tensor([tokens_y[j] for _, j in boundaries]),
        torch.tensor(is_aligned, dtype=torch.bool),
        torch.tensor(num_bytes, dtype=torch.int64),
    )


def align_batch(
    student_ids: Any,
    teacher_ids: Any,
    student_bytes: Any,
    teacher_bytes: Any,
    *,
    mode: str = "strict",
    max_edits: int = 1024,
) -> AlignedBatch:
    """`align_tokens` of each pair, one after another.

    Args:
        student_ids, teacher_ids: B sequences each.
        student_bytes, teacher_bytes, mode, max_edits: as `align_tokens`.

    Returns:
        AlignedBatch.
    """
    student, teacher, aligned, sizes, ends = [0], [0], [], [], []
    for pair in zip(student_ids, teacher_ids, strict=True):
        found = align_tokens(*pair, student_bytes, teacher_bytes, mode=mode, max_edits=max_edits)
        student += (found.student_offsets[1:] + student[-1]).tolist()
        teacher += (found.teacher_offsets[1:] + teacher[-1]).tolist()
        aligned += found.is_aligned.tolist()
        sizes += found.num_bytes.tolist()
        ends.append(len(aligned))
    return AlignedBatch(
        torch.tensor(student),
        torch.tensor(teacher),
        torch.tensor(aligned, dtype=torch.bool),
        torch.tensor(sizes, dtype=torch.int64),
        torch.tensor(ends, dtype=torch.int64),
    )
