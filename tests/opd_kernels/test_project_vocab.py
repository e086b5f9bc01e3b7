# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import time

import pytest
import torch

import opd_kernels as opk
from opd_kernels.project_vocab import _packed, nearest_tokens

BOS, EOS, EOT, PAD, UNK = 1, 2, 4, 8, 16


class Tokens(list):
    """What project_vocab reads of a TokenBytes that comes as a list."""

    def __init__(self, tokens, roles=None):
        super().__init__(tokens)
        self.symbols = torch.zeros(len(tokens), dtype=torch.uint8)
        for i, bits in (roles or {}).items():
            self.symbols[i] = bits


class Packed:
    """The tensors of a TokenBytes."""

    def __init__(self, tokens):
        self.data = torch.frombuffer(bytearray(b"".join(tokens)), dtype=torch.uint8)
        self.offsets = torch.tensor([0, *map(len, tokens)]).cumsum(0)
        self.symbols = tokens.symbols


STUDENT = Tokens(
    [b"", b"a", b"ab", b"\xff", b"ab", b"", b"only", b"", b"abc"],
    {0: BOS, 5: EOS | PAD, 7: UNK},
)
TEACHER = Tokens(
    [b"abc", b"a", b"a", b"", b"", b"\xff", b"ab", b"", b"", b"ax", b""],
    {3: EOS, 4: EOT, 7: PAD, 8: UNK},
)


@pytest.mark.parametrize("form", [Tokens.copy, Packed], ids=["list", "packed"])
def test_pairs_have_the_same_bytes_or_the_same_role(form):
    student, teacher = (form(side) if form is Packed else side for side in (STUDENT, TEACHER))
    found = opk.project_vocab(student, teacher)
    assert list(zip(found.student_ids.tolist(), found.teacher_ids.tolist(), strict=True)) == [
        *((1, 1), (2, 6), (3, 5), (5, 3), (8, 0))
    ]
    assert (found.student_size, found.teacher_size) == (9, 11)
    assert found.student_coverage == pytest.approx(5 / 9)
    assert found.teacher_coverage == pytest.approx(5 / 11)
    assert "5 pairs" in repr(found)


def test_letters_are_paired_with_letters_and_not_with_byte_pieces():
    """SentencePiece has <0x41> before A: no text becomes the first."""
    student = opk.TokenBytes.from_bytes([b"A", b"b", b"A"])
    student_pieces = Tokens([b"A", b"b", b"A"])
    student_pieces.text_ids = {b"A": 2, b"b": 1}
    teacher = Tokens([b"b", b"A", b"Ax"])
    assert student.text_ids[b"A"] == 0
    found = opk.project_vocab(student_pieces, teacher)
    assert found.student_ids.tolist() == [1, 2]
    assert found.teacher_ids.tolist() == [0, 1]
    assert found.map_ids(torch.tensor([0, 1, 2])).tolist() == [1, 2, -1]
    assert found.nearest(torch.tensor([2])).tolist() == [2]
    assert opk.project_vocab(teacher, student_pieces).teacher_ids.tolist() == [1, 2]


def test_ids_are_mapped_with_duplicates_and_shared_roles():
    found = opk.project_vocab(STUDENT, TEACHER)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, -1]], dtype=torch.int32)
    mapped = [[8, 1, 1, 5, -1, 3], [2, 5, -1, -1, -1, -1]]
    assert found.map_ids(ids).tolist() == mapped
    # `ax` is one edit from `a`, `ab` and their like: the lowest id
    mapped[1][3] = 1
    assert found.nearest(ids).tolist() == mapped
    assert found.nearest(ids[:0]).shape == (0, 6)


def test_the_shares_of_a_text_are_those_of_its_tokens():
    found = opk.project_vocab(STUDENT, TEACHER)
    assert found.share_of(torch.tensor([0, 2, 9, 9])) == 0.5
    assert found.share_of(torch.tensor([4, 6, 6, 6]), "student") == 0.25
    assert found.share_of(torch.tensor([], dtype=torch.int64)) == 1.0
    with pytest.raises(ValueError, match="side must be"):
        found.share_of(torch.tensor([0]), "both")


