# SPDX-License-Identifier: Apache-2.0
"""The demo through every transport: its arms, what it compares, and what it counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from opd.clients import connect
from opd.config import TrainConfig
from opd.server.engine import Engine
from opd.teachers import LocalTeacher
from tests.opd.conftest import make_hf_model
from tests.opd.server.live import running

FOLDER = Path(__file__).parents[2] / "examples" / "first_light"
sys.path.insert(0, str(FOLDER))

import transports  # noqa: E402

BY_NAME = {arm.name: arm for arm in transports.ARMS}


@pytest.mark.parametrize("arm", transports.ARMS, ids=lambda arm: arm.name)
def test_an_arm_differs_from_the_one_in_memory_in_the_teacher_only(tmp_path, arm):
    config = transports.config_of(tmp_path, arm, 3)
    assert isinstance(config, TrainConfig) and config.seed == 3
    if arm.like is None:
        assert config.teacher.kind == "local"
        return
    assert config.teacher.kind == {"server": "server", "store": "cached"}[arm.teacher]
    other = transports.config_of(tmp_path, BY_NAME[arm.like], 3)
    apart = {"output_dir", "teacher"} | ({"objective"} if arm.name == "store_draws" else set())
    assert config.model_dump(exclude=apart) == other.model_dump(exclude=apart)


def test_losses_are_compared_with_the_mean_of_those_in_memory():
    theirs = [2.0, 1.0] * 6
    # chance parts what is sampled later on
    ours = [2.03, *theirs[1:-1], 2.5]
    assert transports.apart(ours, theirs) == pytest.approx(0.02)


def test_the_table_has_a_row_for_each_arm_that_ran():
    gauges = {"accuracy": {"16": 0.5}}
    gauges |= {"student_states/reverse_kl": 0.1, "teacher_states/forward_kl": 0.2}
    result = {"losses": [1.0] * 12, "gauges": gauges, "bytes_per_law": 0.0, "seconds": 9.0}
    served = {**result, "losses": [1.25] + [1.0] * 11, "bytes_per_law": 256.2}
    lines = transports.table({"memory": result, "hidden": served}).splitlines()
    assert lines[1].split()[-7:] == ["-", "1.0000", "50.0%", "0.1000", "0.2000", "-", "9"]
    assert lines[2].split()[-7:] == ["2.5e-01", "1.0208", "50.0%", "0.1000", "0.2000", "256", "9"]
    assert "store" not in "".join(lines[1:3])


def test_bytes_and_laws_are_the_servers_own_count():
    engine = Engine(LocalTeacher(make_hf_model(), name="teacher"), name="tiny")
    with running(engine) as url:
        before = transports.sent(url)
        ids = torch.tensor([5, 9, 11, 2, 30])
        connect("opd", url).score([ids], [2], num_topk=4)
        num_bytes, num_laws = (b - a for a, b in zip(before, transports.sent(url), strict=True))
    assert num_laws == 3
    assert 3 * 8 * 4 < num_bytes < 5000
