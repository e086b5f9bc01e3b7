# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer says of its ids: a Reading, by which kind of object it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ._token_roles import NAMES, find_roles
from .errors import TokenBytesError

METASPACE = "\u2581"
EncodeTexts = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A tokenizer, as far as bytes go. Nothing in it is checked yet.

    Attributes:
        kind: in a few words.
        tokens: the bytes of every id in the middle of a text; of a special token its name.
        names: special tokens, by name.
        roles: as TokenBytes.roles.
        byte_pieces: ids of single bytes that text becomes only where nothing else has them.
        added: ids whose bytes are given as text, whatever the decoder makes of them.
        losses: what the tokenizer changes in a text before it cuts it, each a clause.
        encode: texts to ids without that: no special tokens, prefix or normaliser.
        encode_own: texts to ids as the tokenizer itself does it, without special tokens around.
        decode: ids to text as the tokenizer does it.
        content: what tells it from others with the same tokens and roles.
    """

    kind: str
    tokens: list[bytes]
    names: dict[str, int]
    roles: dict[str, tuple[int, ...]]
    byte_pieces: frozenset[int] = frozenset()
    added: frozenset[int] = frozenset()
    losses: list[str] = field(default_factory=list)
    encode: EncodeTexts | None = None
    encode_own: EncodeTexts | None = None
    decode: Callable[[Sequence[Sequence[int]]], list[str]] | None = None
    content: bytes = b""


def piece_bytes(piece: str) -> bytes:
    """A SentencePiece piece that is text."""
    return piece.replace(METASPACE, " ").encode()


# -- tiktoken ------------------------------------------------------------------------------------


def is_tiktoken(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "decode_single_token_bytes") and hasattr(tokenizer, "encode_ordinary")


def read_tiktoken(encoding: Any, tokenizer: Any) -> Reading:
    """tiktoken.Encoding; `tokenizer` is what wraps it, or the same."""
    names = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    tokens = []
    for token_id in range(encoding.n_vocab):
        try:
            tokens.append(encoding.decode_single_token_bytes(token_id))
        except KeyError:  # a hole between the ranks and the special tokens
            tokens.append(b"")

    encode = partial(_encode_ordinary, encoding)
    return Reading(
        kind="tiktoken BPE",
        tokens=tokens,
        names=names,
        roles=find_roles(tokenizer, names, {}),
        encode=encode,
        encode_own=encode,
        decode=lambda batch: [encoding.decode(ids) for ids in batch],
        content=getattr(encoding, "_pat_str", "").encode(),
    )


# -- sentencepiece -------------------------------------------------------------------------------


def is_sentencepiece(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "id_to_piece") and hasattr(tokenizer, "serialized_model_proto")


def read_sentencepiece(processor: Any) -> Reading:
    """sentencepiece.SentencePieceProcessor."""
    ids = list(range(processor.get_piece_size()))
    pieces = processor.id_to_piece(ids)
    names = {pieces[i]: i for i in ids if processor.is_control(i) or processor.is_unknown(i)}
    # a piece that its maker defined has such a name without being special
    listed = {name: processor.piece_to_id(name) for known in NAMES.values() for name in known}
    listed = {name: i for name, i in listed.items() if pieces[i] == name} | names
    model = _SentencePieceModel(processor)
    given = {role: getattr(processor, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
    return Reading(
        kind=model.kind,
        tokens=[model.bytes_of(i, piece) for i, piece in zip(ids, pieces, strict=True)],
        names=names,
        roles=find_roles(None, listed, given),
        byte_pieces=frozenset(i for i in ids if processor.is_byte(i)),
        # a control piece decodes to nothing
        added=frozenset(names.values()),
        losses=model.losses,
        encode=model.exact.encode,
        encode_own=processor.encode,
        decode=processor.decode,
    )


class _SentencePieceModel:
    """A processor's bytes, what it loses, and a copy of it that loses nothing."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        proto = processor.serialized_model_proto()
        fields = _fields(proto)
        rules = _fields(b"".join(fields.get(3, [])))
        trainer = _fields(b"".join(fields.get(2, [])))
        # protobuf's defaults: unigram, and true
        model = {1: "Unigram", 2: "BPE", 3: "words", 4: "characters"}[trainer.get(3, [1])[-1]]
        has_bytes = any(map(processor.is_byte, range(min(1024, processor.get_piece_size()))))
        self.kind = f"SentencePiece {model}{' with byte fallback' if has_bytes else ''}"
        self.losses = []
        if rules.get(2, [b""])[-1]:
            name = rules.get(1, [b"unnamed"])[-1].decode()
            self.losses.append(f"its normalizer rewrites characters (rule {name})")
        if rules.get(4, [1])[-1]:
            self.losses.append("its normalizer drops repeated and outer spaces")
        if not rules.get(5, [1])[-1] or trainer.get(24, [0])[-1]:
            raise TokenBytesError(
                "TokenBytes: this SentencePiece model does not write a space as the beginning of "
                "the next word (escape_whitespaces=false or treat_whitespace_as_suffix=true), "
                "which is not supported. Give the bytes of its ids to TokenBytes.from_bytes."
            )
        # the last value of a protobuf field counts: no rules, no space in front, all spaces kept
        override = b"\x12\x00" + b"\x18\x00" + b"\x20\x00"
        self.exact = type(processor)()
        self.exact.LoadFromSerializedProto(proto + b"\x1a" + bytes([len(override)]) + override)

    def bytes_of(self, piece_id: int, piece: str) -> bytes:
        if self._processor.is_byte(piece_id):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(piece_id) or self._processor.is_unknown(piece_id):
            return piece.encode()
        return piece_bytes(piece)


