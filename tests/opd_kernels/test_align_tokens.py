# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import array
import random
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opd_kernels as opk
from opd_kernels import _align

BOS, EOS, EOT, PAD, UNK = 1, 2, 4, 8, 16
ROLES = (BOS, EOS, EOT, PAD, UNK, EOS | PAD, BOS | EOS | UNK)
NUL_TO_FF = bytes(range(256))


class Pieces:
    """A tokenizer with one id per piece: bytes, or the roles of a special token."""

    def __init__(self, pieces):
        self.pieces = [b"" if isinstance(piece, int) else piece for piece in pieces]
        roles = [piece if isinstance(piece, int) else 0 for piece in pieces]
        self.symbols = torch.tensor(roles, dtype=torch.uint8)
        self.data = torch.frombuffer(bytearray(b"".join(self.pieces) or b"\0"), dtype=torch.uint8)
        lengths = torch.tensor([0] + [len(piece) for piece in self.pieces])
        self.offsets = lengths.cumsum(0)
        self.ids = list(range(len(pieces)))

    def __getitem__(self, token_id):
        return self.pieces[token_id]


def align(student, teacher, **options):
    return opk.align_tokens(student.ids, teacher.ids, student, teacher, **options)


def chunks(alignment):
    """[(student tokens, teacher tokens, is_aligned)] as counts."""
    student, teacher = (offsets.diff().tolist() for offsets in alignment[:2])
    return list(zip(student, teacher, alignment.is_aligned.tolist(), strict=True))


def assert_tiles(alignment, student, teacher):
    """Chunks tile both sides; the aligned ones have the same bytes on both."""
    for offsets, side in zip(alignment[:2], (student, teacher), strict=True):
        assert offsets[0] == 0 and offsets[-1] == len(side.ids)
        assert (offsets.diff() >= 0).all()
    assert (alignment.student_offsets.diff() + alignment.teacher_offsets.diff() > 0).all()
    bounds = zip(*(offsets.tolist() for offsets in alignment[:2]), strict=True)
    for chunk, ((s, t), (next_s, next_t)) in enumerate(pairwise(bounds)):
        mine = b"".join(student.pieces[s:next_s])
        assert alignment.num_bytes[chunk] == len(mine)
        if alignment.is_aligned[chunk]:
            assert mine == b"".join(teacher.pieces[t:next_t])
            assert next_s > s and next_t > t


def assert_equal(got, expected):
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other), (got, expected)


def assert_swapped(student, teacher, alignment, **options):
    swapped = align(teacher, student, **options)
    assert_equal(
        (swapped.teacher_offsets, swapped.student_offsets, swapped.is_aligned), alignment[:3]
    )


# -- strategies ----------------------------------------------------------------------------------

# few letters, so that what differs is ambiguous; whole characters cut apart, and no UTF-8 at all
TEXTS = st.one_of(
    st.binary(max_size=24),
    st.text("ab", max_size=24).map(str.encode),
    st.text("aé\u0301👩\u200d🚀中", max_size=8).map(str.encode),
)


@st.composite
def cuts(draw, text):
    """Pieces of the text, with special and empty tokens anywhere."""
    places = draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)}
    order = sorted(places)
    pieces = []
    for begin, end in zip(order, [*order[1:], None], strict=True):
        pieces += draw(st.lists(st.sampled_from((b"", *ROLES)), max_size=2))
        if end is not None:
            pieces.append(text[begin:end])
    return Pieces(pieces)


@st.composite
def pairs(draw, texts=TEXTS):
    text = draw(texts)
    return draw(cuts(text)), draw(cuts(text))


