# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from opd.batch import Prompt
from opd.rollouts import DatasetConfig, DatasetRollouts
from opd.schema import ConfigError

PROMPT = Prompt(
    ids=torch.tensor([4, 5]),
    completion_ids=torch.tensor([6, 7, 3]),
    completion_mask=torch.tensor([False, True, True]),
)


def test_the_rows_completion_with_its_mask():
    trajectory = DatasetRollouts(10).collect([PROMPT], 2)[0]
    assert trajectory.ids.tolist() == [4, 5, 6, 7, 3]
    assert trajectory.loss_mask.tolist() == [False, False, False, True, True]
    assert (trajectory.origin, trajectory.is_terminated) == ("data", True)
    assert trajectory.behaviour_logprobs is None


def test_a_long_completion_is_cut_and_says_so():
    trajectory = DatasetRollouts(2).collect([PROMPT], 0)[0]
    assert trajectory.ids.tolist() == [4, 5, 6, 7]
    assert not trajectory.is_terminated


def test_a_row_without_completion_is_one_sentence():
    with pytest.raises(ConfigError, match="row 8 has no completion"):
        DatasetRollouts(2).collect([Prompt(ids=torch.tensor([1]), group_id=7)], 0)


def test_with_seq_kd_the_teacher_writes(student, teacher, tokenizer):
    config = DatasetConfig(seq_kd=True, num_generations=2, max_completion_length=5)
    assert config.needs_teacher and not config.needs_completions
    trajectories = config.build(student, teacher, tokenizer).collect([PROMPT], 0)
    assert [t.origin for t in trajectories] == ["teacher", "teacher"]
