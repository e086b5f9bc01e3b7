# SPDX-License-Identifier: Apache-2.0
"""Readings of `tokenizers.Tokenizer`: its decoder, applied to one token in the middle of a text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

from ._token_formats import METASPACE, EncodeTexts, Reading
from ._token_roles import find_roles
from .errors import TokenBytesError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# WordPiece's decoder, with cleanup, takes these from a token that it has put a space before
_CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_DROPS_WHITESPACE = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")
_EMPTY = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
}
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def _byte_characters() -> dict[str, int]:
    """GPT-2's character of every byte: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES = _byte_characters()
_TO_LATIN = {ord(char): byte for char, byte in _BYTES.items()}
# what has no place in Latin-1 marks a token that is text
_TO_LATIN |= {byte: 0xFFFF for byte in range(256) if chr(byte) not in _BYTES}


def is_tokenizers(tokenizer: Any) -> bool:
    return all(hasattr(tokenizer, name) for name in ("id_to_token", "model", "pre_tokenizer"))


def content(backend: Any) -> bytes:
    """All that the tokenizer is, but for truncation and padding, which a call leaves behind."""
    try:
        said = backend.to_str()
    except Exception as error:  # the extension module raises plain Exception
        raise TokenBytesError(
            "TokenBytes: a part of this tokenizer is custom Python code, which does not say what "
            "it does to bytes. Give the bytes to TokenBytes.from_bytes instead."
        ) from error
    # both are written before this key, and inside of a string its quotes would be escaped
    return said[max(0, said.find('"added_tokens":')) :].encode()


def _uncut(backend: Any) -> Any:
    """The tokenizer without truncation and padding: where it has one, a copy."""
    if backend.truncation is None and backend.padding is None:
        return backend
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _written_tokens(backend: Any) -> list[str | None]:
    """Every id's token, as the vocabulary writes it; None for an id without one."""
    # neither dense nor of one token each: their number says nothing of the highest
    size = max(backend.get_vocab().values(), default=-1) + 1
    return list(map(backend.id_to_token, range(size)))


def read_tokenizers(backend: Any, tokenizer: Any) -> Reading:
    """tokenizers.Tokenizer; `tokenizer` is what wraps it, or the same."""
    backend = _uncut(backend)
    written = _written_tokens(backend)
    parts = _Parts(backend)
    added = backend.get_added_tokens_decoder()
    model = backend.model
    texts = {
        i: token.content
        for i, token in added.items()
        # an ordinary token that is listed as an added one too is written as the model writes it
        if token.special or model.token_to_id(token.content) != i
    }
    tokens, byte_pieces = parts.bytes_of(
        ["" if token is None or i in texts else token for i, token in enumerate(written)]
    )
    for i, text in texts.items():
        tokens[i] = text.encode()
    for i, token in enumerate(written):
        if token is None:
            tokens[i] = b""
    names = {token.content: i for i, token in added.items() if token.special}
    unknown = getattr(model, "unk_token", None)
    if isinstance(unknown, str) and model.token_to_id(unknown) is not None:
        names[unknown] = model.token_to_id(unknown)
    elif isinstance(getattr(model, "unk_id", None), int):
        names[model.id_to_token(model.unk_id)] = model.unk_id
        unknown = model.id_to_token(model.unk_id)
    listed = {token.content: i for i, token in added.items()} | names
    holes = {i for i, token in enumerate(written) if token is None}
    return Reading(
        kind=parts.kind,
        tokens=tokens,
        names=names,
        roles=find_roles(tokenizer, listed, {"unk": names.get(unknown)}),
        byte_pieces=byte_pieces,
        added=frozenset(texts) | frozenset(names.values()) | holes,
        losses=parts.losses,
        encode=_exact_copy(backend, parts, added),
        encode_own=lambda batch: _ids(backend, batch),
        decode=lambda batch: backend.decode_batch(list(batch), skip_special_tokens=False),
    )


