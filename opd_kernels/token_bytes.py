# SPDX-License-Identifier: Apache-2.0
"""The exact bytes of every id of a tokenizer: where two vocabularies can meet."""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self, overload

import torch
from torch import Tensor

from . import _token_check as checks
from . import _token_formats as formats
from . import _token_formats_hf as formats_hf
from ._token_cut import Cut, ExactEncoder
from ._token_formats import Reading
from ._token_roles import ROLES, sorted_roles
from .errors import TokenBytesError

_FINGERPRINT_BYTES = 16
_MAX_CACHED = 16
_cached: dict[bytes, _Table] = {}
_lock = threading.Lock()


class TokenBytes(Sequence[bytes]):
    """The bytes b(i) of every id i of a tokenizer, such that a text is the concatenation of its
    tokens' bytes:

        b(i_1) + b(i_2) + ... + b(i_n) = UTF-8 of the text

    b(i) is what id i adds in the middle of a text: "▁the" is b" the", "<0x0A>" is b"\\n",
    byte-level "Ġthe" is b" the", WordPiece "##ing" is b"ing" and "the" is b" the". Tokens that
    begin, end or fill a sequence, end a turn or stand for the unknown have a role and no bytes;
    other special tokens have their name's. A token may be half a character.

    Reading is checked: ids are decoded by the tokenizer and compared, and so are probing texts. One
    vocabulary is read once per process.

    Args:
        tokenizer: a transformers tokenizer, fast or over sentencepiece, tiktoken or bytes; a
            tokenizers.Tokenizer; a sentencepiece processor; a tiktoken.Encoding.
        lossy: take tokenizers too that change a text before they cut it (lowercase, collapsed
            whitespace) and have no bytes to say what was there; `is_exact` is then False, and what
            differs is for `align_tokens(..., mode="repair")`.

    Attributes:
        kind: of tokenizer, in a few words.
        is_exact: ids spell the text that they came from; `encode` spells all the vocabulary can.
        losses: what the tokenizer itself changes in a text, each a clause; `encode` does not. That
            a "▁" (U+2581) written in a text comes back as a space is in no clause.
        roles: ids by "bos", "eos", "eot" (end of turn), "pad", "unk", ascending, () for none. An id
            may have several.
        data: uint8 [N], all bytes, one token after the other.
        offsets: int64 [V + 1]; token i is data[offsets[i]:offsets[i + 1]].
        symbols: uint8 [V]: 0, or the sum of 1 for bos, 2 eos, 4 eot, 8 pad, 16 unk.
        text_ids: the id of each byte string that is one token of text, without roles and special
            tokens. Of several with the same bytes the one that a text becomes: "A" before "<0x41>",
            then the lowest.
        fingerprint: 32 hex digits over data, offsets and symbols.

    Raises:
        TokenBytesError: a ValueError. Bytes can't be recovered, and why; nothing knows this kind of
            tokenizer.

    Source: docs/token_bytes.md.
    """

    def __init__(self, tokenizer: Any, *, lossy: bool = False) -> None:
        key, read = _identify(tokenizer)
        with _lock:
            table = _cached.get(key)
            if table is None:
                reading = read()
                table = _Table.of(reading)
                while len(_cached) >= _MAX_CACHED:
                    _cached.pop(next(iter(_cached)))
                _cached[key] = table
        if not (table.is_exact or lossy):
            raise TokenBytesError(table.refusal())
        self._table = table

    @classmethod
    def from_bytes(
        cls,
        tokens: Iterable[bytes],
        *,
        roles: Mapping[str, int | Iterable[int]] | None = None,
    ) -> Self:
        """A vocabulary that is given as bytes; `encode` cuts a text into the fewest tokens.

        Args:
            tokens: V byte strings; b"" for an id without one. Those of ids with a role are dropped.
            roles: ids by "bos", "eos", "eot", "pad", "unk".

        Raises:
            ValueError: a role that there is not, or an id outside the vocabulary.
            TypeError: a token that is not bytes, a role's id that is no integer.
        """
        tokens = list(tokens)
        for i, token in enumerate(tokens):
            if not isinstance(token, bytes):
                raise TypeError(f"from_bytes: tokens[{i}] must be bytes, got {type(token)}.")
        given = {role: _ids_of_role(role, ids) for role, ids in (roles or {}).items()}
        for role, ids in given.items():
            if role not in ROLES:
                raise ValueError(f"from_bytes: roles must be of {tuple(ROLES)}, got {role!r}.")
            for i in ids:
                if not 0 <= i < len(tokens):
                    raise ValueError(
                        f"from_bytes: {role}={i} is not an id of {len(tokens)} tokens."
                    )
        result = cls.__new__(cls)
        reading = Reading(kind="given bytes", tokens=tokens, names={}, roles=sorted_roles(given))
        result._table = _Table.of(reading)
        return result

    # -- ids to bytes ----------------------------------------------------------------------------

    def __len__(self) -> int:
        """V, the highest id plus one; a model's head may have more rows."""
        return len(self._table.tokens)

    @overload
    def __getitem__(self, token_id: int) -> bytes: ...

    @overload
    def __getitem__(self, token_id: slice) -> list[bytes]: ...

    def __getitem__(self, token_id: int | slice) -> bytes | list[bytes]:
        """Bytes of one id, or of a slice of ids as a list; b"" with a role.

        A negative id is an IndexError, not the last one.
        """
        if isinstance(token_id, slice):
            return self._table.tokens[token_id]
        self._check(token_id, token_id)
        return self._table.tokens[token_id]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._table.tokens)

    def join(self, token_ids: Sequence[int] | Tensor) -> bytes:
        """b(i_1) + ... + b(i_n) of a list or [T] integer tensor; UTF-8 unless a character is cut.

        Raises:
            IndexError: an id that the vocabulary does not have.
        """
        if isinstance(token_ids, Tensor) and token_ids.dim() != 1:
            raise ValueError(
                "TokenBytes: token_ids of join must have one dimension, got shape "
                f"{tuple(token_ids.shape)}. Join the rows of a batch one by one."
            )
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        if len(ids):
            self._check(min(ids), max(ids))
        tokens = self._table.tokens
        return b"".join([tokens[i] for i in ids])

    def _check(self, low: int, high: int) -> None:
        if low < 0 or high >= len(self):
            raise IndexError(
                f"TokenBytes: {low if low < 0 else high} is not an id of this vocabulary, which "
                f"has 0 to {len(self) - 1}."
            )

    # -- bytes to ids ----------------------------------------------------------------------------

    def encode(self, data: bytes) -> list[int]:
        """Ids with join(encode(data)) == data, for every byte string, UTF-8 or not.

        The tokenizer's own cut, without special tokens, a space in front or a normaliser; where
        that does not spell `data` (invalid UTF-8, characters that it replaces), the fewest tokens
        that do.

        Raises:
            TokenBytesError: the vocabulary has no tokens for a part of it, which is named.
        """
        return self.encode_batch([data])[0]

    def encode_batch(self, batch: Sequence[bytes]) -> list[list[int]]:
        """`encode` of each, in one call of the tokenizer, which may use several threads."""
        for data in batch:
            if not isinstance(data, bytes):
                raise TypeError(f"encode: expected bytes, got {type(data)}; text.encode() are.")
        return self._table.encoder(batch)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        return self._table.kind

    @property
    def is_exact(self) -> bool:
        return self._table.is_exact

    @property
    def losses(self) -> tuple[str, ...]:
        return self._table.losses

    @property
    def roles(self) -> dict[str, tuple[int, ...]]:
        return dict(self._table.roles)

    @property
    def text_ids(self) -> Mapping[bytes, int]:
        return MappingProxyType(self._table.text_ids)

    @property
    def data(self) -> Tensor:
        return self._table.data

    @property
    def offsets(self) -> Tensor:
        return self._table.offsets

    @property
    def symbols(self) -> Tensor:
        return self._table.symbols

    @property
    def fingerprint(self) -> str:
        return self._table.fingerprint

    def __repr__(self) -> str:
        exact = "" if self.is_exact else ", not exact"
        return f"TokenBytes({self.kind}, {len(self)} tokens{exact})"


