# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.objectives import Uld
from opd.objectives.crossing import pairs_of
from tests.opd.objectives.two_tokenizers import Case, check_hostile


def sorted_distance(q, p):
    """sum_i |P_(i) - Q_(i)|, as the paper writes it."""
    q, p = (x.sort(descending=True).values for x in (q, p))
    width = max(len(q), len(p))
    q, p = (torch.nn.functional.pad(x, (0, width - len(x))) for x in (q, p))
    return (p - q).abs().sum()


def _textbook(case, pairs, temperatures=(1.0, 1.0)):
    laws = [(rows / t).softmax(-1) for rows, t in zip(case.rows(), temperatures, strict=True)]
    return sum(sorted_distance(laws[0][s], laws[1][t]) for s, t in pairs)


def _firsts(case):
    return [(student[0], teacher[0]) for _, student, teacher in case.spans()]


@pytest.mark.parametrize("bent", [False, True], ids=["plain", "bent"])
def test_uld_is_the_textbook_sum_over_chunks(bent):
    case = Case(bent=bent)
    objective = Uld(temperature=1.3, teacher_temperature=0.8)
    case.check(objective, _textbook(case, _firsts(case), (1.3, 0.8)) / case.steps)


def test_positions_are_the_papers_and_are_cut_to_the_shorter():
    case = Case(("one", "differ", "merged", "only_teacher"))
    pairs = [(i, i) for i in range(min(map(len, case.ids)))]
    case.check(Uld(pairing="positions"), _textbook(case, pairs) / 8, num_step_tokens=8)


def test_positions_restart_with_each_text():
    case = Case()
    lengths = [[3, 0, 4, 2], [2, 1, 6, 0]]
    sides = [
        replace(case.batch, segment_ends=torch.tensor(side).cumsum(0), token_ids=torch.ones(9))
        for side in lengths
    ]
    batch = replace(sides[0], translation=replace(case.translation, batch=sides[1]))
    pairs = pairs_of(batch, "positions", 11)
    assert pairs.student.tolist() == [0, 1, 3, 4, 5, 6]
    assert pairs.teacher.tolist() == [0, 1, 3, 4, 5, 6]
    assert pairs.text.tolist() == [0, 0, 2, 2, 2, 2]
    assert pairs.count == 11
    own = pairs_of(replace(batch, translation=None), "positions", 11)
    assert own.student.tolist() == own.teacher.tolist() == list(range(9))
    assert own.text.tolist() == [0] * 3 + [2] * 4 + [3] * 2


@pytest.mark.parametrize("pairing", ["chunks", "positions"])
def test_one_tokenizer_is_the_mean_over_tokens(pairing):
    case = Case(num_tokens=7)
    case.batch = replace(case.batch, translation=None)
    expected = _textbook(case, [(i, i) for i in range(7)]) / 8
    case.check(Uld(pairing=pairing), expected, rtol=1e-9, num_step_tokens=8)


def test_cross_entropy_is_added():
    case = Case()
    law = case.rows()[0].log_softmax(-1)
    nll = -law.gather(1, case.ids[0][:, None]).sum() / 8
    case.check(
        Uld(cross_entropy_weight=0.25), _textbook(case, _firsts(case)) / case.steps + nll / 4
    )
    signal, _ = case.run(Uld(cross_entropy_weight=0.25))
    assert signal.statistics["entropy"].shape == case.ids[0].shape


def test_statistics_are_distances_of_laws():
    case = Case()
    signal, _ = case.run(Uld())
    values = signal.statistics["sorted_l1"]
    assert values.shape == (len(case.aligned),) and not values.requires_grad
    assert bool(((values > 0) & (values < 2)).all())
    torch.testing.assert_close(values.sum() / case.steps, signal.loss.detach())


@pytest.mark.parametrize("pairing", ["chunks", "positions"])
def test_hostile_texts(pairing):
    if pairing == "chunks":
        check_hostile(Uld())
        return
    for chunks in (("only_teacher",), ("only_student",), ()):
        signal, gradients = Case(chunks, dtype=torch.float32).run(Uld(pairing=pairing))
        assert signal.loss.item() == 0.0
        assert all(bool((gradient == 0).all()) for gradient in gradients if gradient is not None)
