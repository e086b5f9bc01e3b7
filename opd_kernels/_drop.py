# SPDX-License-Identifier: Apache-2.0
"""sum_k term(p_k, q_k) over a few entries of two laws, whose masses need not sum to 1.

The row kernels of `divergence` take whole laws: their summands leave out or add what sums to 0 over
one. Here are the summands as the definitions have them, and u = d term / d log q, in float64: K
entries of a token are nothing beside its V logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._catalogue import DIVERGENCES
from ._registration import register


class Masses(NamedTuple):
    """log p, log q, p and q of entries."""

    lp: Tensor
    lq: Tensor
    p: Tensor
    q: Tensor

    def neither(self) -> Tensor:
        """Entries that exist on neither side: 0, whatever the summand is."""
        return (self.lp == -math.inf) & (self.lq == -math.inf)


Summand = tuple[Tensor, Tensor]


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is 0."""
    return torch.where(weight == 0, 0.0, weight * value)


def _forward_kl(m: Masses, *_: float) -> Summand:
    return _times(m.p, m.lp - m.lq), -m.p


def _reverse_kl(m: Masses, *_: float) -> Summand:
    term = _times(m.q, m.lq - m.lp)
    return term, term + m.q


def _jsd(m: Masses, beta: float, _: float) -> Summand:
    mixture = (beta * m.p + (1 - beta) * m.q).log()
    of_student = (1 - beta) * _times(m.q, m.lq - mixture)
    return beta * _times(m.p, m.lp - mixture) + of_student, of_student


def _skew_forward_kl(m: Masses, alpha: float, _: float) -> Summand:
    mixture = alpha * m.p + (1 - alpha) * m.q
    return _times(m.p, m.lp - mixture.log()), -_times((1 - alpha) * m.p, m.q / mixture)


def _skew_reverse_kl(m: Masses, alpha: float, detached: float) -> Summand:
    mixture = (1 - alpha) * m.p + alpha * m.q
    term = _times(m.q, m.lq - mixture.log())
    inside = 0.0 if detached else _times(alpha * m.q, m.q / mixture)
    return term, term + m.q - inside


def _total_variation(m: Masses, *_: float) -> Summand:
    return 0.5 * (m.p - m.q).abs(), 0.5 * m.q * torch.sign(m.q - m.p)


def _jeffreys(m: Masses, weight: float, _: float) -> Summand:
    forward, of_forward = _forward_kl(m)
    reverse, of_reverse = _reverse_kl(m)
    term = weight * forward + (1 - weight) * reverse
    return term, weight * of_forward + (1 - weight) * of_reverse


def _squared_hellinger(m: Masses, *_: float) -> Summand:
    root_p, root_q = (0.5 * m.lp).exp(), (0.5 * m.lq).exp()
    return 0.5 * (root_p - root_q).square(), 0.5 * (m.q - root_p * root_q)


def _alpha(m: Masses, alpha: float, _: float) -> Summand:
    product = (alpha * m.lp + (1 - alpha) * m.lq).exp()
    # the "- 1" of the definition is the teacher's mass
    return (product - m.p) / (alpha * (alpha - 1)), -product / alpha


def _pearson_chi2(m: Masses, *_: float) -> Summand:
    term = ((m.lp - 0.5 * m.lq).exp() - (0.5 * m.lq).exp()).square()
    return term, m.q - (2 * m.lp - m.lq).exp()


def _neyman_chi2(m: Masses, *_: float) -> Summand:
    term = ((m.lq - 0.5 * m.lp).exp() - (0.5 * m.lp).exp()).square()
    return term, 2 * ((2 * m.lq - m.lp).exp() - m.q)


def _todi(m: Masses, *_: float) -> Summand:
    # p / (p + q), also where both are below the smallest float64
    share = torch.sigmoid(torch.where(m.neither(), 0.0, m.lp - m.lq))
    forward, reverse = _times(m.p, m.lp - m.lq), _times(m.q, m.lq - m.lp)
    term = _times(share, forward) + _times(1 - share, reverse)
    return term, _times(1 - share, reverse + m.q) - share * m.p