class _Table:
    """What a reading comes to, shared by all TokenBytes of one vocabulary."""

    def __init__(self, reading: Reading, cut: Cut, excluded: set[int], losses: list[str]) -> None:
        self.kind = reading.kind
        self.roles = reading.roles
        self.losses = tuple(losses)
        self.text_ids = cut.ids
        self._num_missing = len(cut.missing_bytes)
        # with all bytes there is a token for whatever a normaliser would take
        self.is_exact = not losses or not self._num_missing
        symbols = bytearray(len(reading.tokens))
        for role, ids in reading.roles.items():
            for i in ids:
                symbols[i] |= ROLES[role]
        self.tokens = [
            b"" if symbol else token for token, symbol in zip(reading.tokens, symbols, strict=True)
        ]
        self.data = _bytes_tensor(b"".join(self.tokens))
        lengths = torch.tensor([0, *map(len, self.tokens)], dtype=torch.int64)
        self.offsets = lengths.cumsum(0)
        self.symbols = _bytes_tensor(bytes(symbols))
        self.encoder = ExactEncoder(self.tokens, excluded, cut, reading.encode)

    @classmethod
    def of(cls, reading: Reading) -> Self:
        excluded = set(reading.names.values())
        excluded.update(*reading.roles.values())
        cut = Cut(reading.tokens, excluded, reading.byte_pieces, reading.kind)
        return cls(reading, cut, excluded, checks.check(reading, cut))

    @cached_property
    def fingerprint(self) -> str:
        said = repr((list(map(len, self.tokens)), self.roles))
        return _digest(said.encode(), b"".join(self.tokens)).hex()

    def refusal(self) -> str:
        return (
            f"TokenBytes: this tokenizer ({self.kind}) cannot give back the bytes of a text: "
            f"{', '.join(self.losses)}; and {self._num_missing} of the 256 bytes have no token of "
            "their own, by which what was there could be said. To align what survives and be told "
            "what did not: TokenBytes(tokenizer, lossy=True) and align_tokens(..., mode='repair')."
        )


