# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

import opd_kernels as opk
from opd.batch import Signal
from opd.check import check
from opd.config import parse_config
from opd.objectives import OBJECTIVES
from opd.objectives.alm import Alm
from opd.probe import renumbering
from tests.opd.crossing import checked, save_pair, table


@pytest.fixture
def values(tmp_path):
    return save_pair(tmp_path)


@pytest.mark.parametrize(
    "kind", sorted(k for k, s in OBJECTIVES.items() if s.crosses_tokenizers and k != "alm")
)
def test_the_student_has_nothing_to_learn_from_itself(values, kind):
    found = checked(values, objective={"kind": kind})
    assert found.wrong == []
    for row in table(found, "probe of zero").values():
        assert row["verdict"].startswith(("as it should be", "not probed"))


def test_a_temperature_of_the_teachers_own_is_not_wrong(values):
    config = parse_config({**values, "objective": {"kind": "uld", "teacher_temperature": 2.0}})
    assert check(config, num_rows=4).wrong == []


class _Shifted(Alm):
    """Reads the teacher's rows one late, as a path with an off-by-one would."""

    def __call__(self, student, teacher, batch, num_step_tokens) -> Signal:
        hidden = teacher.hidden().roll(1, 0)
        shifted = type(teacher)(lambda: hidden, teacher.head, vocab_size=teacher.vocab_size)
        return super().__call__(student, shifted, batch, num_step_tokens)


def test_a_path_that_shifts_rows_does_not_pass(values):
    config = parse_config(values)
    found = check(config.model_copy(update={"objective": _Shifted()}))
    assert any("with the student as its own teacher" in sentence for sentence in found.wrong)


def test_a_renumbering_keeps_the_order_of_equal_tokens():
    words = [b"a", b"b", b"a", b"", b"c", b"a"]
    numbers = renumbering(opk.TokenBytes.from_bytes(words, roles={"eos": 3}), 8)
    assert sorted(numbers.tolist()) == list(range(8))
    assert numbers[0] < numbers[2] < numbers[5]
    assert numbers[6:].tolist() == [6, 7]
