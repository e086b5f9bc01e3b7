# SPDX-License-Identifier: Apache-2.0
"""loss[t] = w[t] sum_j c_j[t] D_j(P_t, Q_t), P and Q the laws of two rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws, _linear, reference
from ._registration import register

_OP = "divergence"
# what divergence_phase_ does, in the order of its calls: opens a state, adds what a slice of the
# vocabulary contributes (0, 1, 2), closes the log-sum-exps after 0, and finishes
OPEN, LSE, CLOSE_LSE, ROW_SUMS, TERMS, FINISH = 3, 0, 4, 1, 2, 5


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: _laws.Loss = "reverse_kl",
    temperature: _laws.Temperature = 1.0,
    token_weights: Tensor | None = None,
    target: _laws.Target | None = None,
    reference_logits: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reference_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence of the teacher's and the student's next-token laws, per token.

    loss[t] = w[t] sum_j c_j[t] D_j(P_t, Q_t),
    Q_t = softmax(softcap(logit_scale * student_logits[t]) / temperature), P_t likewise.

    Args:
        student_logits: [T, Vs], float32 | bfloat16 | float16 (float64 on CPU).
        teacher_logits: [T, Vt] on the same device; receives no gradient. Its dtype may differ.
        divergence: a name or `divergences.jsd(beta=0.3)`; `forward_kl` is KL(P || Q). Or a sum:
            pairs of a coefficient (a number, or [T] without gradient) and a divergence; where a
            coefficient is 0 the summand is left out.
        temperature: divides the logits; > 0, a number or [T], or a pair (student, teacher) of
            them. No implicit temperature**2 factor.
        token_weights: [T], multiplies loss and gradient; a row of weight 0 is not read and gives
            exactly 0. Default: ones.
        target: what takes the place of P: `targets.geometric(...)` or `targets.mixture(...)`.
        reference_logits: [T, Vr], the third model of a geometric target; no gradient. Its
            temperature is the teacher's.
        student_softcap: logits become softcap * tanh(logits / softcap), after the scale; likewise
            for teacher and reference. None: no cap.
        student_logit_scale: multiplies the logits first; likewise for teacher and reference.
        labels: [T] or [T, K] ids for the summand "cross_entropy"; negative ones are ignored.
        label_weights: like labels; cross_entropy is -sum_k label_weights[k] log Q(labels[k]).
        vocab_size: the leading columns that both vocabularies share, when the heads are padded
            differently. The rest is not read and gets zero gradient.
        backend: "cpu" | "cuda" | "triton" | "reference"; None picks one (`explain` says which).

    Returns:
        [T] float32 (float64 for float64 inputs), nats, not reduced. Differentiable in
        student_logits.

    Raises:
        ValueError: shapes, vocabulary widths, temperature or weights that do not fit.
        TypeError: a dtype or type that is not supported.
        RuntimeError: labels, temperatures or weights of a mixture out of range, found on CPU.
        UnsupportedBackendError: a requested backend cannot run the call.

    Notes:
        Saves 24 float64 per token and recomputes in backward. A logit of -inf is a token of
        probability 0; NaN logits give NaN in their own row. Accuracy: docs/numerics.md.

    Source: GKD, arXiv:2306.13649; MiniLLM, arXiv:2306.08543; DistiLLM, arXiv:2402.03898; the rest
    of the family in docs/divergences.md.
    """
    _checks.tensor(_OP, "student_logits", student_logits, 2)
    sides = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    if reference_logits is not None:
        sides["reference_logits"] = reference_logits
    _checks.used_reference(_OP, reference_logits, None, reference_softcap, reference_logit_scale)
    num_tokens = student_logits.shape[0]
    for name, logits in sides.items():
        _checks.tensor(_OP, name, logits, 2)
        _checks.length(_OP, name, logits, num_tokens, "student_logits")
    _checks.floating(_OP, **sides)
    _checks.same_device(_OP, **sides)
    widths = {name: logits.shape[1] for name, logits in sides.items()}
    vocab_size = _checks.vocab_prefix(_OP, vocab_size, **widths)
    rows = _laws.rows_of(_OP, student_logits)
    laws = _laws.pack(
        rows,
        vocab_size,
        divergence=divergence,
        temperature=temperature,
        token_weights=token_weights,
        target=target,
        has_reference=reference_logits is not None,
        softcaps=(student_softcap, teacher_softcap, reference_softcap),
        logit_scales=(student_logit_scale, teacher_logit_scale, reference_logit_scale),
        labels=labels,
        label_weights=label_weights,
    )
    chosen = _dispatch.select(_OP, _dispatch.meta_of(student_logits), backend)
    if chosen == "reference":
        return reference.divergence(
            student_logits,
            teacher_logits.detach(),
            divergence=divergence,
            temperature=temperature,
            token_weights=token_weights,
            target=target,
            reference_logits=reference_logits,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            reference_softcap=reference_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            reference_logit_scale=reference_logit_scale,
            labels=labels,
            label_weights=label_weights,
            vocab_size=vocab_size,
        ).to(rows.real)
    _checks.no_forward_mode(_OP, student_logits, teacher_logits)
    loss, *_ = _dispatch.row_ops(chosen).divergence_fwd(
        _checks.unit_stride(student_logits),
        _checks.unit_stride(teacher_logits.detach()),
        None if reference_logits is None else _checks.unit_stride(reference_logits.detach()),
        *laws,
        False,
    )
    return loss