def _ids_of_role(role: str, ids: Any) -> set[int]:
    try:
        return {int(operator.index(i)) for i in ([ids] if hasattr(ids, "__index__") else ids)}
    except TypeError as error:
        raise TypeError(
            f"from_bytes: roles must give an id or several, got {ids!r} for {role}."
        ) from error


def _bytes_tensor(data: bytes) -> Tensor:
    # frombuffer takes no empty buffer
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def _identify(tokenizer: Any) -> tuple[bytes, Callable[[], Reading]]:
    """A digest of all that a reading depends on, and what reads."""
    if formats.is_tiktoken(tokenizer):
        return _by_reading(formats.read_tiktoken(tokenizer, tokenizer))
    if formats.is_sentencepiece(tokenizer):
        proto = tokenizer.serialized_model_proto()
        return _digest(proto), lambda: formats.read_sentencepiece(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not formats_hf.is_tokenizers(backend):
        backend = tokenizer
    if not formats_hf.is_tokenizers(backend):
        return _by_reading(formats.read_python(tokenizer))
    said = [getattr(tokenizer, f"{role}_token_id", None) for role in ROLES]
    said.append(getattr(tokenizer, "chat_template", None))
    key = _digest(formats_hf.content(backend), repr(said).encode())
    return key, lambda: formats_hf.read_tokenizers(backend, tokenizer)


def _by_reading(reading: Reading) -> tuple[bytes, Callable[[], Reading]]:
    lengths = list(map(len, reading.tokens))
    said = repr((reading.kind, lengths, reading.names, reading.roles, sorted(reading.added)))
    return _digest(reading.content, said.encode(), b"".join(reading.tokens)), lambda: reading


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_FINGERPRINT_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
