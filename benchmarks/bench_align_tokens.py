# SPDX-License-Identifier: Apache-2.0
"""Alignment of two tokenizations against plain Python and TRL's, on the text of this repository."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness

# tables are as large as those of Qwen and Llama; the ids of a trained BPE are in the order of its
# merges, as theirs are, so that frequent ones are near each other
STUDENT_VOCAB, TEACHER_VOCAB = 151_936, 128_256
NUM_THREADS = 2
DOCUMENT_BYTES = 8192
# of the student; short calls, of which one meets a quiet moment of two cores
NUM_TOKENS = 500_000
NUM_PEER_TOKENS = 20_000


class Side(NamedTuple):
    """One tokenizer's documents, and the bytes of its ids."""

    documents: list[torch.Tensor]
    table: Any
    pieces: dict[int, bytes]
    tokenizer: Any

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.documents))


def texts() -> list[str]:
    """Documents of about DOCUMENT_BYTES: prose and code, in an order of no rule."""
    paths = sorted(
        path
        for suffix in ("md", "py", "cpp", "h", "cu", "cuh")
        for folder in ("docs", "opd_kernels", "python", "csrc", "tests", "benchmarks")
        for path in (harness.ROOT / folder).rglob(f"*.{suffix}")
    )
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    step = DOCUMENT_BYTES
    documents = [text[start : start + step] for start in range(0, len(text), step)]
    random.Random(0).shuffle(documents)
    return documents


def tokenized(documents: list[str], size: int, vocab_size: int, pattern: str | None) -> Side:
    """A byte-level BPE of `size` tokens trained on the documents; a table of `vocab_size`."""
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers
    byte_level = split.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = (
        byte_level
        if pattern is None
        else split.Sequence([split.Split(tokenizers.Regex(pattern), "isolated"), byte_level])
    )
    alphabet = split.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    ids = [torch.tensor(one.ids) for one in tokenizer.encode_batch(documents)]
    decoded = byte_of_character()
    pieces = {
        token: bytes(decoded[character] for character in text)
        for text, token in tokenizer.get_vocab().items()
    }
    lengths = torch.full((vocab_size + 1,), 4)
    lengths[0] = 0
    for token, piece in pieces.items():
        lengths[token + 1] = len(piece)
    data = b"".join(pieces.get(token, b"none") for token in range(vocab_size))
    table = SimpleNamespace(
        data=torch.frombuffer(bytearray(data), dtype=torch.uint8),
        offsets=lengths.cumsum(0),
        symbols=torch.zeros(vocab_size, dtype=torch.uint8),
    )
    return Side(ids, table, pieces, tokenizer)


def byte_of_character() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters, backwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def rows_of(student: Side, teacher: Side, documents: range) -> list[tuple[list[int], list[int]]]:
    """Ids of both sides of some documents, as lists."""
    return [
        (student.documents[index].tolist(), teacher.documents[index].tolist())
        for index in documents
    ]


def in_python(student: Side, teacher: Side, documents: range) -> Callable[[], list]:
    """Boundaries of both sides by two pointers and dicts of bytes."""
    rows = rows_of(student, teacher, documents)

    def align(mine: list[int], others: list[int]) -> list[tuple[int, int]]:
        boundaries = [(0, 0)]
        i = j = 0
        left = right = b""
        while i < len(mine) or j < len(others):
            if len(left) <= len(right):
                left += student.pieces[mine[i]]
                i += 1
            else:
                right += teacher.pieces[others[j]]
                j += 1
            shorter = min(len(left), len(right))
            if left[:shorter] != right[:shorter]:
                raise ValueError("the bytes differ")
            left, right = left[shorter:], right[shorter:]
            if not left and not right:
                boundaries.append((i, j))
        return boundaries

    return lambda: [align(*row) for row in rows]


def in_trl(student: Side, teacher: Side, documents: range) -> Callable[[], list]:
    """TRL's GOLD: byte offsets of the tokens of both sides, and its groups.

    The offsets are those of its trainer: on rollouts of the student it asks the tokenizer for each
    token's piece; the teacher's pieces have their lengths in a dict here.
    """
    transformers = pytest.importorskip("transformers")
    loss = pytest.importorskip("trl.experimental.gold.gold_trainer").ULDLoss
    piece_byte_len = pytest.importorskip("trl.experimental.utils").piece_byte_len
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=student.tokenizer)
    lengths = {
        token: piece_byte_len(piece) for piece, token in teacher.tokenizer.get_vocab().items()
    }
    rows = rows_of(student, teacher, documents)

    def of_student(token: int) -> int:
        return piece_byte_len(tokenizer.convert_ids_to_tokens([token])[0])

    def offsets(ids: list[int], length_of: Callable[[int], int]) -> list[tuple[int, int]]:
        found, end = [], 0
        for token in ids:
            begin, end = end, end + length_of(token)
            found.append((begin, end))
        return found

    return lambda: [
        loss._align_by_byte_offsets(offsets(mine, of_student), offsets(other, lengths.__getitem__))
        for mine, other in rows
    ]


def bench_align_tokens(benchmark):
    """Tokens are the student's; those of the teacher, about as many, come on top."""
    documents = texts()
    student = tokenized(documents, 16_384, STUDENT_VOCAB, None)
    teacher = tokenized(documents, 6_000, TEACHER_VOCAB, r"\p{N}|\s+|[^\s\p{N}]+")
    repeats = -(-NUM_TOKENS // student.num_tokens)
    student_ids, teacher_ids = (side.documents * repeats for side in (student, teacher))
    num_tokens = student.num_tokens * repeats
    few = range(max(1, NUM_PEER_TOKENS * len(documents) // student.num_tokens))
    num_few = sum(len(student.documents[index]) for index in few)

    def ours() -> opk.AlignedBatch:
        return opk.align_batch(
            student_ids, teacher_ids, student.table, teacher.table, num_threads=NUM_THREADS
        )

    variants = {harness.OURS: ours, "Python": in_python(student, teacher, few)}
    if importlib.util.find_spec("trl") is not None:
        variants["TRL GOLD"] = in_trl(student, teacher, few)
    batch = ours()
    assert batch.is_aligned.all()
    boundaries = [len(found) - 1 for found in variants["Python"]()]
    assert boundaries == [len(batch[index].is_aligned) for index in few]
    if "TRL GOLD" in variants:
        assert boundaries == [len(groups) for groups, _ in variants["TRL GOLD"]()]

    benchmark.group = "align_tokens"
    turns = harness.take_turns(benchmark, variants, rounds=100, slow_rounds=20)
    for name, seconds in turns.seconds.items():
        if name != harness.OURS:
            turns.seconds[name] = {
                turn: taken * num_tokens / num_few for turn, taken in seconds.items()
            }
    harness.record(benchmark, turns, harness.OURS)
    best = min(turns.seconds[harness.OURS].values())
    note = (
        f"{num_tokens} student and {teacher.num_tokens * repeats} teacher tokens in "
        f"{len(student_ids)} documents, {len(batch.is_aligned)} chunks, {NUM_THREADS} threads"
    )
    harness.goal(
        benchmark,
        "align_tokens: million student tokens/s",
        num_tokens / best / 1e6,
        at_least=20,
        note=note,
    )
    for name in ("Python", "TRL GOLD"):
        ratio = turns.ratio(name, harness.OURS) if name in turns.seconds else None
        harness.goal(benchmark, f"align_tokens: time of {name} over ours", ratio, at_least=50)
    harness.assert_goals(benchmark)
