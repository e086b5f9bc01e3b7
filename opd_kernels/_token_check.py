# SPDX-License-Identifier: Apache-2.0
"""A Reading against its tokenizer: what decode makes of ids, and what becomes of probing texts."""

from __future__ import annotations

from collections.abc import Sequence

from ._token_cut import Cut
from ._token_formats import Reading
from .errors import TokenBytesError

# ids whose decoding is compared, in equal steps over all of them
_NUM_DECODED = 4096
# no normaliser changes it
_PLAIN = "the model reads a line and writes what follows it"
PROBES = (
    "The quick brown fox.",
    "two  spaces,   three ,\tone tab\t\tand two",
    " in front and behind ",
    "lines\n\nand\r\nreturns\n",
    "naïve façade: Ångström, ÉCOLE, straße",
    "e\u0301 and n\u0303 and a\u030a\u0323 combine",
    "ﬁne ① ㎏ Ｗｉｄｅ ½",
    "中文字符,日本語テキスト、한국어 문장",
    "👩‍👩‍👧 🏳️‍🌈 👍🏽 🇩🇪",
    "שלום עולם مرحبا بالعالم",
    "नमस्ते สวัสดี",
    "3.14159 1,000,000 0x1F 12:30",
    "def f(x):\n    return x ** 2  # don't",
    "https://a.example/b?c=d&e=%20#f",
    "<s> is text here, and so is <unk>",
    "a\u200bb\u00a0c",
)


def check(reading: Reading, cut: Cut) -> list[str]:
    """What the tokenizer loses of texts that its vocabulary can spell, each a clause.

    Raises:
        TokenBytesError: ids have other bytes than the reading says.
    """
    if reading.decode is not None:
        _check_decoding(reading)
    losses = list(dict.fromkeys(reading.losses))
    if reading.encode_own is None:
        return losses
    if losses and (change := _probe(reading, cut, (_PLAIN,))):
        raise TokenBytesError(
            f"TokenBytes: of this tokenizer ({reading.kind}) {change[0]}, in which there is "
            "nothing to normalise. Give the bytes of its ids to TokenBytes.from_bytes."
        )
    return losses or _probe(reading, cut, PROBES)


def _check_decoding(reading: Reading) -> None:
    """decode(a, id, a) has the bytes of id between those of a, as far as they are UTF-8."""
    left = {i for ids in reading.roles.values() for i in ids} | reading.added
    ordinary = [i for i, token in enumerate(reading.tokens) if token and i not in left]
    # not a byte piece, which a decoder would join with the next
    whole = [i for i in ordinary if i not in reading.byte_pieces]
    letters = [i for i in whole if reading.tokens[i].isalpha()]
    letters += [i for i in whole if reading.tokens[i].strip().isalpha()]
    if not letters:
        return
    letter = letters[0]
    sample = ordinary[:: -(-len(ordinary) // _NUM_DECODED)]
    before, *decoded = reading.decode([[letter], *([letter, i, letter] for i in sample)])
    for i, text in zip(sample, decoded, strict=True):
        expected = before.encode() + reading.tokens[i] + reading.tokens[letter]
        # a decoder may write U+FFFD for what is no UTF-8, once or more, or nothing
        if _known(text) != _known(expected.decode("utf-8", "ignore")):
            raise TokenBytesError(
                f"TokenBytes: id {i} of this tokenizer ({reading.kind}) has the bytes "
                f"{reading.tokens[i]!r} by its vocabulary and decoder, but decoding it between "
                f"two of id {letter} gives {text!r}. Give its bytes to TokenBytes.from_bytes."
            )


def _known(text: str) -> str:
    return text.replace("\ufffd", "")


def _probe(reading: Reading, cut: Cut, texts: Sequence[str]) -> list[str]:
    """The first text that the tokenizer's own ids do not spell, in a clause."""
    probes = []
    for text in texts:
        try:
            cut(text.encode())
        except TokenBytesError:
            continue
        probes.append(text)
    unknown = set(reading.roles["unk"])
    for text, ids in zip(probes, reading.encode_own(probes) if probes else (), strict=True):
        spelled = b"".join(reading.tokens[i] for i in ids)
        # a space in front of a text is no loss: it is seen
        if spelled not in (text.encode(), b" " + text.encode()) and unknown.isdisjoint(ids):
            return [f"its ids of {text!r} spell {spelled.decode('utf-8', 'replace')!r}"]
    return []