def _empty_loss(student_logits: Tensor, with_statistics: bool) -> tuple[Tensor, Tensor]:
    """(loss, statistics) of a call on these logits."""
    num_tokens = student_logits.shape[0]
    loss = student_logits.new_empty(num_tokens, dtype=_checks.real_dtype(student_logits))
    return loss, loss.new_empty(_laws.NUM_STATISTICS, num_tokens if with_statistics else 0)


def _fwd_fake(student_logits, teacher_logits, reference_logits, *arguments):
    *laws, with_statistics = arguments
    loss, statistics = _empty_loss(student_logits, with_statistics)
    size = (student_logits.shape[0], _laws.Laws(*laws).state_size)
    return loss, student_logits.new_empty(size, dtype=torch.float64), statistics


def _fwd_setup_context(ctx, inputs, output):
    *inputs, _ = inputs
    _, state, statistics = output
    ctx.mark_non_differentiable(state, statistics)
    ctx.set_materialize_grads(False)
    # the tensors of OPD_LOGITS and OPD_LAWS come first
    ctx.num_tensors = sum(value is None or isinstance(value, Tensor) for value in inputs)
    ctx.save_for_backward(state, *inputs[: ctx.num_tensors])
    ctx.rest = inputs[ctx.num_tensors :]


def _fwd_backward(namespace):
    def backward(ctx, grad_loss, *_):
        no_gradients = (None,) * (ctx.num_tensors + len(ctx.rest))
        if grad_loss is None:
            return None, *no_gradients
        state, *tensors = ctx.saved_tensors
        grad_student_logits = getattr(torch.ops, namespace).divergence_bwd(
            grad_loss.contiguous(), state, *tensors, *ctx.rest
        )
        return grad_student_logits, *no_gradients

    return backward


def _bwd_fake(grad_loss, state, student_logits, *_):
    return student_logits.new_empty(student_logits.shape)


def _fwd_grad_fake(student_logits, *arguments):
    *_, with_statistics, _ = arguments
    return _empty_loss(student_logits, with_statistics)


def _phase_fake(state, student_logits, *arguments):
    *_, phase, _, with_statistics = arguments
    finished = student_logits if phase == FINISH else student_logits[:0]
    return _empty_loss(finished, with_statistics)


def _triton_fwd(*arguments):
    from .triton import divergence as kernels

    return kernels.divergence_fwd(*arguments)


def _triton_bwd(*arguments):
    from .triton import divergence as kernels

    return kernels.divergence_bwd(*arguments)


def _triton_fwd_grad_(*arguments):
    from .triton import divergence as kernels

    return kernels.divergence_fwd_grad_(*arguments)


def _triton_phase_(*arguments):
    from .triton import divergence as kernels

    return kernels.divergence_phase_(*arguments)


def _triton_bwd_(*arguments):
    from .triton import divergence as kernels

    return kernels.divergence_bwd_(*arguments)


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
register("divergence_phase_", fake=_phase_fake, triton=_triton_phase_)
register("divergence_bwd_", fake=lambda *_: None, triton=_triton_bwd_)
