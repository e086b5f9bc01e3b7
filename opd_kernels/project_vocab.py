# SPDX-License-Identifier: Apache-2.0
"""Which tokens two vocabularies share: those with exactly the same bytes, or the same role."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# with its words where the module was not built
from .align_tokens import _align, buffer_tensor

_OP = "project_vocab"
# bits of TokenBytes.symbols in the order in which roles are paired; a token that ends a text is
# often its padding too
_EOS, _EOT, _BOS, _PAD = 2, 4, 1, 8
_ROLES = (_EOS, _EOT, _BOS, _PAD)


class _Table:
    """The bytes of every id and its role bits, out of a TokenBytes or a list of bytes."""

    def __init__(self, name: str, tokens: Any) -> None:
        data, offsets = getattr(tokens, "data", None), getattr(tokens, "offsets", None)
        symbols = getattr(tokens, "symbols", None)
        if isinstance(data, Tensor) and isinstance(offsets, Tensor):
            text, ends = data.cpu().contiguous().numpy().tobytes(), offsets.tolist()
            self.tokens = [text[begin:end] for begin, end in pairwise(ends)]
        else:
            try:
                self.tokens = [tokens[i] for i in range(len(tokens))]
            except LookupError as error:
                raise ValueError(
                    f"{_OP}: {name} must have the bytes of every id from 0 to {len(tokens) - 1}, "
                    f"as it has {len(tokens)}, has none for {error}."
                ) from error
            for i, token in enumerate(self.tokens):
                if not isinstance(token, bytes):
                    raise TypeError(
                        f"{_OP}: {name} must be a TokenBytes or a sequence of bytes, got "
                        f"{type(token).__name__} at {i}."
                    )
        self.symbols = [0] * len(self.tokens) if symbols is None else symbols.tolist()
        self.text_ids = getattr(tokens, "text_ids", {})

    def __len__(self) -> int:
        return len(self.tokens)

    def text_of(self, token_id: int) -> bytes:
        """Of an ordinary token; nothing of one with a role."""
        return b"" if self.symbols[token_id] else self.tokens[token_id]

    @cached_property
    def packed(self) -> tuple[bytes, Tensor, bytes]:
        """(data, offsets, symbols) for `_align`."""
        return (*_packed(self.tokens), bytes(self.symbols))

    @cached_property
    def groups(self) -> dict[bytes, list[int]]:
        """Ids by their bytes, the one that text becomes first; without bytes they are in none."""
        groups: dict[bytes, list[int]] = {}
        for i, (token, symbol) in enumerate(zip(self.tokens, self.symbols, strict=True)):
            if token and not symbol:
                groups.setdefault(token, []).append(i)
        for token, ids in groups.items():
            # the byte pieces of SentencePiece come before its letters, and no text becomes them
            if len(ids) > 1 and (of_text := self.text_ids.get(token)) in ids:
                ids.remove(of_text)
                ids.insert(0, of_text)
        return groups

    @cached_property
    def specials(self) -> list[int]:
        """Ids with a role that can be matched, ascending: all roles but `unk`."""
        wanted = sum(_ROLES)
        return [i for i, symbol in enumerate(self.symbols) if symbol & wanted]


class VocabProjection:
    """The tokens that a student's and a teacher's vocabulary share.

    Attributes:
        student_ids, teacher_ids: [M] int64, pairs of ids with exactly the same bytes, or the same
            role (bos, eos, eot, pad). One to one: of several ids with the same bytes the one that
            text becomes (`TokenBytes.text_ids`), else the lowest. Ascending by student id.
        student_size, teacher_size: tokens of each vocabulary, Vs and Vt.
        student_coverage, teacher_coverage: M / Vs and M / Vt.
    """

    def __init__(self, student: _Table, teacher: _Table) -> None:
        self._student, self._teacher = student, teacher
        self.student_size, self.teacher_size = len(student), len(teacher)
        pairs = [
            (ids[0], teacher.groups[token][0])
            for token, ids in student.groups.items()
            if token in teacher.groups
        ]
        pairs = sorted(pairs + self._pairs_of_roles())
        table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        self.student_ids, self.teacher_ids = (column.contiguous() for column in table.unbind(1))
        self.student_coverage = len(pairs) / max(1, self.student_size)
        self.teacher_coverage = len(pairs) / max(1, self.teacher_size)
        self._nearest: dict[int, int] = {}
        self._padded: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return (
            f"VocabProjection({len(self.student_ids)} pairs: {self.student_coverage:.1%} of "
            f"{self.student_size} student tokens, {self.teacher_coverage:.1%} of "
            f"{self.teacher_size} teacher tokens)"
        )

    def _pairs_of_roles(self) -> list[tuple[int, int]]:
        pairs: list[tuple[int, int]] = []
        taken: tuple[set[int], set[int]] = (set(), set())
        for role in _ROLES:
            found = [
                next((i for i in side.specials if side.symbols[i] & role and i not in used), None)
                for side, used in zip((self._student, self._teacher), taken, strict=True)
            ]
            if None not in found:
                pairs.append((found[0], found[1]))
                for used, i in zip(taken, found, strict=True):
                    used.add(i)
        return pairs

    @cached_property
    def _student_of(self) -> Tensor:
        """[Vt] int64, the student's id of every teacher id, duplicates included; -1 for none."""
        table = torch.full((self.teacher_size,), -1, dtype=torch.int64)
        matches = [
            (i, ids[0])
            for token, others in self._teacher.groups.items()
            if (ids := self._student.groups.get(token))
            for i in others
        ]
        paired = dict(zip(self.teacher_ids.tolist(), self.student_ids.tolist(), strict=True))
        for i in self._teacher.specials:
            match = paired.get(i)
            if match is None:
                match = self._special_of(i)
            if match is not None:
                matches.append((i, match))
        if matches:
            places, values = torch.tensor(matches, dtype=torch.int64).unbind(1)
            table[places] = values
        return table

    def _special_of(self, teacher_id: int) -> int | None:
        """The lowest student id that shares a role with this one, of its first role in order."""
        for role in _ROLES:
            if self._teacher.symbols[teacher_id] & role:
                for i in self._student.specials:
                    if self._student.symbols[i] & role:
                        return i
        return None

    def map_ids(self, teacher_ids: Tensor) -> Tensor:
        """The student's id with the same bytes, or a role in common; -1 where there is none.

        Args:
            teacher_ids: any shape, int64 or int32, on any device; -1 stays -1.

        Returns:
            int64 of the same shape, on the same device.
        """
        _check_ids(teacher_ids, self.teacher_size)
        table = self._padded.get(teacher_ids.device)
        if table is None:
            # the entry behind the last one is for -1
            table = torch.cat([self._student_of, self._student_of.new_full((1,), -1)])
            table = self._padded[teacher_ids.device] = table.to(teacher_ids.device)
        return table[teacher_ids.to(torch.int64)]

    def nearest(self, teacher_ids: Tensor) -> Tensor:
        """As `map_ids`, and where there is no such token the one with the fewest byte edits.

        Insertions, deletions and substitutions of bytes, among the student's tokens without a role;
        of equally near ones the lowest id, of those with its bytes the one that text becomes. What
        has been computed is kept. Waits for the device.

        Args:
            teacher_ids: as for `map_ids`.

        Returns:
            int64 of the same shape, on the same device; -1 for -1 and for tokens without bytes
            (a role that the student does not have).
        """
        mapped = self.map_ids(teacher_ids)
        missing = teacher_ids[(mapped < 0) & (teacher_ids >= 0)]
        asked = [i for i in missing.unique().tolist() if i not in self._nearest]
        if asked:
            texts = [self._teacher.text_of(i) for i in asked]
            found, _ = nearest_tokens((*_packed(texts), None), self._student.packed)
            groups, tokens = self._student.groups, self._student.tokens
            of_text = (i if i < 0 else groups.get(tokens[i], [i])[0] for i in found.tolist())
            self._nearest.update(zip(asked, of_text, strict=True))
        if missing.numel() == 0:
            return mapped
        ids, places = missing.unique(return_inverse=True)
        values = torch.tensor([self._nearest[i] for i in ids.tolist()], device=mapped.device)
        return mapped.masked_scatter((mapped < 0) & (teacher_ids >= 0), values[places])

    def matrix(self) -> Tensor:
        """A [Vs, Vt] sparse CSR float32 that moves a teacher's law onto the student's tokens.

        A[s, t] = 1 / n(t) where s has the bytes (or shares the role) of t, n(t) the number of such
        s: A @ p has the mass of p on the shared tokens, each token's divided among the student's
        duplicates of it.
        """
        rows, columns, values = [], [], []
        of_bytes = (
            (ids, others)
            for token, others in self._teacher.groups.items()
            if (ids := self._student.groups.get(token))
        )
        of_roles = (
            (ids, [i])
            for i in self._teacher.specials
            if (ids := self._sharing(self._teacher.symbols[i]))
        )
        for source in (of_bytes, of_roles):
            for ids, others in source:
                for i in others:
                    rows += ids
                    columns += [i] * len(ids)
                    values += [1.0 / len(ids)] * len(ids)
        entries = torch.sparse_coo_tensor(
            torch.tensor([rows, columns], dtype=torch.int64),
            torch.tensor(values, dtype=torch.float32),
            (self.student_size, self.teacher_size),
            check_invariants=True,
        )
        return entries.coalesce().to_sparse_csr()

    def _sharing(self, symbol: int) -> list[int]:
        bits = symbol & sum(_ROLES)
        return [i for i in self._student.specials if self._student.symbols[i] & bits]

    @cached_property
    def _swapped(self) -> VocabProjection:
        return VocabProjection(self._teacher, self._student)

    def share_of(self, token_ids: Tensor, side: str = "teacher") -> float:
        """The share of these tokens, of a text say, that the other vocabulary has as they are.

        Args:
            token_ids: of `side`, any shape.
            side: "student" | "teacher".

        Returns:
            In [0, 1]; 1 for no tokens.
        """
        if side == "student":
            has = self._swapped._student_of
        elif side == "teacher":
            has = self._student_of
        else:
            raise ValueError(f"{_OP}: side must be 'student' or 'teacher', got {side!r}.")
        _check_ids(token_ids, len(has), padding=False)
        if token_ids.numel() == 0:
            return 1.0
        return float((has[token_ids.cpu().to(torch.int64)] >= 0).double().mean())


