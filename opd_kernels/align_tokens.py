# SPDX-License-Identifier: Apache-2.0
"""Two tokenizations of a text, cut into the finest chunks that both have: docs/alignment.md."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import BuildError

try:
    from . import _align
except ImportError as error:
    raise BuildError(
        f"opd_kernels: the compiled module _align does not load ({error}). Build it with "
        "`pip install --no-build-isolation -e .` in the source tree (needs g++ and Python's "
        "headers)."
    ) from error

MODES = ("strict", "repair")
# OPD_MAX_ALIGN_EDITS of align.h
_MAX_EDITS = 4096
# ids of a table that has an entry for each, also those that do not occur
_MOST_IDS = 1 << 20


class BytesOfIds(Protocol):
    """`[id]` is the bytes of a token: a TokenBytes, a list of bytes, a dict."""

    def __getitem__(self, token_id: int, /) -> bytes: ...


class Alignment(NamedTuple):
    """Chunk c is student tokens student_offsets[c]:student_offsets[c + 1], the teacher's likewise.

    Attributes:
        student_offsets, teacher_offsets: [C + 1] int64, from 0 to the number of tokens.
        is_aligned: [C] bool, both sides have tokens, and the same bytes or the same roles.
        num_bytes: [C] int64, bytes of the student's tokens; special tokens have none.
    """

    student_offsets: Tensor
    teacher_offsets: Tensor
    is_aligned: Tensor
    num_bytes: Tensor


@dataclass(frozen=True, slots=True)
class AlignedBatch:
    """Alignments of B pairs, packed: offsets count the tokens of all sequences one after another.

    Attributes:
        student_offsets, teacher_offsets: [C + 1] int64.
        is_aligned: [C] bool. num_bytes: [C] int64. Both as in Alignment.
        chunk_ends: [B] int64, the end of each pair's chunks within C.
    """

    student_offsets: Tensor
    teacher_offsets: Tensor
    is_aligned: Tensor
    num_bytes: Tensor
    chunk_ends: Tensor

    def __len__(self) -> int:
        return len(self.chunk_ends)

    def __getitem__(self, index: int) -> Alignment:
        """The alignment of one pair; its offsets start at 0."""
        size = len(self)
        if not isinstance(index, int):
            raise TypeError(f"AlignedBatch: index must be an int, got {type(index).__name__}.")
        if not -size <= index < size:
            raise IndexError(f"AlignedBatch: index must be in [{-size}, {size}), got {index}.")
        index %= size
        begin = int(self.chunk_ends[index - 1]) if index else 0
        end = int(self.chunk_ends[index])
        student, teacher = (
            offsets[begin : end + 1] - offsets[begin]
            for offsets in (self.student_offsets, self.teacher_offsets)
        )
        return Alignment(student, teacher, self.is_aligned[begin:end], self.num_bytes[begin:end])


def align_tokens(
    student_ids: Tensor | Sequence[int],
    teacher_ids: Tensor | Sequence[int],
    student_bytes: BytesOfIds,
    teacher_bytes: BytesOfIds,
    *,
    mode: str = "strict",
    max_edits: int = 1024,
) -> Alignment:
    """The finest chunks that two tokenizations of the same text have in common.

    {student_offsets[c]} x {teacher_offsets[c]} = the pairs (s, t) at which
    bytes(student_ids[:s]) = bytes(teacher_ids[:t]), for s and t on both of which a token ends

    where a special token, which has no bytes, is one symbol of its own: two match if they share a
    role (bos, eos, eot, pad). One without counterpart, and likewise a token of no bytes at all, is
    a chunk whose other side is empty. unk is never aligned. Identical tokenizers give one token per
    chunk. Swapped arguments give the same chunks, swapped.

    Args:
        student_ids, teacher_ids: [T], [T'] int64 | int32 on the CPU, or lists of integers.
        student_bytes, teacher_bytes: TokenBytes, or anything whose [id] is the token's bytes; then
            no token is special.
        mode: "strict" takes the same bytes alone. "repair" takes any: where the bytes are the same
            it is strict, else it keeps the boundaries that every way of minimum edit distance
            between the two streams has (a byte or special token more, or one byte for another,
            costs 1). What differs is in chunks with is_aligned False.
        max_edits: 1 .. 4096. Sides that are further apart are taken in pieces, from the front and
            then from the end: the boundaries are those of the ways that get furthest with so many
            edits, up to half of that way, and on from there. Where less than a quarter of it is
            sure, what is left is one chunk that is not aligned. Memory grows with its square, 8
            bytes each; time at most with its product with the length.

    Returns:
        Alignment of C <= T + T' chunks. Positions are counted in bytes, never in characters.

    Raises:
        AlignmentError: (strict) the bytes differ; the message has the byte and what is around it.
        ValueError: an id outside of its vocabulary, a mode or a number that does not fit.
        TypeError: ids that are not integers.

    Source: boundaries as in the chunk alignment of arXiv:2503.20083 (ALM), in bytes; cheapest paths
    after E. W. Myers, "An O(ND) Difference Algorithm and Its Variations", 1986.
    """
    found = _run([student_ids], [teacher_ids], student_bytes, teacher_bytes, mode, max_edits, 1)
    return Alignment(*found[:4])


def align_batch(
    student_ids: Sequence[Tensor | Sequence[int]],
    teacher_ids: Sequence[Tensor | Sequence[int]],
    student_bytes: BytesOfIds,
    teacher_bytes: BytesOfIds,
    *,
    mode: str = "strict",
    max_edits: int = 1024,
    num_threads: int | None = None,
) -> AlignedBatch:
    """`align_tokens` of B pairs of sequences, on threads, with packed results.

    batch[b] = align_tokens(student_ids[b], teacher_ids[b], ...)

    Args:
        student_ids, teacher_ids: B sequences each, as `align_tokens` takes them, or [B, T].
        student_bytes, teacher_bytes, mode, max_edits: as there.
        num_threads: at most so many; the result does not depend on it. None: torch's number.

    Returns:
        AlignedBatch.

    Raises:
        AlignmentError, ValueError, TypeError: as `align_tokens`, with the sequence.

    Source: as `align_tokens`.
    """
    threads = torch.get_num_threads() if num_threads is None else operator.index(num_threads)
    if threads < 1:
        raise ValueError(f"align_batch: num_threads must be >= 1, got {threads}.")
    sides = _sequences("student_ids", student_ids), _sequences("teacher_ids", teacher_ids)
    found = _run(*sides, student_bytes, teacher_bytes, mode, max_edits, threads)
    return AlignedBatch(*found)


def _sequences(name: str, value: Any) -> list[Any]:
    if isinstance(value, Iterable) and not (isinstance(value, Tensor) and value.dim() != 2):
        return list(value)
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(
        f"align_batch: {name} must hold one sequence of ids per pair, got {got}. A single pair is "
        "for align_tokens."
    )


def _run(
    student_ids: Sequence[Any],
    teacher_ids: Sequence[Any],
    student_bytes: BytesOfIds,
    teacher_bytes: BytesOfIds,
    mode: str,
    max_edits: int,
    num_threads: int,
) -> tuple[Tensor, ...]:
    if mode not in MODES:
        raise ValueError(f"align_tokens: mode must be one of {', '.join(MODES)}, got {mode!r}.")
    max_edits = operator.index(max_edits)
    if not 1 <= max_edits <= _MAX_EDITS:
        raise ValueError(f"align_tokens: max_edits must be in [1, {_MAX_EDITS}], got {max_edits}.")
    student_table, student_ids = _table("student_bytes", student_bytes, student_ids)
    teacher_table, teacher_ids = _table("teacher_bytes", teacher_bytes, teacher_ids)
    arrays = _align.align(
        student_ids,
        teacher_ids,
        student_table,
        teacher_table,
        mode == "repair",
        max_edits,
        num_threads,
    )
    dtypes = (torch.int64, torch.int64, torch.bool, torch.int64, torch.int64)
    return tuple(buffer_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True))


def buffer_tensor(array: Any, dtype: torch.dtype) -> Tensor:
    """A tensor over the array's own memory."""
    return torch.frombuffer(array, dtype=dtype) if len(array) else torch.empty(0, dtype=dtype)


def _table(
    name: str, token_bytes: Any, sequences: Sequence[Any]
) -> tuple[tuple[Any, Any, Any], Sequence[Any]]:
    """((data, offsets, symbols), sequences) of a TokenBytes; else of the ids that occur.

    Ids too large for a table are counted anew, in the order of their size.
    """
    if hasattr(token_bytes, "data") and hasattr(token_bytes, "offsets"):
        return (token_bytes.data, token_bytes.offsets, token_bytes.symbols), sequences
    occurring: set[int] = set()
    for sequence in sequences:
        distinct = torch.unique(sequence) if isinstance(sequence, Tensor) else sequence
        try:
            occurring.update(map(operator.index, distinct))
        except TypeError as error:
            raise TypeError(
                f"align_tokens: {name.replace('bytes', 'ids')} must be a tensor, an array or a "
                f"list of integers, got {type(sequence).__name__} ({error})."
            ) from error
    ids = sorted(occurring)
    if ids and ids[0] < 0:
        raise ValueError(f"align_tokens: ids must not be negative, got {ids[0]} for {name}.")
    pieces = []
    for token_id in ids:
        try:
            piece = token_bytes[token_id]
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"align_tokens: {name} must have the bytes of every id, has none for {token_id} "
                f"({type(error).__name__}: {error})."
            ) from error
        if not isinstance(piece, (bytes, bytearray)):
            raise TypeError(
                f"align_tokens: {name}[{token_id}] must be bytes, got {type(piece).__name__}."
            )
        pieces.append(bytes(piece))
    if ids and ids[-1] >= _MOST_IDS:
        places = {token_id: place for place, token_id in enumerate(ids)}
        sequences = [[places[int(token_id)] for token_id in sequence] for sequence in sequences]
        ids = list(range(len(ids)))
    lengths = torch.zeros(ids[-1] + 1 if ids else 0, dtype=torch.int64)
    lengths[ids] = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return (memoryview(b"".join(pieces)), offsets, None), sequences
