# SPDX-License-Identifier: Apache-2.0
"""loss[t] = w[t] D(softmax(teacher_logits[t] / temperature), softmax(student_logits[t] / ...))."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _dispatch, _linear, reference
from ._registration import register
from .divergences import Divergence, parse

_OP = "divergence"
NUM_STATISTICS = 5


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Divergence = "reverse_kl",
    temperature: float | Sequence[float] = 1.0,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence of the teacher's and the student's next-token laws, per token.

    loss[t] = w[t] D(P_t, Q_t),  P_t = softmax(teacher_logits[t] / temperature), Q_t likewise.

    Args:
        student_logits: [T, Vs], float32 | bfloat16 | float16 (float64 on CPU).
        teacher_logits: [T, Vt] on the same device; receives no gradient. Its dtype may differ.
        divergence: a name or `divergences.jsd(beta=0.3)`; `forward_kl` is KL(P || Q).
        temperature: divides the logits; > 0, or a pair (student, teacher). No implicit
            temperature**2 factor.
        token_weights: [T], multiplies loss and gradient; a row of weight 0 is not read and gives
            exactly 0. Default: ones.
        vocab_size: the leading columns that both vocabularies share, when the heads are padded
            differently. The rest is not read and gets zero gradient.
        backend: "cpu" | "triton" | "reference"; None picks one (`explain` says which).

    Returns:
        [T] float32 (float64 for float64 inputs), nats, not reduced. Differentiable in
        student_logits.

    Raises:
        ValueError: shapes, vocabulary widths, temperature or weights that do not fit.
        TypeError: a dtype or type that is not supported.
        UnsupportedBackendError: a requested backend cannot run the call.

    Notes:
        Saves two float64 and one float32 per token and recomputes in backward. A logit of -inf is
        a token of probability 0; NaN logits give NaN. Accuracy: docs/numerics.md.

    Source: GKD, arXiv:2306.13649; MiniLLM, arXiv:2306.08543; DistiLLM, arXiv:2402.03898.
    """
    spec = parse(divergence)
    _checks.tensor(_OP, "student_logits", student_logits, 2)
    _checks.tensor(_OP, "teacher_logits", teacher_logits, 2)
    _checks.floating(_OP, student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.same_device(_OP, student_logits=student_logits, teacher_logits=teacher_logits)
    num_tokens = student_logits.shape[0]
    _checks.length(_OP, "teacher_logits", teacher_logits, num_tokens, "student_logits")
    vocab_size = _checks.vocab_prefix(
        _OP,
        vocab_size,
        student_logits=student_logits.shape[1],
        teacher_logits=teacher_logits.shape[1],
    )
    student_temperature, teacher_temperature = _checks.temperatures(_OP, temperature)
    real = _checks.real_dtype(student_logits)
    token_weights = _checks.token_weights(
        _OP, token_weights, num_tokens, student_logits.device, real
    )
    chosen = _dispatch.select(_OP, _dispatch.meta_of(student_logits), backend)
    if chosen == "reference":
        return reference.divergence(
            student_logits,
            teacher_logits.detach(),
            divergence=spec,
            temperature=(student_temperature, teacher_temperature),
            token_weights=token_weights,
            vocab_size=vocab_size,
        ).to(real)
    loss, *_ = _dispatch.row_ops(chosen).divergence_fwd(
        _checks.unit_stride(student_logits),
        _checks.unit_stride(teacher_logits.detach()),
        token_weights,
        spec.id,
        *spec.kernel_params,
        student_temperature,
        teacher_temperature,
        vocab_size,
        False,
    )
    return loss


def _fwd_fake(
    student_logits,
    teacher_logits,
    token_weights,
    divergence,
    param0,
    param1,
    student_temperature,
    teacher_temperature,
    vocab_size,
    with_statistics,
):
    num_tokens = student_logits.shape[0]
    real = _checks.real_dtype(student_logits)
    loss = student_logits.new_empty(num_tokens, dtype=real)
    lse = student_logits.new_empty(num_tokens, dtype=torch.float64)
    statistics = student_logits.new_empty(
        (NUM_STATISTICS, num_tokens if with_statistics else 0), dtype=real
    )
    return loss, lse, torch.empty_like(lse), torch.empty_like(loss), statistics


def _fwd_setup_context(ctx, inputs, output):
    student_logits, teacher_logits, token_weights, *numbers, _ = inputs
    _, student_lse, teacher_lse, grad_sum, statistics = output
    ctx.mark_non_differentiable(student_lse, teacher_lse, grad_sum, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        student_logits, teacher_logits, token_weights, student_lse, teacher_lse, grad_sum
    )
    ctx.numbers = numbers


def _fwd_backward(namespace):
    def backward(ctx, grad_loss, *_):
        no_gradients = (None,) * 9
        if grad_loss is None:
            return None, *no_gradients
        student_logits, teacher_logits, token_weights, *saved = ctx.saved_tensors
        grad_student_logits = getattr(torch.ops, namespace).divergence_bwd(
            grad_loss.contiguous(),
            student_logits,
            teacher_logits,
            token_weights,
            *saved,
            *ctx.numbers,
        )
        return grad_student_logits, *no_gradients

    return backward


def _bwd_fake(grad_loss, student_logits, *_):
    return student_logits.new_empty(student_logits.shape)


def _fwd_grad_fake(student_logits, *arguments):
    real = _checks.real_dtype(student_logits)
    num_tokens = student_logits.shape[0]
    with_statistics = arguments[-1]
    return (
        student_logits.new_empty(num_tokens, dtype=real),
        student_logits.new_empty(
            (NUM_STATISTICS, num_tokens if with_statistics else 0), dtype=real
        ),
    )


def _triton_fwd(*arguments):
    from .triton import divergence as kernels

    return kernels.divergence_fwd(*arguments)


def _triton_bwd(*arguments):
    from .triton import divergence as kernels

    return kernels.divergence_bwd(*arguments)


def _triton_fwd_grad_(*arguments):
    from .triton import divergence as kernels

    return kernels.divergence_fwd_grad_(*arguments)


register(
    "divergence_fwd",
    fake=_fwd_fake,
    setup_context=_fwd_setup_context,
    backward=_fwd_backward,
    triton=_triton_fwd,
)
register(
    "divergence_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    triton=_triton_bwd,
)
register("divergence_fwd_grad_", fake=_fwd_grad_fake, triton=_triton_fwd_grad_)