def _fields(message: bytes) -> dict[int, list[Any]]:
    """A protobuf message's values by field number: ints and bytes; fixed-size numbers are left."""
    found: dict[int, list[Any]] = {}
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while place < len(message):
        tag = number()
        wire = tag & 7
        if wire == 0:
            found.setdefault(tag >> 3, []).append(number())
        elif wire == 2:
            length = number()
            found.setdefault(tag >> 3, []).append(message[place : place + length])
            place += length
        else:
            place += {1: 8, 5: 4}[wire]
    return found


# -- transformers' tokenizers in Python ----------------------------------------------------------


def read_python(tokenizer: Any) -> Reading:
    """A transformers tokenizer without a backend: over SentencePiece, tiktoken, or bytes."""
    for attribute in ("tokenizer", "model", "sp_model"):
        inner = getattr(tokenizer, attribute, None)
        if inner is not None and is_tiktoken(inner):
            return read_tiktoken(inner, tokenizer)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TokenBytesError(_unknown(tokenizer))
    specials = set(tokenizer.all_special_ids)
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    names = {token: i for i, token in added.items() if i in specials}
    size = max([len(tokenizer), *(i + 1 for i in added)])
    written = [added.get(i) or _token_name(tokenizer, i) for i in range(size)]

    def encode_own(texts: list[str]) -> list[list[int]]:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    common: dict[str, Any] = {
        "names": names,
        "roles": find_roles(tokenizer, {token: i for i, token in added.items()}, {}),
        "added": frozenset(added),
        "encode_own": encode_own,
    }
    processor = getattr(tokenizer, "sp_model", None)
    if processor is not None and is_sentencepiece(processor):
        return _read_over_sentencepiece(processor, written, added, common)
    if getattr(tokenizer, "_utf_vocab_size", None) == 256:
        first = tokenizer.offset
        tokens = [token.encode() for token in written]
        tokens[first : first + 256] = [bytes([byte]) for byte in range(256)]
        return Reading(
            kind="bytes",
            tokens=tokens,
            encode=partial(_encode_bytes, first),
            decode=lambda batch: [tokenizer.decode(ids) for ids in batch],
            **common,
        )
    raise TokenBytesError(_unknown(tokenizer))


def _read_over_sentencepiece(
    processor: Any, written: list[str], added: dict[int, str], common: dict[str, Any]
) -> Reading:
    """Ids of a wrapper, which need not be those of the pieces."""
    model = _SentencePieceModel(processor)
    pieces = {i: processor.piece_to_id(token) for i, token in enumerate(written) if i not in added}
    tokens = [
        model.bytes_of(pieces[i], token) if i in pieces else token.encode()
        for i, token in enumerate(written)
    ]
    ids_of = {token: i for i, token in enumerate(written)}
    unknown = min(common["roles"]["unk"], default=0)

    def decode(batch: Sequence[Sequence[int]]) -> list[str]:
        return processor.decode([[written[i] for i in ids] for ids in batch])

    return Reading(
        kind=model.kind,
        tokens=tokens,
        byte_pieces=frozenset(i for i in pieces if processor.is_byte(pieces[i])),
        losses=model.losses,
        encode=partial(_encode_pieces, model.exact, ids_of, unknown),
        decode=decode,
        content=processor.serialized_model_proto(),
        **common,
    )


# at the top level of the module, for pickle


def _encode_ordinary(encoding: Any, texts: list[str]) -> list[list[int]]:
    return [encoding.encode_ordinary(text) for text in texts]


def _encode_bytes(first: int, texts: list[str]) -> list[list[int]]:
    return [[first + byte for byte in text.encode()] for text in texts]


def _encode_pieces(
    processor: Any, ids: dict[str, int], unknown: int, texts: list[str]
) -> list[list[int]]:
    batch = processor.encode(texts, out_type=str)
    return [[ids.get(piece, unknown) for piece in pieces] for pieces in batch]


def _token_name(tokenizer: Any, token_id: int) -> str:
    return tokenizer.convert_ids_to_tokens(token_id) or ""


def _unknown(tokenizer: Any) -> str:
    return (
        "TokenBytes: expected a transformers tokenizer, tokenizers.Tokenizer, sentencepiece "
        f"processor or tiktoken.Encoding, got {type(tokenizer).__name__}, whose bytes nothing here "
        "knows how to ask for. Give them by TokenBytes.from_bytes(list_of_bytes, roles=...)."
    )
