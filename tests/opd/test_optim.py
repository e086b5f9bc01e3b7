# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from opd.optim import OptimConfig, apply_gradients, build_optimizer, learning_rate


def _config(**values):
    return OptimConfig(max_steps=10, learning_rate=1.0, **values)


def test_constant():
    assert [learning_rate(step, _config()) for step in (0, 9)] == [1.0, 1.0]


def test_warmup_is_linear_and_reaches_the_full_rate():
    config = _config(lr_scheduler_type="constant_with_warmup", warmup_steps=4)
    assert [learning_rate(step, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_decay_starts_full_is_half_in_the_middle_and_ends_above_zero(kind, middle):
    config = _config(lr_scheduler_type=kind)
    assert learning_rate(0, config) == pytest.approx(1.0)
    assert learning_rate(5, config) == pytest.approx(middle)
    assert 0 < learning_rate(9, config) < 0.11


def test_only_matrices_are_decayed():
    model = nn.Linear(3, 2)
    groups = build_optimizer(model, _config(weight_decay=0.1)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (1, 0.0)]


def test_gradients_are_clipped_to_the_norm_and_cleared():
    model = nn.Linear(1, 1, bias=False)
    config = _config(max_grad_norm=0.5)
    model.weight.grad = torch.full((1, 1), 4.0)
    assert apply_gradients(build_optimizer(model, config), 0, config) == 4.0
    assert model.weight.grad is None


def test_a_gradient_that_is_not_finite_is_an_error_and_moves_nothing():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((1, 1), float("nan"))
    with pytest.raises(FloatingPointError, match="step 3: the gradient's norm is nan"):
        apply_gradients(build_optimizer(model, _config()), 2, _config())
    assert torch.equal(model.weight, before)
