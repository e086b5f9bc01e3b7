# SPDX-License-Identifier: Apache-2.0
"""The caller's own sum of a head's gradients (Megatron's and FSDP2's main_grad), and its checks.

The fused divergences form gradients in forward, before the upstream gradient is known: the sum
gets dW then, times what the caller says the upstream gradient will be, and no dW of the op's own
exists. A node of autograd holds the caller to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _linear
from ._registration import register

_OP = "opd_kernels"


def checked(op: str, name: str, value: Tensor | None, weight: Tensor) -> Tensor | None:
    """A sum for the gradients of this head: of its shape, float32 (float64), where it is.

    Raises:
        TypeError, ValueError: it is not one.
    """
    if value is None:
        return None
    _checks.tensor(op, name, value, 2)
    real = _checks.real_dtype(weight)
    if value.shape != weight.shape:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(weight.shape)} like the head (this rank's part "
            f"of it), got {tuple(value.shape)}."
        )
    if value.dtype != real:
        raise TypeError(f"{op}: {name} must have dtype {real}, got {value.dtype}.")
    if value.device != weight.device:
        raise ValueError(f"{op}: {name} must be on {weight.device}, got {value.device}.")
    if value.requires_grad:
        raise ValueError(
            f"{op}: {name} must not require grad, got a tensor that does. It is a sum that the op "
            "adds to; detach() it."
        )
    if not value.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got strides {value.stride()}. A GEMM adds to it."
        )
    return value


def grad_scale(op: str, value: float, reduction: str, has_sum: bool) -> float:
    """A finite number; 1 where there is no sum to scale for.

    Raises:
        TypeError, ValueError: it is not, or a sum comes with reduction "none".
    """
    if has_sum and reduction != "sum":
        raise ValueError(
            f"{op}: student_lm_head_weight_grad must be None with reduction='none', got a tensor: "
            "the gradient is formed in backward there. Pass the weights as token_weights and "
            "reduction='sum'."
        )
    if value == 0:
        return 0.0
    value = _checks.logit_scale(op, "grad_scale", value)
    if value != 1.0 and not has_sum:
        raise ValueError(
            f"{op}: grad_scale must be 1 without student_lm_head_weight_grad, got {value}: "
            "gradients that autograd returns take the upstream gradient as it comes."
        )
    return value


def not_in_backward(op: str) -> None:
    """Activation checkpointing would add a gradient of a forward that it runs again.

    Raises:
        RuntimeError: the call is made inside a backward.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{op}: student_lm_head_weight_grad must be None inside a backward (activation "
            "checkpointing runs forwards again there, and the sum would get a gradient twice). "
            "Leave the loss out of the checkpointed part."
        )


def _attach(loss: Tensor, *_: object) -> Tensor:
    return loss.clone()


def _attach_setup_context(ctx, inputs, output):
    _, *tensors = inputs
    sources, gradients = tensors[:5], tensors[5:9]
    ctx.with_grads, ctx.grad_scale = tensors[9:]
    # the head is among the sources for the graph's sake alone: it has no gradient here
    hidden, _, *rest = sources
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, *rest)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.is_used = False


def _attach_backward(_):
    def backward(ctx, grad_loss):
        nothing = [None] * 12
        if grad_loss is None:
            return tuple(nothing)
        if not torch.compiler.is_compiling():
            _hold_to_scale(ctx, grad_loss)
        # hidden states, bias, A and B: the head, between the first two, has its own sum
        for position, formed, saved, dtype in zip(
            (1, 3, 4, 5), ctx.with_grads, ctx.saved_tensors, ctx.dtypes, strict=True
        ):
            if formed and ctx.needs_input_grad[position]:
                nothing[position] = _linear.scaled(saved, grad_loss, dtype)
        return tuple(nothing)

    return backward


def _hold_to_scale(ctx, grad_loss: Tensor) -> None:
    if ctx.is_used:
        raise RuntimeError(
            f"{_OP}: a loss with student_lm_head_weight_grad must have one backward, got a second: "
            "the sum has its gradient once."
        )
    ctx.is_used = True
    # on a GPU this would wait for the device: the caller's contract
    if grad_loss.device.type == "cpu" and bool(grad_loss != ctx.grad_scale):
        raise RuntimeError(
            f"{_OP}: the gradient of a loss with student_lm_head_weight_grad must be grad_scale = "
            f"{ctx.grad_scale}, got {float(grad_loss)}: the sum got the former in forward. Say "
            "grad_scale=, or put the factor into token_weights."
        )


register(
    "fused_linear_divergence_attach",
    fake=lambda loss, *_: torch.empty_like(loss),
    setup_context=_attach_setup_context,
    backward=_attach_backward,
    python=_attach,
)
