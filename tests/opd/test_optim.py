# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from opd.optim import (
    OptimConfig,
    apply_gradients,
    build_optimizer,
    learning_rate,
    num_weights,
)


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


def test_what_an_objective_trains_has_its_own_rate_on_the_same_schedule():
    model, module = nn.Linear(3, 2), nn.Linear(2, 2)
    config = _config(lr_scheduler_type="linear", weight_decay=0.1)
    optimizer = build_optimizer(model, config, module=module, module_learning_rate=0.25)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]
    for step, rate in ((0, 1.0), (5, 0.5)):
        apply_gradients(optimizer, step, config)
        assert [g["lr"] for g in optimizer.param_groups] == [rate, rate, rate / 4, rate / 4]
    same = build_optimizer(model, config, module=module)
    apply_gradients(same, 0, config)
    assert {g["lr"] for g in same.param_groups} == {1.0}


def test_one_norm_is_of_both():
    model, module = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    config = _config(max_grad_norm=0.5)
    model.weight.grad, module.weight.grad = torch.full((1, 1), 3.0), torch.full((1, 1), 4.0)
    optimizer = build_optimizer(model, config, module=module)
    assert apply_gradients(optimizer, 0, config) == 5.0
    assert num_weights(module) == 1 and num_weights(None) == 0
