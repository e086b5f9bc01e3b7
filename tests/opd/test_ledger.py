# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import torch

from opd.batch import collate
from opd.ledger import Ledger


def _record(trajectories, **settings):
    ledger = Ledger()
    batch = collate(trajectories, pad_id=0)
    values = {"student_size": 10, "teacher_size": 100, "teacher_judges": True, "step": 0}
    ledger.record(trajectories, [batch], **{**values, **settings})
    return ledger


def test_on_policy_by_hand(trajectories):
    ledger = _record(trajectories)
    lengths = [len(t.ids) for t in trajectories]
    assert ledger.student_tokens_sampled == 19
    assert ledger.student_tokens_forward == ledger.teacher_tokens_forward == sum(lengths)
    # two trajectories have a masked token
    assert ledger.student_tokens_trained == 16
    assert ledger.flops == sum(lengths) * (2 * 10 + 6 * 10 + 2 * 100)
    assert ledger.cost_units == ledger.flops / 20


def test_data_costs_no_sampling(trajectories):
    ledger = _record([replace(t, origin="data") for t in trajectories])
    assert ledger.student_tokens_sampled == 0


def test_replayed_completions_cost_no_sampling(trajectories):
    assert _record(trajectories, step=3).student_tokens_sampled == 0


def test_what_the_teacher_writes_is_the_teachers(trajectories):
    ledger = _record([replace(t, origin="teacher") for t in trajectories], teacher_judges=False)
    assert (ledger.student_tokens_sampled, ledger.teacher_tokens_sampled) == (0, 19)
    assert ledger.teacher_tokens_forward == 0
    total = sum(len(t.ids) for t in trajectories)
    assert ledger.flops == total * (2 * 100 + 6 * 10)


def test_what_both_wrote_costs_what_each_read(trajectories):
    mixed = [
        replace(
            t,
            origin="mixed",
            token_origin=1 + (torch.arange(len(t.ids)) % 2).to(torch.uint8),
            tokens_read={"student": 20, "teacher": 30},
        )
        for t in trajectories
    ]
    ledger = _record(mixed, teacher_judges=False)
    by_teacher = sum(int((t.token_origin[t.prompt_length :] == 2).sum()) for t in mixed)
    assert ledger.teacher_tokens_sampled == by_teacher > 0
    assert ledger.student_tokens_sampled == 19 - by_teacher
    total = sum(len(t.ids) for t in trajectories)
    assert ledger.flops == 5 * (20 * 2 * 10 + 30 * 2 * 100) + total * 6 * 10


def test_state_round_trip(trajectories):
    ledger = _record(trajectories)
    ledger.add_seconds({"rollout": 1.5})
    ledger.add_seconds({"rollout": 0.5, "optim": 1.0})
    assert Ledger(**ledger.state_dict()) == ledger
    assert ledger.seconds == {"rollout": 2.0, "optim": 1.0}
    assert "ledger/seconds" not in ledger.metrics()


def test_what_an_objective_trains_works_on_the_trained_tokens(trajectories):
    plain, trained = (_record(trajectories, objective_size=size) for size in (0, 7))
    assert trained.flops == plain.flops + 6 * 7 * plain.student_tokens_trained
