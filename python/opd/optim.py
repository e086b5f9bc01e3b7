# SPDX-License-Identifier: Apache-2.0
"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from opd.schema import Section


class OptimConfig(Section):
    """Optimizer keys, at the top level of a configuration, named as in HF `TrainingArguments`.

    Attributes:
        warmup_steps: steps over which the learning rate rises linearly from 0.
        max_grad_norm: the gradient is scaled down to this norm; 0 leaves it as it is.
        weight_decay: decoupled, on matrices only.
    """

    max_steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise ValueError(
                "warmup_steps: must be 0 with lr_scheduler_type 'constant', got "
                f"{self.warmup_steps}, did you mean lr_scheduler_type 'constant_with_warmup'?"
            )
        return self


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    *,
    module: nn.Module | None = None,
    module_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over the parameters that train; norms and biases are not decayed.

    Args:
        model: the student.
        config: the hyperparameters of both.
        module: what an objective trains beside it.
        module_learning_rate: of that, in place of `learning_rate`, on the same schedule.
    """
    groups = _groups(model, config)
    if module is not None:
        factor = (module_learning_rate or config.learning_rate) / config.learning_rate
        groups += [{**group, "lr_factor": factor} for group in _groups(module, config)]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def _groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def num_weights(module: nn.Module | None) -> int:
    """Of a module; 0 of None."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def learning_rate(step: int, config: OptimConfig) -> float:
    """The learning rate of a step, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = (config.max_steps - step) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * left
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1.0 - math.cos(math.pi * left))
    return config.learning_rate


def apply_gradients(optimizer: torch.optim.Optimizer, step: int, config: OptimConfig) -> float:
    """Clip, update, clear. Returns the gradient's norm before clipping.

    Raises:
        FloatingPointError: the gradient is not finite; the weights are left as they were.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step + 1}: the gradient's norm is {float(norm)}; nothing was saved since the "
            "last checkpoint; a lower learning_rate or max_grad_norm may help"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config) * group.get("lr_factor", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)
