# SPDX-License-Identifier: Apache-2.0
"""Every pair of real tokenizers on the same lines: chunks of the same bytes, the finest."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from tests import texts
from tests.tokenizer_zoo import EXACT, zoo


def check_all_pairs(lines: tuple[str, ...]) -> None:
    data = [line.encode() for line in lines]
    tables = {name: opk.TokenBytes(zoo(name)) for name in EXACT}
    ids = {
        name: [torch.tensor(ids) for ids in table.encode_batch(data)]
        for name, table in tables.items()
    }
    ends = {name: byte_ends(tables[name], ids[name]) for name in EXACT}
    # lines end on both sides, wherever tokens do
    line_ends = torch.tensor([len(line) for line in data]).cumsum(0)
    for student, teacher in combinations_with_replacement(EXACT, 2):
        found = opk.align_batch(ids[student], ids[teacher], tables[student], tables[teacher])
        student_ends = ends[student][found.student_offsets]
        teacher_ends = ends[teacher][found.teacher_offsets]
        assert found.is_aligned.all(), (student, teacher)
        assert torch.equal(student_ends, teacher_ends), (student, teacher)
        assert torch.equal(student_ends.diff(), found.num_bytes), (student, teacher)
        assert torch.equal(student_ends[found.chunk_ends], line_ends), (student, teacher)
        common = torch.isin(ends[student], ends[teacher]).sum()
        assert len(student_ends) == common, (student, teacher)
        if student == teacher:
            assert len(found.is_aligned) == sum(map(len, ids[student]))


def byte_ends(table: opk.TokenBytes, batch: list[Tensor]) -> Tensor:
    """[T + 1] bytes before each token of all lines, and after the last."""
    lengths = table.offsets.diff()[torch.cat(batch)]
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def test_no_byte_is_misaligned_in_some_lines():
    assert len(EXACT) >= 8
    check_all_pairs(texts.lines(300))


@pytest.mark.slow
def test_no_byte_is_misaligned_in_ten_thousand_lines():
    lines = texts.lines(10_000)
    assert len(set(lines)) == 10_000
    check_all_pairs(lines)