def _alpha_beta(m: Masses, alpha: float, beta: float) -> Summand:
    total = alpha + beta
    total = 0.0 if abs(total) < 1e-12 else total
    gap = m.lq - m.lp

    def power(log_mass: Tensor, exponent: float) -> Tensor:
        # 0^0 = 1
        return torch.ones_like(log_mass) if exponent == 0 else (exponent * log_mass).exp()

    product = power(m.lp, alpha) * power(m.lq, beta)
    p_total, q_total = power(m.lp, total), power(m.lq, total)
    if alpha == 0 and beta == 0:
        term, u = 0.5 * gap.square(), gap
    elif alpha == 0:
        u = _times(q_total, gap)
        term = (beta * u - q_total + p_total) / beta**2
    elif beta == 0:
        term = (-alpha * _times(p_total, gap) - p_total + q_total) / alpha**2
        u = (q_total - p_total) / alpha
    elif total == 0:
        term = (alpha * gap + product - 1) / alpha**2
        u = (1 - product) / alpha
    else:
        term = alpha / total * p_total + beta / total * q_total - product
        term, u = term / (alpha * beta), (q_total - product) / alpha
    # on one side only: what is left of it where 0 to that side's power is 0, else infinite
    for exponent, absent, present in ((beta, m.q == 0, m.lp), (alpha, m.p == 0, m.lq)):
        alone = torch.full_like(term, math.inf)
        if exponent > 0 and total > 0:
            alone = power(present, total) / (exponent * total)
        term = torch.where(absent, alone, term)
    if not (beta == 0 and alpha > 0):
        u = torch.where(term == math.inf, 0.0, u)
    return term, u


_SUMMANDS: dict[str, Callable[..., Summand]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "jeffreys": _jeffreys,
    "squared_hellinger": _squared_hellinger,
    "alpha": _alpha,
    "pearson_chi2": _pearson_chi2,
    "neyman_chi2": _neyman_chi2,
    "todi": _todi,
    "alpha_beta": _alpha_beta,
}
NAMES = tuple(_SUMMANDS)
_BY_ID = {DIVERGENCES[name].id: summand for name, summand in _SUMMANDS.items()}


def _drop(
    teacher_cells: Tensor,
    student_cells: Tensor,
    token_weights: Tensor | None,
    coefficients: Tensor | None,
    divergences: Sequence[int],
    params: Sequence[float],
) -> tuple[Tensor, Tensor]:
    lp, lq = teacher_cells.to(torch.float64), student_cells.to(torch.float64)
    masses = Masses(lp, lq, lp.exp(), lq.exp())
    neither = masses.neither()
    loss, grad = lp.new_zeros(lp.shape[0]), torch.zeros_like(lp)
    for j, number in enumerate(divergences):
        term, u = _BY_ID[number](masses, *params[2 * j : 2 * j + 2])
        value = term.masked_fill(neither, 0.0).sum(1)
        u = u.masked_fill(neither, 0.0)
        if coefficients is not None:
            factor = coefficients[j].to(torch.float64)
            value, u = _times(factor, value), _times(factor.unsqueeze(1), u)
        loss, grad = loss + value, grad + u
    if token_weights is not None:
        weights = token_weights.to(torch.float64)
        loss, grad = _times(weights, loss), _times(weights.unsqueeze(1), grad)
    real = student_cells.dtype
    return loss.to(real), grad.to(real)


def _drop_fake(teacher_cells, student_cells, *_):
    return student_cells.new_empty(student_cells.shape[0]), torch.empty_like(student_cells)


def _setup_context(ctx, inputs, output):
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad)


def _backward(_):
    def backward(ctx, grad_loss, __):
        nothing = [None] * 6
        if grad_loss is not None:
            (grad,) = ctx.saved_tensors
            nothing[1] = grad * grad_loss.unsqueeze(1)
        return tuple(nothing)

    return backward


register(
    "topk_divergence_drop",
    fake=_drop_fake,
    setup_context=_setup_context,
    backward=_backward,
    python=_drop,
)