@st.composite
def edited_pairs(draw):
    text = draw(TEXTS)
    other = bytearray(text)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(other)))
        other[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return draw(cuts(text)), draw(cuts(bytes(other)))


# -- properties ----------------------------------------------------------------------------------


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_same_bytes_are_the_reference(pair):
    student, teacher = pair
    got = align(student, teacher)
    assert_tiles(got, student, teacher)
    assert_equal(got, opk.reference.align_tokens(student.ids, teacher.ids, student, teacher))
    assert_swapped(student, teacher, got)
    # with nothing to repair, repair is strict
    assert_equal(align(student, teacher, mode="repair"), got)
    assert int(got.num_bytes.sum()) == sum(map(len, student.pieces))


@given(edited_pairs(), st.sampled_from((1, 2, 4, 1024)))
@settings(max_examples=100, deadline=None)
def test_other_bytes_are_the_reference(pair, max_edits):
    student, teacher = pair
    options = {"mode": "repair", "max_edits": max_edits}
    got = align(student, teacher, **options)
    assert_tiles(got, student, teacher)
    expected = opk.reference.align_tokens(student.ids, teacher.ids, student, teacher, **options)
    assert_equal(got, expected)
    assert_swapped(student, teacher, got, **options)
    if b"".join(student.pieces) != b"".join(teacher.pieces):
        with pytest.raises(opk.AlignmentError, match="differ at byte"):
            align(student, teacher)


@given(TEXTS.flatmap(cuts))
@settings(max_examples=30, deadline=None)
def test_identical_tokenizers_have_one_token_per_chunk(side):
    for mode in ("strict", "repair"):
        got = align(side, side, mode=mode)
        expected = [(1, 1, bool(roles != UNK)) for roles in side.symbols.tolist()]
        assert chunks(got) == expected


@given(st.lists(st.one_of(pairs(), edited_pairs()), max_size=5), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_batch_is_the_alignments_one_by_one(sides, num_threads):
    students, teachers = ([pair[side] for pair in sides] for side in (0, 1))

    def packed(parts):
        """All in one table, and the ids of each in it."""
        table = Pieces(
            [
                roles or piece
                for part in parts
                for piece, roles in zip(part.pieces, part.symbols.tolist(), strict=True)
            ]
        )
        ids, start = [], 0
        for part in parts:
            ids.append([start + token_id for token_id in part.ids])
            start += len(part.ids)
        return table, ids

    (student, student_ids), (teacher, teacher_ids) = packed(students), packed(teachers)
    batch = opk.align_batch(
        student_ids, teacher_ids, student, teacher, mode="repair", num_threads=num_threads
    )
    assert len(batch) == len(sides)
    for index, (mine, other) in enumerate(sides):
        assert_equal(batch[index], align(mine, other, mode="repair"))
    expected = opk.reference.align_batch(student_ids, teacher_ids, student, teacher, mode="repair")
    assert_equal([getattr(batch, name) for name in expected._fields], expected)


# -- examples ------------------------------------------------------------------------------------


def test_chunks_end_where_tokens_of_both_sides_end():
    student = Pieces([BOS, b"the", b" cat", b" sat", EOT, EOS])
    teacher = Pieces([b"th", b"e cat", b" s", b"at", EOS | PAD])
    got = align(student, teacher)
    expected = [(1, 0, False), (2, 2, True), (1, 2, True), (1, 0, False), (1, 1, True)]
    assert chunks(got) == expected
    assert got.num_bytes.tolist() == [0, 7, 4, 0, 0]


def test_a_special_token_inside_a_token_leaves_its_chunk_unaligned():
    assert chunks(align(Pieces([b"a", EOT, b"b", b"c"]), Pieces([b"ab", b"c"]))) == [
        (3, 1, False),
        (1, 1, True),
    ]


def test_roles_of_no_clear_order_stay_in_one_chunk():
    assert chunks(align(Pieces([b"a", EOT]), Pieces([b"a", BOS]))) == [(1, 1, True), (1, 1, False)]
    assert chunks(align(Pieces([EOT, EOS, b"a"]), Pieces([EOS, BOS, b"a"]))) == [
        (1, 0, False),
        (1, 1, True),
        (0, 1, False),
        (1, 1, True),
    ]


def test_repair_of_a_composed_and_a_decomposed_accent():
    student = Pieces([b"caf", "é".encode(), b" au", b" lait"])
    teacher = Pieces([b"ca", b"f", b"e", "\u0301".encode(), b" au lait"])
    got = align(student, teacher, mode="repair")
    assert chunks(got) == [(1, 2, True), (1, 2, False), (2, 1, True)]
    with pytest.raises(
        ValueError, match=r"differ at byte 3: the student has b'caf' \+ b'\\xc3\\xa"
    ):
        align(student, teacher)


def test_no_guess_among_equally_cheap_repairs():
    """Which of three a's was inserted cannot be known."""
    student, teacher = Pieces([b"b", b"a", b"a", b"c"]), Pieces([b"b", b"a", b"a", b"a", b"c"])
    assert chunks(align(student, teacher, mode="repair")) == [
        (1, 1, True),
        (2, 3, False),
        (1, 1, True),
    ]


def test_more_edits_than_allowed_leave_the_stretch_unaligned():
    student = Pieces([b"x", b"ab", b"m", b"cd", b"y"])
    teacher = Pieces([b"x", b"ef", b"m", b"gh", b"y"])
    free = align(student, teacher, mode="repair", max_edits=4)
    assert chunks(free) == [(1, 1, is_aligned) for is_aligned in (True, False, True, False, True)]
    tight = align(student, teacher, mode="repair", max_edits=1)
    assert chunks(tight) == [(1, 1, True), (3, 3, False), (1, 1, True)]


@pytest.mark.parametrize("garbage", [0, 3000])
def test_differences_apart_from_each_other_never_exhaust_max_edits(garbage):
    """Of a sequence with more edits than max_edits only what is beside them is lost; also before
    and behind a stretch that has nothing in common."""
    generator = random.Random(1)
    text = generator.randbytes(4000)
    other = bytearray(text)
    for place in range(9, len(text), 18):
        other[place] ^= 255
    middle = [generator.randbytes(garbage) for _ in range(2)]
    sides = [
        Pieces([bytes([byte]) for byte in part[:2000] + between + part[2000:]])
        for part, between in zip((text, other), middle, strict=True)
    ]
    got = align(*sides, mode="repair", max_edits=64)
    assert_tiles(got, *sides)
    assert_swapped(*sides, got, mode="repair", max_edits=64)
    changed = len(range(9, len(text), 18))
    assert int(got.is_aligned.sum()) >= len(text) - changed - (80 if garbage else 0)


@pytest.mark.parametrize("text", [b"a" * (1 << 20), NUL_TO_FF * 4096], ids=["one", "all"])
def test_a_megabyte(text):
    generator = random.Random(0)

    def cut(data):
        pieces, begin = [], 0
        while begin < len(data):
            end = begin + generator.randrange(1, 12)
            pieces.append(data[begin:end])
            begin = end
        return Pieces(pieces)

    student, teacher = cut(text), cut(text)
    got = align(student, teacher)
    assert got.is_aligned.all() and int(got.num_bytes.sum()) == len(text)
    both = set(student.offsets.tolist()) & set(teacher.offsets.tolist())
    assert len(got.is_aligned) == len(both) - 1
    changed = bytearray(text)
    for place in range(1000, len(text), 100_000):
        changed[place] ^= 1
    repaired = align(student, cut(bytes(changed)), mode="repair")
    # about 11 of the student's 175,000 tokens are beside a change; a chunk has few tokens
    lost = repaired.num_bytes[~repaired.is_aligned].sum()
    assert 11 <= int(lost) < 2000


def test_takes_lists_tensors_arrays_and_any_table():
    pieces = [b"ab", b"c", b"", b"abc"]
    expected = opk.align_tokens([0, 1], [3], pieces, pieces)
    assert chunks(expected) == [(2, 1, True)]
    table = dict(enumerate(pieces))
    for ids, other in (
        (torch.tensor([0, 1]), torch.tensor([3], dtype=torch.int32)),
        (torch.tensor([0, 9, 1, 9])[::2], (3,)),
        (array.array("i", [0, 1]), array.array("q", [3])),
    ):
        assert_equal(opk.align_tokens(ids, other, pieces, table), expected)
    batch = opk.align_batch([], [], pieces, pieces)
    assert len(batch) == 0 and batch.student_offsets.tolist() == [0]
    assert chunks(opk.align_tokens([], [2, 2], pieces, pieces)) == [(0, 1, False)] * 2


def test_the_batch_is_a_sequence_of_alignments():
    pieces = [b"a", b"b", b"ab"]
    batch = opk.align_batch([[2], [], [0, 1]], [[0, 1], [], [0, 1]], pieces, pieces)
    assert batch.student_offsets.tolist() == [0, 1, 2, 3]
    assert batch.chunk_ends.tolist() == [1, 1, 3]
    assert batch[-1].student_offsets.tolist() == [0, 1, 2]
    assert batch[1].student_offsets.tolist() == [0]
    with pytest.raises(IndexError, match="index must be in"):
        batch[3]
    assert [len(alignment.is_aligned) for alignment in batch] == [1, 0, 2]


def test_a_batch_takes_the_rows_of_a_tensor_and_what_is_iterated_once():
    pieces = [b"a", b"b", b"ab"]
    rows = torch.tensor([[0, 1], [0, 0]])
    expected = opk.align_batch(rows.tolist(), rows.tolist(), pieces, pieces)
    for ids in (lambda: rows, lambda: (row for row in rows.tolist())):
        batch = opk.align_batch(ids(), ids(), pieces, dict(enumerate(pieces)))
        assert torch.equal(batch.student_offsets, expected.student_offsets)
    for ids in (rows[0], 7, None):
        with pytest.raises(TypeError, match="must hold one sequence of ids per pair, got"):
            opk.align_batch(ids, ids, pieces, pieces)
    with pytest.raises(TypeError, match="index must be an int, got slice"):
        batch[0:1]


def test_ids_of_a_dict_may_be_of_any_size():
    ids = [5, 1 << 40, 1 << 70, 5]
    table = {5: b"a", 1 << 40: b"b", 1 << 70: b"cd"}
    assert chunks(opk.align_tokens(ids, [0], table, [b"abcda"])) == [(4, 1, True)]
    batch = opk.align_batch([ids[:2]], [torch.tensor(ids[:2])], table, table)
    assert chunks(batch[0]) == [(1, 1, True)] * 2


def test_results_outlive_what_they_were_made_of_and_can_be_written():
    got = opk.align_tokens([0], [0], [b"a"], [b"a"])
    view = got.student_offsets
    del got
    view += 1
    assert view.tolist() == [1, 2]


def test_other_threads_run_while_a_batch_is_aligned():
    """The interpreter's lock is released: another thread is seen in the middle of the call."""
    pieces = Pieces([b"a" * 8])
    ids = [torch.zeros(250_000, dtype=torch.int64)] * 8
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(time.perf_counter())
            time.sleep(1e-4)

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    opk.align_batch(ids, ids, pieces, pieces, num_threads=1)
    end = time.perf_counter()
    done.set()
    thread.join()
    quarter = (end - begin) / 4
    assert any(begin + quarter < moment < end - quarter for moment in seen)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "options", "error", "match"),
    [
        ([0, 5], {}, ValueError, r"ids must be in \[0, 2\), the student's.* 5 at position 1"),
        ([-1], {}, ValueError, r"got -1 at position 0"),
        ([1 << 70], {}, TypeError, "student_ids must be integers"),
        (["a"], {}, TypeError, "must be integers, got 'a' at position 0"),
        (torch.zeros(2, dtype=torch.uint8), {}, TypeError, "int32 or int64, got uint8"),
        (torch.zeros(2), {}, TypeError, "vector of integers"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, TypeError, "2 dimension"),
        (7, {}, TypeError, "a tensor, an array or a list of integers, got int"),
        ([0], {"mode": "fix"}, ValueError, "mode must be one of strict, repair, got 'fix'"),
        ([0], {"max_edits": 0}, ValueError, r"max_edits must be in \[1, 4096\], got 0"),
    ],
)
def test_refuses_in_words(ids, options, error, match):
    table = Pieces([b"a", b"b"])
    with pytest.raises(error, match=match):
        opk.align_tokens(ids, [0], table, table, **options)


