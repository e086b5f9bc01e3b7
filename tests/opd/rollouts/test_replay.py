# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from opd.batch import Prompt
from opd.rollouts import ReplayConfig

PROMPTS = [
    Prompt(
        ids=torch.tensor([4, 5]),
        completion_ids=torch.tensor([6, 3]),
        completion_mask=torch.tensor([True, True]),
    )
] * 2


def _engine(student, tokenizer, max_steps=100, **settings):
    config = ReplayConfig(**{"capacity": 6, "max_completion_length": 3, **settings})
    return config.build(student, None, tokenizer, seed=0, max_steps=max_steps)


def test_at_phi_zero_everything_is_data(student, tokenizer):
    engine = _engine(student, tokenizer)
    assert {t.origin for step in range(9) for t in engine.collect(PROMPTS, step)} == {"data"}


def test_at_phi_one_completions_are_fresh_until_the_buffer_is_full(student, tokenizer):
    engine = _engine(student, tokenizer, init_threshold=1.0, max_steps=1)
    for step in range(3):
        assert {(t.origin, t.step) for t in engine.collect(PROMPTS, step)} == {("student", step)}
    assert engine.metrics()["replay/num_buffered"] == 6
    # step >= max_steps leaves no chance of a fresh one
    for step in range(3, 9):
        assert {t.step for t in engine.collect(PROMPTS, step)} <= {0, 1, 2}


def test_the_oldest_leave_the_buffer(student, tokenizer):
    engine = _engine(student, tokenizer, init_threshold=1.0, max_steps=10**6)
    for step in range(5):
        engine.collect(PROMPTS, step)
    assert [t["step"] for t in engine.state_dict()["buffer"]] == [2, 2, 3, 3, 4, 4]


def test_phi_rises_when_the_held_out_loss_does(student, tokenizer):
    engine = _engine(student, tokenizer, loss_eps=0.1)
    for loss, phi in ((2.0, 0.0), (1.0, 0.0), (2.05, 0.0), (2.1, 0.1), (2.15, 0.1), (2.3, 0.2)):
        engine.observe(loss)
        assert abs(engine.metrics()["replay/phi"] - phi) < 1e-9


def test_phi_stops_at_one(student, tokenizer):
    engine = _engine(student, tokenizer, init_threshold=0.95, loss_eps=0.0)
    for loss in (1.0, 2.0, 3.0):
        engine.observe(loss)
    assert engine.metrics()["replay/phi"] == 1.0


def test_state_goes_through_a_file_and_continues_the_same(student, tokenizer, tmp_path):
    settings = {"init_threshold": 1.0, "max_steps": 1}
    first = _engine(student, tokenizer, **settings)
    for step in range(3):
        first.collect(PROMPTS, step)
    first.observe(1.5)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = _engine(student, tokenizer, **settings)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.state_dict()["reference_nll"] == 1.5
    for step in range(3, 8):
        pairs = zip(first.collect(PROMPTS, step), second.collect(PROMPTS, step), strict=True)
        assert all(torch.equal(a.ids, b.ids) and a.step == b.step for a, b in pairs)
