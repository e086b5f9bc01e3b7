# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from opd.batch import Head
from opd.objectives.projectors import LogitMap, attend, linear, standardised


def _rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("sizes", [(30, 5, 8), (30, 8, 5), (6, 8, 9)])
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 20])
def test_the_logit_map_is_that_of_the_pseudo_inverse(sizes, workspace_bytes):
    num_rows, onto_size, size = sizes
    onto, head = _rand(40, onto_size), _rand(50, size, seed=1)
    onto_rows = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:num_rows]
    rows = torch.arange(num_rows) + 3
    found = LogitMap(Head(onto), onto_rows, workspace_bytes=workspace_bytes).of(Head(head), rows)
    expected = torch.linalg.pinv(onto[onto_rows]) @ head[rows]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_without_rows_the_leading_ones_stand_for_each_other_and_scales_count():
    onto, head = _rand(20, 4), _rand(26, 4, seed=1)
    map_ = LogitMap(Head(onto, logit_scale=2.0), None, workspace_bytes=1 << 20)
    found = map_.of(Head(head, logit_scale=0.5), None, torch.float32)
    torch.testing.assert_close(
        found, 0.25 * torch.linalg.pinv(onto) @ head[:20], rtol=1e-4, atol=1e-5
    )


def test_the_same_head_is_mapped_onto_itself_by_the_identity():
    head = Head(_rand(20, 4))
    found = LogitMap(head, None, workspace_bytes=1 << 20).of(head, None)
    torch.testing.assert_close(found, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_layer_starts_from_its_seed_and_takes_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (linear(3, 2, bias=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_attention_is_within_each_sequence_and_both_ways():
    ends, their_ends = torch.tensor([2, 2, 5, 6]), torch.tensor([3, 4, 4, 6])
    query, key = _rand(6, 4), _rand(6, 4, seed=1)
    taught, own = _rand(6, 3, seed=2), _rand(6, 2, seed=3)
    found = attend(query, key, taught, own, ends, their_ends)
    # the second sequence has no token of the student, the third none of the teacher
    for rows, their_rows in (([0, 1], [0, 1, 2]), ([5], [4, 5])):
        scores = query[rows] @ key[their_rows].T / 2.0
        torch.testing.assert_close(found.to_student[rows], scores.softmax(1) @ taught[their_rows])
        torch.testing.assert_close(found.to_teacher[their_rows], scores.T.softmax(1) @ own[rows])
    assert found.has_teacher.tolist() == [True, True, False, False, False, True]
    assert found.has_student.tolist() == [True, True, True, False, True, True]
    assert not found.to_student[2:5].any() and not found.to_teacher[3].any()


def test_deviations_are_of_each_sequence():
    values = _rand(5, 3) * 7
    found = standardised(values, torch.tensor([2, 2, 5]))
    torch.testing.assert_close(found[:2], values[:2] / values[:2].std())
    torch.testing.assert_close(found[2:], values[2:] / values[2:].std())


def test_values_that_do_not_deviate_stay_finite():
    constant = standardised(torch.ones(2, 3), torch.tensor([2]))
    assert constant.isfinite().all()
    assert standardised(torch.ones(1, 1), torch.tensor([1])).item() == 1.0