def test_the_matrix_moves_the_mass_of_shared_tokens_and_no_other():
    found = opk.project_vocab(STUDENT, TEACHER)
    matrix = found.matrix()
    assert matrix.layout == torch.sparse_csr and matrix.shape == (9, 11)
    law = torch.rand(11)
    moved = matrix @ law
    expected = torch.zeros(9)
    expected[[1, 2, 4, 3, 8]] = torch.stack(
        [law[1] + law[2], law[6] / 2, law[6] / 2, law[5], law[0]]
    )
    # the student's one token for the end of a text and padding
    expected[5] = law[3] + law[7]
    torch.testing.assert_close(moved, expected)


def test_one_vocabulary_is_covered_whole():
    tokens = [b"a", b"b", b"ab", b"\x00"]
    found = opk.project_vocab(tokens, tokens)
    assert found.student_ids.tolist() == found.teacher_ids.tolist() == [0, 1, 2, 3]
    assert found.student_coverage == found.teacher_coverage == 1.0
    assert torch.equal(found.matrix().to_dense(), torch.eye(4))


def test_vocabularies_with_nothing_in_common():
    for student, teacher in (([b"a"], [b"b"]), ([], [b"b"]), ([b"a"], []), ([], [])):
        found = opk.project_vocab(student, teacher)
        assert found.student_ids.shape == found.teacher_ids.shape == (0,)
        assert found.matrix().shape == (len(student), len(teacher))
        ids = torch.arange(len(teacher))
        assert (found.map_ids(ids) == -1).all()
        assert found.nearest(ids).tolist() == [0 if student else -1] * len(teacher)


def test_what_is_no_vocabulary_and_no_id_is_refused():
    with pytest.raises(TypeError, match="teacher_bytes must be a TokenBytes or a sequence of b"):
        opk.project_vocab([b"a"], ["a"])
    with pytest.raises(ValueError, match=r"student_bytes must have .* from 0 to 1, .* none for 1"):
        opk.project_vocab({0: b"a", 5: b"b"}, [b"a"])
    found = opk.project_vocab([b"a"], [b"a"])
    with pytest.raises(ValueError, match=r"ids must be in \[0, 1\) or -1, got 0 to 1"):
        found.map_ids(torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="int64 or int32"):
        found.nearest(torch.tensor([0.0]))


# -- edit distance -------------------------------------------------------------------------------


def _edits(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize("longest", [6, 80])
def test_nearest_tokens_are_those_of_the_whole_table(longest):
    source = random.Random(longest)
    make = [bytes(source.choices(b"ab \xf0", k=source.randrange(longest + 1))) for _ in range(40)]
    queries, vocabulary = make[:10], make[10:]
    special = [int(source.random() < 0.2) for _ in vocabulary]
    table = (*_packed(vocabulary), bytes(special))
    ids, distances = nearest_tokens((*_packed(queries), None), table)
    for query, found, distance in zip(queries, ids.tolist(), distances.tolist(), strict=True):
        edits = [
            (_edits(query, token), i)
            for i, (token, skip) in enumerate(zip(vocabulary, special, strict=True))
            if token and not skip
        ]
        assert (distance, found) == (min(edits) if query else (-1, -1))


def test_a_large_vocabulary_takes_seconds_not_minutes():
    source = random.Random(0)
    words = [
        bytes(source.choices(b"etaoinshr dlu", k=source.randrange(2, 10))) for _ in range(80_000)
    ]
    student, teacher = words[:30_000], words[20_000:]
    begin = time.perf_counter()
    found = opk.project_vocab(student, teacher)
    assert time.perf_counter() - begin < 5
    assert found.teacher_coverage > 0.15
    unmatched = (found.map_ids(torch.arange(len(teacher))) < 0).nonzero().squeeze(1)[:200]
    begin = time.perf_counter()
    assert (found.nearest(unmatched) >= 0).all()
    assert time.perf_counter() - begin < 5
    begin = time.perf_counter()
    found.nearest(unmatched)
    # what has been computed is kept
    assert time.perf_counter() - begin < 0.5
