# SPDX-License-Identifier: Apache-2.0
"""Autograd of the fused losses: gradients formed in the forward call, or again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _linear


def sum_setup_context(differentiable: Sequence[int], with_grads_of: Callable) -> Callable:
    """Of an op (loss, *gradients, statistics) that has formed the gradients.

    Args:
        differentiable: where their tensors are among the inputs.
        with_grads_of: the inputs -> which of the gradients were formed.
    """

    def setup_context(ctx, inputs, output):
        _, *gradients, statistics = output
        ctx.mark_non_differentiable(*gradients, statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.formed = with_grads_of(inputs)
        ctx.dtypes = [
            None if inputs[position] is None else inputs[position].dtype
            for position in differentiable
        ]
        ctx.num_inputs = len(inputs)

    return setup_context


def sum_backward(differentiable: Sequence[int]) -> Callable:
    """The formed gradients times the upstream one, in the dtypes of their tensors."""

    def backward(ctx, grad_loss, *__):
        gradients = [None] * ctx.num_inputs
        if grad_loss is None:
            return tuple(gradients)
        for position, formed, saved, dtype in zip(
            differentiable, ctx.formed, ctx.saved_tensors, ctx.dtypes, strict=True
        ):
            if formed and ctx.needs_input_grad[position]:
                gradients[position] = _linear.scaled(saved, grad_loss, dtype)
        return tuple(gradients)

    return lambda _: backward


def save_inputs(ctx, inputs: Sequence) -> None:
    """Keeps all inputs of an op that forms its gradients in backward."""
    ctx.set_materialize_grads(False)
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.rest = [value for value in inputs if not isinstance(value, Tensor)]


def saved_inputs(ctx) -> list:
    """What `save_inputs` was given."""
    tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
    return [next(tensors) if is_tensor else next(rest) for is_tensor in ctx.is_tensor]


def at_places(
    num_inputs: int, differentiable: Sequence[int], wanted: Sequence[bool], formed: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """One gradient per input, from those of the tensors that can have one."""
    gradients: list[Tensor | None] = [None] * num_inputs
    for position, want, gradient in zip(differentiable, wanted, formed, strict=True):
        if want:
            gradients[position] = gradient
    return tuple(gradients)


def backward_again(op: str, differentiable: Sequence[int], call: Callable) -> Callable:
    """The backward of a loss [T] whose gradients are formed when the upstream one is there.

    Args:
        op: `torch.ops.opd.<op>_bwd` forms them, from the upstream gradient and more.
        differentiable: where their tensors are among the inputs.
        call: (saved inputs, which gradients are wanted) -> those further arguments.
    """

    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * len(ctx.is_tensor)
        wanted = [ctx.needs_input_grad[position] for position in differentiable]
        formed = getattr(torch.ops.opd, f"{op}_bwd")(
            grad_loss.contiguous(), *call(saved_inputs(ctx), wanted)
        )
        return at_places(len(ctx.is_tensor), differentiable, wanted, formed)

    return lambda _: backward


def upstream_weights(grad_loss: Tensor, given: Tensor | None) -> Tensor:
    """The upstream gradient [T] as one more token weight: its zeros cost nothing either."""
    if given is None:
        return grad_loss
    # a token of weight 0 stays out whatever comes from above, inf included
    return torch.where(given == 0, torch.zeros_like(grad_loss), given * grad_loss)


def in_dtypes(
    gradients: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    wanted: Sequence[bool],
    convert: Callable[[Tensor, torch.dtype], Tensor] = _linear.rounded,
) -> tuple[Tensor, ...]:
    """The gradients that were wanted in the dtypes of their tensors; fakes pass `Tensor.to`."""
    return tuple(
        convert(gradient, source.dtype) if want else gradient
        for gradient, source, want in zip(gradients, sources, wanted, strict=True)
    )
