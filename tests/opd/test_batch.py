# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from opd.batch import WRITERS, Head, Law, collate, collate_step


def test_collate_lists_exactly_the_trained_tokens(trajectories, batch):
    expected = torch.cat([t.ids[t.loss_mask] for t in trajectories])
    assert torch.equal(batch.token_ids, expected)
    assert batch.num_tokens == sum(int(t.loss_mask.sum()) for t in trajectories)
    assert batch.num_input_tokens == sum(len(t.ids) for t in trajectories)


def test_each_row_of_a_law_stands_one_before_its_token(batch):
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.token_idx + 1], batch.token_ids)


def test_behaviour_logprobs_follow_their_tokens(trajectories, batch):
    expected = torch.cat([t.behaviour_logprobs[t.loss_mask] for t in trajectories])
    assert torch.equal(batch.behaviour_logprobs, expected)


def test_each_trained_token_keeps_its_writer(trajectories, batch):
    assert batch.token_origin is None
    writers = torch.arange(len(trajectories[0].ids)).remainder(3).to(torch.uint8)
    first = _with(trajectories[0], origin="mixed", token_origin=writers)
    rest = [_with(t, origin="teacher") for t in trajectories[1:]]
    expected = [writers[first.loss_mask], *(torch.full((int(t.loss_mask.sum()),), 2) for t in rest)]
    found = collate([first, *rest], pad_id=0).token_origin
    assert found.dtype == torch.uint8
    assert found.tolist() == torch.cat(expected).tolist()


def test_written_tokens_are_counted_by_writer(trajectories):
    trajectory = trajectories[0]
    assert trajectory.num_written("student") == trajectory.completion_length
    assert trajectory.num_written("teacher") == 0
    writers = torch.zeros(len(trajectory.ids), dtype=torch.uint8)
    writers[-2:] = torch.tensor([1, 2])
    mixed = _with(trajectory, origin="mixed", token_origin=writers)
    assert [mixed.num_written(writer) for writer in WRITERS] == [1, 1, 1]


def test_segments_end_with_their_trajectory(trajectories, batch):
    counts = torch.tensor([int(t.loss_mask.sum()) for t in trajectories])
    assert torch.equal(batch.segment_ends, counts.cumsum(0))


def test_position_ids_count_from_each_first_token(batch):
    lengths = batch.attention_mask.sum(1)
    for row, length in enumerate(lengths.tolist()):
        assert batch.position_ids[row, :length].tolist() == list(range(length))


def test_the_first_token_of_a_sequence_is_never_trained(trajectories):
    trajectory = trajectories[0]
    everything = torch.ones_like(trajectory.loss_mask)
    batch = collate([_with(trajectory, loss_mask=everything)], pad_id=0)
    assert batch.num_tokens == len(trajectory.ids) - 1


def test_a_step_counts_the_tokens_of_all_its_batches(trajectories, batch):
    batches, num_tokens = collate_step(trajectories, batch_size=2, pad_id=0)
    assert [len(b.input_ids) for b in batches] == [2, 2, 1]
    assert num_tokens == batch.num_tokens


def test_a_law_runs_its_model_once_and_only_when_asked():
    calls = []

    def forward():
        calls.append(1)
        return torch.zeros(2, 3)

    law = Law(forward, Head(torch.zeros(5, 3)))
    assert not calls
    law.hidden()
    law.token_logprobs(torch.tensor([0, 4]))
    assert len(calls) == 1


def _with(trajectory, **changes):
    from dataclasses import replace

    return replace(trajectory, **changes)
