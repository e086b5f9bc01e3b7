# SPDX-License-Identifier: Apache-2.0
"""sum_i |c_T P_(i) - c_S Q_(i)| of two vocabularies' laws, both sorted, from their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _dispatch, _formed, _laws, _linear, _ranks, reference
from ._ranks import Ranks
from ._registration import register

_OP = "sorted_l1"


def sorted_l1(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: _laws.Temperature = 1.0,
    token_weights: Tensor | None = None,
    student_log_scales: Tensor | None = None,
    teacher_log_scales: Tensor | None = None,
    pairs: tuple[Tensor, Tensor] | None = None,
    pair_weight: float = 0.0,
    rest_weight: float = 1.0,
    beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """L1 distance of two laws' probabilities, each sorted; and on known pairs of tokens, their JSD.

    loss[t] = w[t] (rest_weight sum_i |p_(i) - q_(i)| + pair_weight sum_(v, w) JSD_beta(p_w, q_v)),
    p = exp(teacher_log_scales[t]) P_t, q = exp(student_log_scales[t]) Q_t,
    JSD_beta(p, q) = beta p log(p / m) + (1 - beta) q log(q / m), m = beta p + (1 - beta) q.

    The first sum is over the tokens without a partner, each side from its largest probability down
    and the shorter one followed by zeros. It knows nothing of what a token is: it is 0 for every
    permutation of a law.

    Args:
        student_logits: [T, Vs], float32 | bfloat16 | float16 (float64). Differentiable.
        teacher_logits: [T, Vt], without gradient; row t is compared with the student's row t.
        temperature: divides the logits; > 0. A number or [T]; a pair is (student, teacher).
        token_weights: [T], without gradient. A row of weight 0 gives exactly 0.
        student_log_scales: [T], at most 0, differentiable: log-probability of what a row's law is
            times of. teacher_log_scales: [T], without gradient. Default: zeros.
        pairs: (student_ids [M], teacher_ids [M]), tokens that are the same; each id at most once.
        pair_weight, rest_weight: at least 0; with pair_weight 0 the pairs are left out.
        beta: the teacher's weight in the JSD, in (0, 1).
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: as
            `opd_kernels.divergence` takes them.
        student_vocab_size, teacher_vocab_size: the leading columns that count.
        backend: "cpu" | "cuda" (the library's sort) | "reference"; None picks one.

    Returns:
        [T] float32 (float64 for float64 logits), from 0 to 2 without scales and pairs;
        of pairs in nats.

    Raises:
        ValueError: shapes, ranges or (on CPU) ids that do not fit. TypeError: unsupported dtype.
        UnsupportedBackendError.

    Notes:
        dloss/dz_v = Q_v (s_v - sum_u s_u Q_u) with s the sign of q - p at v's rank, 0 on ties: ids
        order equal probabilities. The gradient jumps where two probabilities change places.

    Source: ULD, arXiv:2402.12030; with pairs, GOLD's hybrid loss.
    """
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    for name, value in logits.items():
        _checks.tensor(_OP, name, value, 2)
        _checks.length(_OP, name, value, student_logits.shape[0], "student_logits")
    _checks.floating(_OP, **logits)
    _checks.same_device(_OP, **logits)
    ranks = _ranks.pack(
        _laws.rows_of(_OP, student_logits),
        (
            _checks.vocab_prefix(_OP, student_vocab_size, student_logits=student_logits.shape[1]),
            _checks.vocab_prefix(_OP, teacher_vocab_size, teacher_logits=teacher_logits.shape[1]),
        ),
        temperature=temperature,
        token_weights=token_weights,
        log_scales=(student_log_scales, teacher_log_scales),
        pairs=pairs,
        pair_weight=pair_weight,
        rest_weight=rest_weight,
        beta=beta,
        biases=(None, None),
        softcaps=(student_softcap, teacher_softcap),
        logit_scales=(student_logit_scale, teacher_logit_scale),
    )
    chosen = _dispatch.select(_OP, _dispatch.meta_of(student_logits), backend)
    if chosen == "reference":
        return reference.sorted_l1(
            student_logits,
            teacher_logits,
            temperature=temperature,
            token_weights=token_weights,
            student_log_scales=student_log_scales,
            teacher_log_scales=teacher_log_scales,
            pairs=pairs,
            pair_weight=pair_weight,
            rest_weight=rest_weight,
            beta=beta,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
        ).to(_checks.real_dtype(student_logits))
    _checks.no_forward_mode(_OP, student_logits, teacher_logits)
    if not torch.compiler.is_compiling():
        _ranks.check_values(_OP, ranks)
    return torch.ops.opd.sorted_l1_fwd(
        _checks.unit_stride(student_logits), _checks.unit_stride(teacher_logits.detach()), *ranks
    )


_FIRST = 2


def _fwd_cuda(student_logits, teacher_logits, *arguments):
    return _ranks.compare(student_logits, teacher_logits, Ranks(*arguments))[0]


def _bwd_cuda(student_logits, teacher_logits, *arguments):
    _, grad, grad_scales = _ranks.compare(student_logits, teacher_logits, Ranks(*arguments))
    out = torch.zeros_like(student_logits)
    out[:, : grad.shape[1]] = grad
    return out, grad_scales


def _grad_cuda_(student_logits, teacher_logits, *arguments):
    loss, grad, grad_scales = _ranks.compare(student_logits, teacher_logits, Ranks(*arguments))
    student_logits[:, : grad.shape[1]] = grad
    student_logits[:, grad.shape[1] :] = 0.0
    return loss, grad_scales


def _per_row(student_logits: Tensor) -> Tensor:
    real = _checks.real_dtype(student_logits)
    return student_logits.new_empty(student_logits.shape[0], dtype=real)


def _fwd_fake(student_logits, *_):
    return _per_row(student_logits)


def _bwd_fake(student_logits, *_):
    return student_logits.new_empty(student_logits.shape), _per_row(student_logits)


def _grad_fake(student_logits, *_):
    return _per_row(student_logits), _per_row(student_logits)


def _fwd_backward(_):
    def backward(ctx, grad_loss):
        gradients = [None] * len(ctx.is_tensor)
        if grad_loss is None:
            return tuple(gradients)
        inputs = _formed.saved_inputs(ctx)
        ranks = Ranks(*inputs[_FIRST:])
        weights = _formed.upstream_weights(grad_loss.contiguous(), ranks.token_weights)
        gradients[0], grad_scales = torch.ops.opd.sorted_l1_bwd(
            *inputs[:_FIRST], *ranks._replace(token_weights=weights)
        )
        if ranks.student_log_scales is not None:
            gradients[_FIRST + _ranks.LOG_SCALES] = grad_scales
        return tuple(gradients)

    return backward


register(
    "sorted_l1_fwd",
    fake=_fwd_fake,
    setup_context=lambda ctx, inputs, output: _formed.save_inputs(ctx, inputs),
    backward=_fwd_backward,
    cuda=_fwd_cuda,
    cpu_only=True,
)
register(
    "sorted_l1_bwd",
    fake=_bwd_fake,
    backward=lambda _: _linear.no_double_backward,
    cuda=_bwd_cuda,
    cpu_only=True,
)
register("sorted_l1_grad_", fake=_grad_fake, cuda=_grad_cuda_, cpu_only=True)
