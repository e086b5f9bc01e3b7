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
# of the edit graph: symbols of both sides before it
Node = tuple[int, int]


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


def _edges(x: list[Any], y: list[Any], i: int, j: int) -> list[tuple[int, int, int]]:
    """(i, j, cost) of what node (i, j) of the edit graph leads to."""
    found = [(i + 1, j, 1)] if i < len(x) else []
    found += [(i, j + 1, 1)] if j < len(y) else []
    if i < len(x) and j < len(y):
        if _match(x[i], y[j]):
            found.append((i + 1, j + 1, 0))
        elif not _is_special(x[i]) and not _is_special(y[j]):
            found.append((i + 1, j + 1, 1))
    return found


def _costs(x: list[Any], y: list[Any]) -> tuple[dict[Node, int], dict[Node, int]]:
    """Of each node: the cost to the end, and the number of ways that have it."""
    n, m = len(x), len(y)
    cost, ways = {(n, m): 0}, {(n, m): 1}
    for node in [(i, j) for i in range(n, -1, -1) for j in range(m, -1, -1)][1:]:
        options = [((i, j), price + cost[i, j]) for i, j, price in _edges(x, y, *node)]
        cost[node] = min(total for _, total in options)
        ways[node] = sum(ways[to] for to, total in options if total == cost[node])
    return cost, ways


def _on_every_path(x: list[Any], y: list[Any]) -> list[Node]:
    """Nodes of the edit graph on every path of minimum cost."""
    cost, ways = _costs(x, y)
    # ways from the start to a node, along cheapest edges alone
    reached = dict.fromkeys(cost, 0)
    reached[0, 0] = 1
    for node in sorted(cost):
        for i, j, price in _edges(x, y, *node):
            if price + cost[i, j] == cost[node]:
                reached[i, j] += reached[node]
    return [node for node in sorted(cost) if reached[node] * ways[node] == ways[0, 0]]


def _walk(x: list[Any], y: list[Any], max_edits: int) -> list[Node]:
    """Nodes from (0, 0) on, one problem of at most max_edits after the other, as far as it goes."""
    nodes = [(0, 0)]
    while True:
        begin_i, begin_j = nodes[-1]
        rest_x, rest_y = x[begin_i:], y[begin_j:]
        n, m = len(rest_x), len(rest_y)
        if n == 0 or m == 0:
            found = _on_every_path(rest_x, rest_y)
            return nodes + [(begin_i + i, begin_j + j) for i, j in found[1:]]
        # from the start: those to the end of what is read backwards
        cost = {(n - i, m - j): c for (i, j), c in _costs(rest_x[::-1], rest_y[::-1])[0].items()}
        is_whole = cost[n, m] <= max_edits
        near = [node for node, total in cost.items() if total <= max_edits]
        length = max(sum(node) for node in near)
        ends = [(n, m)] if is_whole else sorted(node for node in near if sum(node) == length)
        # of several furthest nodes those on the outermost diagonals
        found = set.intersection(
            *(set(_on_every_path(rest_x[:i], rest_y[:j])) for i, j in (ends[0], ends[-1]))
        )
        kept = [node for node in sorted(found)[1:] if is_whole or 2 * sum(node) <= length]
        nodes += [(begin_i + i, begin_j + j) for i, j in kept]
        if is_whole or not kept or 4 * sum(kept[-1]) < length:
            return nodes


def _shared_nodes(x: list[Any], y: list[Any], max_edits: int) -> list[Node]:
    """From the front and from the end; between what both begin with there, and end with."""
    n, m = len(x), len(y)
    nodes = _walk(x, y, max_edits)
    if nodes[-1] == (n, m):
        return nodes
    i, j = nodes[-1]
    behind = [(n - a, m - b) for a, b in _walk(x[i:][::-1], y[j:][::-1], max_edits)][::-1]
    end_i, end_j = behind[0]
    while i < end_i and j < end_j and _match(x[i], y[j]):
        i, j = i + 1, j + 1
        nodes.append((i, j))
    while i < end_i and j < end_j and _match(x[end_i - 1], y[end_j - 1]):
        end_i, end_j = end_i - 1, end_j - 1
        behind.insert(0, (end_i, end_j))
    return nodes + [node for node in behind if node != nodes[-1]]


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
        max_edits: sides further apart are cut, see `_walk`.

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
