# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from opd.batch import Prompt
from opd.rollouts.writer import Writer
from opd.rollouts.writing import STUDENT, TEACHER, Desk, Writing


def _writing(ids=(4, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Writing(
        prompt=Prompt(ids=torch.tensor(ids), row={"answer": "x"}, group_id=7), random=generator
    )


def test_a_trajectory_is_zero_on_the_prompt_and_tells_of_every_token():
    writing = _writing()
    writing.add(9, STUDENT, -0.5, -1.5)
    writing.add(3, TEACHER, -2.5, -0.25)
    writing.is_terminated = True
    trajectory = writing.trajectory(4, torch.tensor([-0.5, -0.25]))
    assert trajectory.ids.tolist() == [4, 5, 9, 3]
    assert trajectory.loss_mask.tolist() == [False, False, True, True]
    assert trajectory.token_origin.tolist() == [0, 0, 1, 2]
    assert trajectory.student_logprobs.tolist() == [0, 0, -0.5, -2.5]
    assert trajectory.teacher_logprobs.tolist() == [0, 0, -1.5, -0.25]
    assert trajectory.behaviour_logprobs.tolist() == [0, 0, -0.5, -0.25]
    assert (trajectory.origin, trajectory.step, trajectory.group_id) == ("mixed", 4, 7)
    assert (trajectory.is_terminated, trajectory.row) == (True, {"answer": "x"})


def test_greedy_writings_have_no_logprobs():
    writing = _writing()
    writing.add(9, STUDENT, math.nan, math.nan)
    trajectory = writing.trajectory(0, None, ())
    assert trajectory.behaviour_logprobs is None
    assert trajectory.student_logprobs is None
    assert trajectory.teacher_logprobs is None
    assert trajectory.token_origin.tolist() == [0, 0, 1]


def test_rows_draw_from_their_own_generators(student):
    together = Desk([_writing(seed=1), _writing(seed=2)], limit=4, student=Writer(model=student))
    alone = Desk([_writing(seed=2)], limit=4, student=Writer(model=student))
    for _ in range(2):
        numbers = together.uniforms(3)
        assert torch.equal(numbers[1:], alone.uniforms(3))
        assert not torch.equal(numbers[0], numbers[1])
    assert numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()


@torch.no_grad()
def test_rows_that_end_leave_the_desk_with_what_was_read(student):
    writings = [_writing((4, 5, 6)), _writing((7,)), _writing((8, 9))]
    desk = Desk(writings, limit=4, num_spare=2, student=Writer(model=student))
    assert desk.tokens.shape == (3, 9)
    desk.read("student")
    desk.put(torch.tensor([10, -1, 12]))
    desk.put(torch.tensor([20, 21, 22]), torch.tensor([1, 1, 2]))
    assert desk.tokens[:, :5].tolist() == [[4, 5, 6, 10, 20], [7, 0, 21, 0, 0], [8, 9, 12, 0, 22]]
    desk.go_on([2, 1, 1], [True, False, True])
    assert desk.writings == [writings[0], writings[2]]
    assert desk.ends.tolist() == [5, 3]
    assert writings[1].tokens_read == {"student": 1, "teacher": 0}
    desk.read("student")
    desk.go_on([1, 1], [False, False])
    assert desk.writings == []
    # the first row had two tokens more to read, and the last row read two to keep in step
    assert [writing.tokens_read["student"] for writing in writings] == [5, 1, 4]


@pytest.mark.parametrize("count", [0, 3])
def test_a_writing_is_as_long_as_its_sequence(count):
    writing = _writing()
    for token in range(count):
        writing.add(token, STUDENT, 0.0, 0.0)
    assert len(writing) == len(writing.sequence()) == 2 + count
    assert writing.sequence().dtype == torch.int64
