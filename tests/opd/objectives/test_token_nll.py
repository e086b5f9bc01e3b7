# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opd.batch import collate_step
from opd.objectives import TokenNll


def test_matches_cross_entropy_on_whole_logits(student, batch):
    loss = TokenNll()(student.law(batch), None, batch, batch.num_tokens).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    student.model.zero_grad()
    logits = student.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    ).logits.flatten(0, 1)[batch.token_idx]
    dense = F.cross_entropy(logits, batch.token_ids)
    dense.backward()
    expected = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    assert loss.item() == pytest.approx(dense.item(), rel=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_is_a_mean_over_the_step_not_over_batches(student, trajectories):
    losses = []
    for batch_size in (1, 2, 5):
        batches, num_tokens = collate_step(trajectories, batch_size=batch_size, pad_id=0)
        losses.append(
            sum(TokenNll()(student.law(b), None, b, num_tokens).loss.item() for b in batches)
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