def _ids(backend: Any, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _exact_copy(backend: Any, parts: _Parts, added: dict[int, Any]) -> EncodeTexts:
    """Another tokenizer around the same model, without what adds to a text or changes it."""
    copy = type(backend)(backend.model)
    rules = type(backend).from_str(
        json.dumps(
            _EMPTY
            | {
                "normalizer": _sequence("normalizers", parts.kept_normalizers),
                "pre_tokenizer": _sequence("pretokenizers", parts.kept_pre_tokenizers),
            }
        )
    )
    if rules.normalizer is not None:
        copy.normalizer = rules.normalizer
    if rules.pre_tokenizer is not None:
        copy.pre_tokenizer = rules.pre_tokenizer
    ordinary = [(i, token) for i, token in sorted(added.items()) if not token.special]
    copy.add_tokens([token for _, token in ordinary])
    theirs = {copy.token_to_id(token.content): i for i, token in ordinary}
    theirs = {there: here for there, here in theirs.items() if there != here}

    return _Renamed(copy, theirs)


class _Renamed:
    """Texts to ids of a tokenizer, some of which have other names; a class, for pickle."""

    def __init__(self, backend: Any, names: dict[int, int]) -> None:
        self._backend, self._names = backend, names

    def __call__(self, texts: list[str]) -> list[list[int]]:
        batch, names = _ids(self._backend, texts), self._names
        return [[names.get(i, i) for i in ids] for ids in batch] if names else batch


def _sequence(name: str, rules: list[dict]) -> dict | None:
    return {"type": "Sequence", name: rules} if rules else None


class _Parts:
    """The decoder as a function of one token, and what stands before the model."""

    def __init__(self, backend: Any) -> None:
        self._decoders = list(_flat(_state(backend, "decoder"), "decoders"))
        self._types = [rule["type"] for rule in self._decoders]
        self.losses: list[str] = []
        self.kept_normalizers = list(self._normalizers(_state(backend, "normalizer")))
        self.kept_pre_tokenizers = list(self._pre_tokenizers(_state(backend, "pre_tokenizer")))
        model = type(backend.model).__name__
        if "ByteLevel" in self._types:
            self.kind = f"byte-level {model}"
        elif "ByteFallback" in self._types:
            self.kind = f"{model} with byte fallback"
        else:
            self.kind = model

    # -- ids to bytes ----------------------------------------------------------------------------

    def bytes_of(self, tokens: list[str]) -> tuple[list[bytes], frozenset[int]]:
        """Bytes of each token where others stand on both sides; which are byte pieces."""
        if not self._decoders:
            # nothing joins them, so they are joined by spaces
            return [b" " + token.encode() for token in tokens], frozenset()
        found: dict[int, bytes] = {}
        is_fused = False
        for rule in self._decoders:
            name = rule["type"]
            if name == "ByteLevel":
                return _byte_level(tokens), frozenset()
            if name == "ByteFallback":
                matches = ((i, _BYTE_PIECE.fullmatch(token)) for i, token in enumerate(tokens))
                found |= {i: bytes([int(match[1], 16)]) for i, match in matches if match}
            elif name == "Fuse":
                is_fused = True
            elif name == "Strip":
                # of the whole text, it takes what no token in the middle has
                if not is_fused:
                    tokens = [_strip(token, rule) for token in tokens]
            else:
                tokens = list(map(_rewriter(rule), tokens))
        result = [found.get(i) or token.encode() for i, token in enumerate(tokens)]
        return result, frozenset(found)

    # -- texts to ids ----------------------------------------------------------------------------

    def _normalizers(self, state: dict | None) -> Iterator[dict]:
        for rule in _flat(state, "normalizers"):
            name = rule["type"]
            if name == "ByteLevel" or (name == "Replace" and self._is_undone(rule)):
                yield rule
            elif name in _FORMS:
                self.losses.append(f"its normalizer brings characters to {name}")
            elif name == "Lowercase":
                self.losses.append("its normalizer lowercases")
            elif name == "StripAccents":
                self.losses.append("its normalizer strips accents")
            elif name == "BertNormalizer":
                self.losses += _bert(rule)
            elif name == "Precompiled":
                self.losses.append("its normalizer rewrites characters by SentencePiece rules")
            elif name == "Replace":
                pattern = next(iter(rule["pattern"].values()))
                self.losses.append(
                    f"its normalizer replaces {pattern!r} by {rule['content']!r}, which its "
                    "decoder does not undo"
                )
            elif name == "Strip":
                self.losses.append("its normalizer strips the ends")
            # a prefix is not for the middle of a text
            elif name != "Prepend":
                self.losses.append(f"its normalizer {name} may change a text")

    def _is_undone(self, rule: dict) -> bool:
        pattern, content = rule["pattern"].get("String"), rule["content"]
        if pattern is None:
            return False
        for undo in self._decoders:
            if undo["type"] == "Replace" and undo["pattern"].get("String") == content:
                return undo["content"] == pattern
        return pattern == " " and content == METASPACE and "Metaspace" in self._types

    def _pre_tokenizers(self, state: dict | None) -> Iterator[dict]:
        rules = list(_flat(state, "pretokenizers"))
        has_metaspace = any(rule["type"] == "Metaspace" for rule in rules)
        for rule in rules:
            name = rule["type"]
            if name in _DROPS_WHITESPACE or rule.get("behavior") == "Removed":
                what = "whitespace" if name in _DROPS_WHITESPACE[:3] else "what it splits at"
                self.losses.append(f"its pre-tokenizer {name} drops {what}")
                # Metaspace cuts at spaces by itself
                if has_metaspace and name in _DROPS_WHITESPACE:
                    continue
            if name == "ByteLevel":
                rule = rule | {"add_prefix_space": False}
            elif name == "Metaspace":
                rule = rule | {"prepend_scheme": "never"}
            yield rule


def _state(backend: Any, part: str) -> dict | None:
    value = getattr(backend, part)
    return None if value is None else json.loads(value.__getstate__())


def _flat(rule: dict | None, name: str) -> Iterator[dict]:
    if rule is None:
        return
    if rule["type"] == "Sequence":
        for inner in rule[name]:
            yield from _flat(inner, name)
    else:
        yield rule


def _bert(rule: dict) -> Iterator[str]:
    if rule["lowercase"]:
        yield "its normalizer lowercases"
    if rule["strip_accents"] or (rule["strip_accents"] is None and rule["lowercase"]):
        yield "its normalizer strips accents"
    if rule["clean_text"]:
        yield "its normalizer drops control characters"
    if rule["handle_chinese_chars"]:
        yield "its normalizer puts spaces around Chinese characters"


def _rewriter(rule: dict) -> Callable[[str], str]:
    """What a decoder makes of a token before it becomes bytes."""
    name = rule["type"]
    if name == "Metaspace":
        return lambda token: token.replace(rule["replacement"], " ")
    if name == "Replace":
        kind, pattern = next(iter(rule["pattern"].items()))
        if kind == "String":
            return lambda token: token.replace(pattern, rule["content"])
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise TokenBytesError(
                f"TokenBytes: the decoder replaces the regular expression {pattern!r}, which "
                f"Python's re does not read ({error}). Give the bytes to TokenBytes.from_bytes "
                "instead."
            ) from error
        return lambda token: compiled.sub(lambda _: rule["content"], token)
    if name == "BPEDecoder":
        return lambda token: token.replace(rule["suffix"], " ")
    if name == "WordPiece":
        return lambda token: _word_piece(token, rule["prefix"], rule["cleanup"])
    raise TokenBytesError(
        f"TokenBytes: the decoder {name} makes bytes of tokens in a way that is not known here. "
        "Give the bytes to TokenBytes.from_bytes instead."
    )


def _word_piece(token: str, prefix: str, cleanup: bool) -> str:
    token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
    if cleanup:
        for spaced, cleaned in _CLEANED:
            token = token.replace(spaced, cleaned)
    return token


def _strip(token: str, rule: dict) -> str:
    begin, end = 0, len(token)
    while begin < min(rule["start"], end) and token[begin] == rule["content"]:
        begin += 1
    while end > max(begin, len(token) - rule["stop"]) and token[end - 1] == rule["content"]:
        end -= 1
    return token[begin:end]


def _byte_level(tokens: list[str]) -> list[bytes]:
    """A byte for every character; a token with a character that is no byte's is text."""
    try:
        data = "".join(tokens).translate(_TO_LATIN).encode("latin-1")
    except UnicodeEncodeError:
        return [
            bytes(map(_BYTES.__getitem__, token)) if _BYTES.keys() >= set(token) else token.encode()
            for token in tokens
        ]
    ends = accumulate(map(len, tokens), initial=0)
    return [data[begin:end] for begin, end in pairwise(ends)]