def project_vocab(
    student_bytes: Any | Sequence[bytes], teacher_bytes: Any | Sequence[bytes]
) -> VocabProjection:
    """What two vocabularies share, token by token: exactly the same bytes, or the same role.

    Args:
        student_bytes, teacher_bytes: TokenBytes of both tokenizers, or sequences [id] -> bytes.
            Tokens with a role are matched by it alone (`unk` by nothing), and tokens without bytes
            by nothing.

    Returns:
        VocabProjection: pairs and coverage, computed at once; the map of single ids, the nearest
        tokens by edit distance and the sparse matrix when they are asked for.

    Raises:
        TypeError: something that is not bytes. ValueError: ids that are not 0 .. V - 1.

    Notes:
        One dictionary per side: linear in the bytes of both. On the host; it is built once a run.

    Source: overlap of vocabularies as in TRL's GOLD; minimum edit distance: FuseLLM,
    arXiv:2401.10491.
    """
    return VocabProjection(
        _Table("student_bytes", student_bytes), _Table("teacher_bytes", teacher_bytes)
    )


def nearest_tokens(queries: tuple, vocabulary: tuple) -> tuple[Tensor, Tensor]:
    """(ids, distances) [n] int64: of the vocabulary's tokens, those nearest to each query.

    The fewest insertions, deletions and substitutions of bytes; of equally near ones the lowest id.
    -1, -1 for a query without bytes, and if no token is left. Tokens with a symbol are near
    nothing. Threads as torch's, without the interpreter's lock.

    Args:
        queries, vocabulary: (data, offsets, symbols or None), as in a TokenBytes.
    """
    arrays = _align.nearest(queries, vocabulary, torch.get_num_threads())
    ids, distances = (buffer_tensor(array, torch.int64) for array in arrays)
    return ids, distances


def _packed(strings: Sequence[bytes]) -> tuple[bytes, Tensor]:
    ends = torch.tensor([0, *map(len, strings)], dtype=torch.int64).cumsum(0)
    return b"".join(strings), ends


def _check_ids(ids: Tensor, size: int, *, padding: bool = True) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{_OP}: ids must be a tensor of int64 or int32, got {got}.")
    if ids.is_cuda or ids.numel() == 0:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < (-1 if padding else 0) or high >= size:
        raise ValueError(
            f"{_OP}: ids must be in [0, {size}){' or -1' if padding else ''}, got {low} to {high}."
        )
