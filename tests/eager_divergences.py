# SPDX-License-Identifier: Apache-2.0
"""Each divergence as a careful user writes it on float32 log-probabilities: the formula, masked.

Written apart from `opd_kernels.reference`: mixtures by logaddexp, chi-squares as sum a^2 / b - 1.
Arguments are log p and log q, [T, V]; results [T] in nats. No term is written so as to keep its
digits where the laws nearly coincide; none overflows on its way to a result that does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl(logprobs: Tensor, other: Tensor) -> Tensor:
    absent = logprobs == -math.inf
    return (logprobs.exp() * (logprobs.masked_fill(absent, 0) - other.masked_fill(absent, 0))).sum(
        -1
    )


def mixture(weight: float | Tensor, logprobs: Tensor, other: Tensor) -> Tensor:
    """log(weight * a + (1 - weight) * b); -inf, without gradient, where there is no mass."""
    weight = torch.as_tensor(weight, dtype=logprobs.dtype, device=logprobs.device)
    first, second = logprobs + weight.log(), other + torch.log1p(-weight)
    absent = (first == -math.inf) & (second == -math.inf)
    both = torch.logaddexp(first.masked_fill(absent, 0), second.masked_fill(absent, 0))
    return both.masked_fill(absent, -math.inf)


def _present(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both with 0 where neither has any probability, and where that is."""
    absent = (teacher == -math.inf) & (student == -math.inf)
    return teacher.masked_fill(absent, 0), student.masked_fill(absent, 0), absent


def _power_products(teacher: Tensor, student: Tensor, s: float, t: float) -> Tensor:
    """log(p^s q^t)."""
    teacher, student, absent = _present(teacher, student)
    return (s * teacher + t * student).masked_fill(absent, -math.inf)


def _jsd(teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    middle = mixture(beta, teacher, student)
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def _skew_forward_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    return kl(teacher, mixture(alpha, teacher, student))


def _skew_reverse_kl(
    teacher: Tensor, student: Tensor, alpha: float = 0.1, detach_mixture: bool = False
) -> Tensor:
    middle = mixture(alpha, student, teacher)
    return kl(student, middle.detach() if detach_mixture else middle)


def _jeffreys(teacher: Tensor, student: Tensor, weight: float = 0.5) -> Tensor:
    return weight * kl(teacher, student) + (1 - weight) * kl(student, teacher)


def _squared_hellinger(teacher: Tensor, student: Tensor) -> Tensor:
    return 0.5 * ((teacher / 2).exp() - (student / 2).exp()).square().sum(-1)


def _alpha(teacher: Tensor, student: Tensor, alpha: float = 0.5) -> Tensor:
    total = _power_products(teacher, student, alpha, 1 - alpha).exp().sum(-1)
    return (total - 1) / (alpha * (alpha - 1))


def _renyi(teacher: Tensor, student: Tensor, alpha: float = 0.5) -> Tensor:
    products = _power_products(teacher, student, alpha, 1 - alpha)
    return products.logsumexp(-1) / (alpha - 1)


def _pearson_chi2(teacher: Tensor, student: Tensor) -> Tensor:
    return _power_products(teacher, student, 2, -1).exp().sum(-1) - 1


def _neyman_chi2(teacher: Tensor, student: Tensor) -> Tensor:
    return _power_products(teacher, student, -1, 2).exp().sum(-1) - 1


def _todi(teacher: Tensor, student: Tensor) -> Tensor:
    teacher, student, absent = _present(teacher, student)
    gap = teacher - student
    weight = gap.detach().sigmoid()
    p, q = teacher.exp(), student.exp()
    forward = weight * p * gap.masked_fill(p == 0, 0)
    reverse = (1 - weight) * q * gap.masked_fill(q == 0, 0)
    return (forward - reverse).masked_fill(absent, 0).sum(-1)


def _adaptive_kl(teacher: Tensor, student: Tensor, head_mass: float = 0.5) -> Tensor:
    with torch.no_grad():
        p, q = teacher.exp(), student.exp()
        ordered, order = p.sort(dim=-1, descending=True)
        cumulative = ordered.cumsum(-1)
        # equal probabilities take the mass at the last of them
        last = torch.ones_like(ordered, dtype=torch.bool)
        last[..., :-1] = ordered[..., 1:] != ordered[..., :-1]
        mass = cumulative.masked_fill(~last, math.inf).flip(-1).cummin(-1).values.flip(-1)
        in_head = (mass <= head_mass) | (
            (mass[..., :1] > head_mass) & (ordered == ordered[..., :1])
        )
        head = torch.zeros_like(in_head).scatter(-1, order, in_head)
        gap = (p - q).abs()
        head_gap, tail_gap = (gap * head).sum(-1), (gap * ~head).sum(-1)
        share = torch.where(head_gap + tail_gap == 0, 0.5, head_gap / (head_gap + tail_gap))
    forward, reverse = kl(teacher, student), kl(student, teacher)
    return torch.where(share > 0, share * forward, 0.0) + torch.where(
        share < 1, (1 - share) * reverse, 0.0
    )


def _alpha_beta(teacher: Tensor, student: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    teacher, student, absent = _present(teacher, student)
    gap, total = teacher - student, alpha + beta
    if alpha == 0 and beta == 0:
        terms = 0.5 * gap.square()
    elif alpha == 0:
        q = (beta * student).exp()
        log_ratio = gap.masked_fill(q == 0, 0)
        terms = (-beta * q * log_ratio - q + (beta * teacher).exp()) / beta**2
    elif beta == 0:
        p = (alpha * teacher).exp()
        log_ratio = gap.masked_fill(p == 0, 0)
        terms = (alpha * p * log_ratio - p + (alpha * student).exp()) / alpha**2
    elif total == 0:
        terms = ((alpha * gap).exp() - alpha * gap - 1) / alpha**2
    else:
        product = (alpha * teacher + beta * student).exp()
        p, q = (total * teacher).exp(), (total * student).exp()
        terms = (alpha / total * p + beta / total * q - product) / (alpha * beta)
    return terms.masked_fill(absent, 0).sum(-1)


def _concrete_score(
    teacher: Tensor, student: Tensor, weights: tuple[str, str] = ("student", "student")
) -> Tensor:
    present = ((teacher > -math.inf) & (student > -math.inf)).to(student.dtype)
    laws = {
        "student": student.detach().exp(),
        "teacher": teacher.detach().exp(),
        "uniform": present / present.sum(-1, keepdim=True),
    }
    first, second = (laws[name] for name in weights)
    unused = (first == 0) & (second == 0)
    d = student.masked_fill(unused, 0) - teacher.masked_fill(unused, 0)
    centred = d - (second * d).sum(-1, keepdim=True)
    return 0.5 * ((first + second) * centred.square()).sum(-1)


FORMULAS = {
    "forward_kl": kl,
    "reverse_kl": lambda teacher, student: kl(student, teacher),
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": lambda teacher, student: 0.5 * (teacher.exp() - student.exp()).abs().sum(-1),
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


def cross_entropy(student: Tensor, labels: Tensor, label_weights: Tensor | None) -> Tensor:
    """labels and weights [T] or [T, K]; negative labels are ignored."""
    labels = labels.to(torch.int64).reshape(len(student), -1)
    if label_weights is None:
        weights = torch.ones_like(labels, dtype=student.dtype)
    else:
        weights = label_weights.to(student.dtype).reshape(labels.shape)
    ignored = (labels < 0) | (weights == 0)
    chosen = student.gather(-1, labels.masked_fill(ignored, 0)).masked_fill(ignored, 0)
    return -(weights.masked_fill(ignored, 0) * chosen).sum(-1)
