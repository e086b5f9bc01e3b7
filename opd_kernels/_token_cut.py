# SPDX-License-Identifier: Apache-2.0
"""Byte strings as tokens, exactly: by a tokenizer where it keeps them, else the fewest tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from .errors import TokenBytesError

# what decoding with surrogateescape makes of bytes that are no UTF-8
_INVALID = re.compile("([\udc80-\udcff]+)")
_SHOWN_BYTES = 24


class Cut:
    """The fewest tokens that spell a byte string; of equally few, those with the longest last one.

    Args:
        tokens: the bytes of every id; of ids with the same bytes the lowest is used.
        excluded: ids that text is never made of.
        last: ids that are used only where no other has their bytes.
        kind: for the message.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        excluded: Collection[int],
        last: Collection[int],
        kind: str,
    ) -> None:
        order = sorted(last, reverse=True)
        order += [i for i in range(len(tokens) - 1, -1, -1) if i not in last]
        # of equal keys the later one counts
        self.ids = {tokens[i]: i for i in order if i not in excluded}
        self.ids.pop(b"", None)
        lengths: list[set[int]] = [set() for _ in range(256)]
        for token in self.ids:
            lengths[token[0]].add(len(token))
        self._lengths = [sorted(found) for found in lengths]
        self._kind = kind

    @property
    def missing_bytes(self) -> list[int]:
        """The bytes that are no token by themselves."""
        return [byte for byte in range(256) if bytes([byte]) not in self.ids]

    def __call__(self, data: bytes) -> list[int]:
        """Ids of tokens whose bytes are `data`.

        Raises:
            TokenBytesError: there are none.
        """
        unreached = len(data) + 1
        fewest = [0] + [unreached] * len(data)
        last = [0] * (len(data) + 1)
        for begin in range(len(data)):
            count = fewest[begin] + 1
            if count > unreached:
                continue
            for length in self._lengths[data[begin]]:
                end = begin + length
                if end > len(data):
                    break
                if count < fewest[end] and data[begin:end] in self.ids:
                    fewest[end], last[end] = count, begin
        if fewest[-1] == unreached:
            raise TokenBytesError(self._no_tokens(data, fewest, unreached))
        ids = []
        end = len(data)
        while end:
            ids.append(self.ids[data[last[end] : end]])
            end = last[end]
        return ids[::-1]

    def _no_tokens(self, data: bytes, fewest: list[int], unreached: int) -> str:
        stuck = max(end for end, count in enumerate(fewest) if count < unreached)
        # where a token begins inside a character, the character is what has none
        while stuck and data[stuck] & 0xC0 == 0x80:
            stuck -= 1
        rest = data[stuck : stuck + _SHOWN_BYTES].decode("utf-8", "replace")
        return (
            f"encode: the vocabulary ({self._kind}, {len(self.ids)} different tokens) has no "
            f"tokens for {rest[0]!r} (U+{ord(rest[0]):04X}), before {rest[1:]!r}. Leave such text "
            "out, or use a tokenizer that covers all bytes."
        )


class ExactEncoder:
    """Ids whose bytes are exactly what was given.

    Args:
        tokens: the bytes of every id.
        excluded: ids that no text becomes, whatever it says.
        cut: spells what `encode_texts` does not keep.
        encode_texts: texts to ids, as the tokenizer would; None leaves all to `cut`.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        excluded: Collection[int],
        cut: Cut,
        encode_texts: Callable[[list[str]], list[list[int]]] | None,
    ) -> None:
        self._tokens = tokens
        self._excluded = excluded
        self._cut = cut
        self._encode_texts = encode_texts
        # characters that the tokenizer does not keep, and those it does
        self._is_kept: dict[str, bool] = {}

    def __call__(self, batch: Sequence[bytes]) -> list[list[int]]:
        """Ids of each byte string of `batch`."""
        if self._encode_texts is None:
            return [self._cut(data) for data in batch]
        pieces = [_INVALID.split(data.decode("utf-8", "surrogateescape")) for data in batch]
        encoded = iter(self._encode_all([text for parts in pieces for text in parts[::2] if text]))
        result = []
        for parts in pieces:
            ids: list[int] = []
            for place, part in enumerate(parts):
                if place % 2:
                    ids += self._cut(part.encode("utf-8", "surrogateescape"))
                elif part:
                    ids += next(encoded)
            result.append(ids)
        return result

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return [
            ids if self._is_exact(ids, text.encode()) else self._around_lost(text)
            for text, ids in zip(texts, self._encode_texts(texts), strict=True)
        ]

    def _is_exact(self, ids: list[int], data: bytes) -> bool:
        tokens = self._tokens
        return b"".join([tokens[i] for i in ids]) == data and self._excluded.isdisjoint(ids)

    def _around_lost(self, text: str) -> list[int]:
        """Characters that the tokenizer does not keep are cut, the text between them is encoded."""
        unknown = [char for char in sorted(set(text)) if char not in self._is_kept]
        for char, ids in zip(unknown, self._encode_texts(unknown) if unknown else (), strict=True):
            self._is_kept[char] = self._is_exact(ids, char.encode())
        lost = "".join(re.escape(char) for char in sorted(set(text)) if not self._is_kept[char])
        if not lost:
            return self._around_difference(text)
        ids: list[int] = []
        for place, part in enumerate(re.split(f"([{lost}]+)", text)):
            if place % 2:
                ids += self._cut(part.encode())
            elif part:
                (encoded,) = self._encode_texts([part])
                kept = self._is_exact(encoded, part.encode())
                ids += encoded if kept else self._around_difference(part)
        return ids

    def _around_difference(self, text: str) -> list[int]:
        """The tokenizer's tokens from both ends as far as they are the text, a cut between."""
        data = text.encode()
        (ids,) = self._encode_texts([text])
        begin, first = 0, 0
        for token_id in ids:
            token = self._tokens[token_id]
            if not token or token_id in self._excluded or not data.startswith(token, begin):
                break
            begin, first = begin + len(token), first + 1
        end, last = len(data), len(ids)
        for token_id in reversed(ids[first:]):
            token = self._tokens[token_id]
            is_text = token and token_id not in self._excluded
            if not is_text or not data.endswith(token, begin, end):
                break
            end, last = end - len(token), last - 1
        try:
            return ids[:first] + self._cut(data[begin:end]) + ids[last:]
        except TokenBytesError:
            # a token that ends inside the difference can keep it from being spelled
            return self._cut(data)