@pytest.mark.parametrize("ids", ["abc", None, [0.5], torch.zeros(1)])
def test_refuses_ids_of_a_plain_table_in_words(ids):
    with pytest.raises(TypeError, match="align_tokens: student_ids must be a tensor, an array or"):
        opk.align_tokens(ids, [0], [b"a"], [b"a"])


def test_a_list_may_change_while_its_items_say_what_they_are():
    class Emptying:
        def __index__(self):
            ids.clear()
            return 0

    ids = [Emptying(), *[1] * 100_000]
    table = Pieces([b"a", b""])
    assert len(opk.align_tokens(ids, [0], table, table).is_aligned) == 100_001
    assert ids == []


def test_refuses_batches_and_tables_in_words():
    table = Pieces([b"a", b"b"])
    parts = table.data, table.offsets, table.symbols
    with pytest.raises(ValueError, match="align_tokens: num_threads must be >= 1, got 0"):
        _align.align([[0]], [[0]], parts, parts, False, 1, 0)
    with pytest.raises(ValueError, match="nearest_tokens: num_threads must be >= 1, got -1"):
        _align.nearest(parts, parts, -1)
    with pytest.raises(TypeError, match=r"nearest_tokens: queries_bytes.data must be a tensor"):
        _align.nearest((0, table.offsets, None), parts, 1)
    with pytest.raises(ValueError, match="as many sequences, got 1 of the student and 2"):
        opk.align_batch([[0]], [[0], [0]], table, table)
    with pytest.raises(ValueError, match="num_threads must be >= 1, got 0"):
        opk.align_batch([[0]], [[0]], table, table, num_threads=0)
    with pytest.raises(opk.AlignmentError, match="sequence 1 differ at byte 0"):
        opk.align_batch([[0], [0], [1]], [[0], [1], [0]], table, table)
    with pytest.raises(ValueError, match="teacher_bytes must have the bytes of every id, has none"):
        opk.align_tokens([0], [7], table, {0: b"a"})
    with pytest.raises(TypeError, match=r"teacher_bytes\[0\] must be bytes, got str"):
        opk.align_tokens([0], [0], table, ["a"])
    wrong = SimpleNamespace(data=table.data, offsets=table.offsets.int(), symbols=None)
    with pytest.raises(TypeError, match=r"student_bytes.offsets must be contiguous and of int64"):
        opk.align_tokens([0], [0], wrong, table)
    broken = SimpleNamespace(data=table.data, offsets=torch.tensor([0, 9, 2]), symbols=None)
    with pytest.raises(ValueError, match="must rise from 0 to 2, got 0 and 9 for id 0"):
        opk.align_tokens([0], [0], broken, table)


@pytest.mark.cuda
def test_refuses_ids_on_a_gpu():
    table = Pieces([b"a"])
    with pytest.raises(ValueError, match="must be on the CPU"):
        opk.align_tokens(torch.zeros(1, dtype=torch.int64, device="cuda"), [0], table, table)
