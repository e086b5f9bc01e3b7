# SPDX-License-Identifier: Apache-2.0
"""Every divergence as a careful user writes it in torch, for autograd or torch.compile.

The textbook formula on float32 log-probabilities in as few passes as it takes, without the masks
that special values would need: what a fused kernel has to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _mixture(weight: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    return (weight * log_p.exp() + (1 - weight) * log_q.exp()).log()


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_q, log_p)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return _kl(log_p, _mixture(alpha, log_p, log_q))


def _skew_reverse_kl(
    log_p: Tensor, log_q: Tensor, alpha: float, detach_mixture: bool = False
) -> Tensor:
    log_m = _mixture(alpha, log_q, log_p)
    return _kl(log_q, log_m.detach() if detach_mixture else log_m)


def _total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _jeffreys(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    return ((weight * log_p.exp() - (1 - weight) * log_q.exp()) * (log_p - log_q)).sum(-1)


def _squared_hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 1 - ((log_p + log_q) / 2).exp().sum(-1)


def _alpha(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    total = (alpha * log_p + (1 - alpha) * log_q).exp().sum(-1)
    return (total - 1) / (alpha * (alpha - 1))


def _renyi(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return (alpha * log_p + (1 - alpha) * log_q).logsumexp(-1) / (alpha - 1)


def _pearson_chi2(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (2 * log_p - log_q).exp().sum(-1) - 1


def _neyman_chi2(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (2 * log_q - log_p).exp().sum(-1) - 1


def _todi(log_p: Tensor, log_q: Tensor) -> Tensor:
    gap = log_p - log_q
    weight = gap.detach().sigmoid()
    return ((weight * log_p.exp() - (1 - weight) * log_q.exp()) * gap).sum(-1)


def _adaptive_kl(log_p: Tensor, log_q: Tensor, head_mass: float) -> Tensor:
    with torch.no_grad():
        p = log_p.exp()
        ordered, order = p.sort(dim=-1, descending=True)
        gap = (p - log_q.exp()).abs().gather(-1, order)
        in_head = ordered.cumsum(-1) <= head_mass
        # the most probable token is the head if it exceeds the mass by itself
        head = torch.where(in_head[:, 0], (gap * in_head).sum(-1), gap[:, 0])
        share = head / gap.sum(-1)
    return share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)


def _alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    total = alpha + beta
    p, q = (total * log_p).exp(), (total * log_q).exp()
    product = (alpha * log_p + beta * log_q).exp()
    return (alpha / total * p + beta / total * q - product).sum(-1) / (alpha * beta)


def _concrete_score(log_p: Tensor, log_q: Tensor, weights: tuple[str, str]) -> Tensor:
    if weights != ("student", "student"):
        raise NotImplementedError(f"weights: only ('student', 'student'), got {weights}")
    # with one law for both weights the double sum is a variance under it
    weight, gap = log_q.detach().exp(), log_q - log_p
    mean = (weight * gap).sum(-1, keepdim=True)
    return (weight * (gap - mean).square()).sum(-1)


FORMULAS = {
    "forward_kl": _kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "jeffreys": _jeffreys,
    "squared_hellinger": _squared_hellinger,
    "alpha": _alpha,
    "renyi": _renyi,
    "pearson_chi2": _pearson_chi2,
    "neyman_chi2": _neyman_chi2,
    "todi": _todi,
    "adaptive_kl": _adaptive_kl,
    "alpha_beta": _alpha_beta,
    "concrete_score": _concrete_score,
}


def divergence(student_logits: Tensor, teacher_logits: Tensor, name: str, **params) -> Tensor:
    """The sum over tokens of the divergence `name`, from logits of any dtype."""
    log_q = torch.log_softmax(student_logits.float(), -1)
    log_p = torch.log_softmax(teacher_logits.float(), -1)
    return FORMULAS[name](log_p, log_q, **params).sum()


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over tokens of -log q(label)."""
    return torch.nn.functional.cross_entropy(student_logits.float(), labels, reduction="sum")
