# SPDX-License-Identifier: Apache-2.0
"""The divergences as the papers define them: on two probability rows, in float64.

Nothing here is shared with compiled code, on purpose: sharing code with the truth would share its
bugs. Each function takes log-probabilities `[..., V]` of the teacher (p) and of the student (q),
float64, and returns `[...]` in nats. `0 * log 0` is 0: a term of weight exactly 0 is left out,
in value and in gradient; one that is infinite by definition (forward_kl where q = 0 < p) stays so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _kullback_leibler(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """KL(a || b) = sum_v a_v log(a_v / b_v), where a_v = 0 contributes nothing."""
    probs = logprobs.exp()
    # choose before subtracting: -inf - -inf inside the graph would put NaN into the gradient
    absent = probs == 0
    log_ratio = logprobs.masked_fill(absent, 0.0) - other_logprobs.masked_fill(absent, 0.0)
    return (probs * log_ratio).sum(-1)


def _mixture(weight: float, logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """log(weight * a + (1 - weight) * b), formed on probabilities; 0 where there is no mass."""
    mass = weight * logprobs.exp() + (1.0 - weight) * other_logprobs.exp()
    return mass.masked_fill(mass == 0, 1.0).log()


def forward_kl(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v log(p_v / q_v).

    Source: Hinton et al., arXiv:1503.02531; the name as in GKD, arXiv:2306.13649, section 2.
    """
    return _kullback_leibler(teacher_logprobs, student_logprobs)


def reverse_kl(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """KL(q || p) = sum_v q_v log(q_v / p_v).

    Source: MiniLLM, arXiv:2306.08543, eq. (1).
    """
    return _kullback_leibler(student_logprobs, teacher_logprobs)


def jsd(teacher_logprobs: Tensor, student_logprobs: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; beta in (0, 1).

    Source: GKD, arXiv:2306.13649, eq. (1).
    """
    mixture = _mixture(beta, teacher_logprobs, student_logprobs)
    teacher_side = _kullback_leibler(teacher_logprobs, mixture)
    student_side = _kullback_leibler(student_logprobs, mixture)
    return beta * teacher_side + (1.0 - beta) * student_side


def skew_forward_kl(
    teacher_logprobs: Tensor, student_logprobs: Tensor, alpha: float = 0.1
) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q).

    Source: DistiLLM, arXiv:2402.03898, eq. (4).
    """
    return _kullback_leibler(teacher_logprobs, _mixture(alpha, teacher_logprobs, student_logprobs))


def skew_reverse_kl(
    teacher_logprobs: Tensor,
    student_logprobs: Tensor,
    alpha: float = 0.1,
    detach_mixture: bool = False,
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q); `detach_mixture`: the mixture is a constant.

    Source: DistiLLM, arXiv:2402.03898, section 3.1; the detached form is its published code's.
    """
    mixture = _mixture(alpha, student_logprobs, teacher_logprobs)
    return _kullback_leibler(student_logprobs, mixture.detach() if detach_mixture else mixture)


def total_variation(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """sum_v |p_v - q_v| / 2, in [0, 1]; the gradient of |x| at 0 is 0.

    Source: f-DISTILL, arXiv:2307.15190, section 3.
    """
    return 0.5 * (teacher_logprobs.exp() - student_logprobs.exp()).abs().sum(-1)


def jeffreys(teacher_logprobs: Tensor, student_logprobs: Tensor, weight: float = 0.5) -> Tensor:
    """weight KL(p || q) + (1 - weight) KL(q || p).

    Source: Jeffreys 1946, doi:10.1098/rspa.1946.0056, weighted.
    """
    forward = _kullback_leibler(teacher_logprobs, student_logprobs)
    reverse = _kullback_leibler(student_logprobs, teacher_logprobs)
    return weight * forward + (1.0 - weight) * reverse


def squared_hellinger(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """sum_v (sqrt p_v - sqrt q_v)^2 / 2, in [0, 1].

    Source: Csiszar and Shields 2004, doi:10.1561/0100000004.
    """
    difference = (0.5 * teacher_logprobs).exp() - (0.5 * student_logprobs).exp()
    return 0.5 * difference.square().sum(-1)


def _log_power_product(
    teacher_logprobs: Tensor, student_logprobs: Tensor, teacher_power: float, student_power: float
) -> Tensor:
    """log(p^s q^t), an entry that exists on neither side being 0 whatever the powers are."""
    neither = (teacher_logprobs == -math.inf) & (student_logprobs == -math.inf)
    teacher_logprobs = teacher_logprobs.masked_fill(neither, 0.0)
    student_logprobs = student_logprobs.masked_fill(neither, 0.0)
    product = teacher_power * teacher_logprobs + student_power * student_logprobs
    return product.masked_fill(neither, -math.inf)


def alpha(teacher_logprobs: Tensor, student_logprobs: Tensor, alpha: float = 0.5) -> Tensor:
    """(sum_v p_v^alpha q_v^(1 - alpha) - 1) / (alpha (alpha - 1)); alpha neither 0 nor 1.

    Source: Amari 2009, doi:10.1109/TIT.2009.2030485, with alpha for (1 - alpha) / 2.
    """
    products = _log_power_product(teacher_logprobs, student_logprobs, alpha, 1.0 - alpha)
    return (products.exp().sum(-1) - 1.0) / (alpha * (alpha - 1.0))


def renyi(teacher_logprobs: Tensor, student_logprobs: Tensor, alpha: float = 0.5) -> Tensor:
    """log(sum_v p_v^alpha q_v^(1 - alpha)) / (alpha - 1); alpha > 0 and not 1.

    Source: van Erven and Harremoes 2014, arXiv:1206.2459, eq. (9).
    """
    products = _log_power_product(teacher_logprobs, student_logprobs, alpha, 1.0 - alpha)
    return products.logsumexp(-1) / (alpha - 1.0)


def _chi_squared(logprobs: Tensor, denominator_logprobs: Tensor) -> Tensor:
    """sum_v (a_v - b_v)^2 / b_v as sum_v (a_v / sqrt b_v - sqrt b_v)^2: b_v may be tiny."""
    neither = (logprobs == -math.inf) & (denominator_logprobs == -math.inf)
    logprobs = logprobs.masked_fill(neither, 0.0)
    half = 0.5 * denominator_logprobs.masked_fill(neither, 0.0)
    return ((logprobs - half).exp() - half.exp()).square().masked_fill(neither, 0.0).sum(-1)


def pearson_chi2(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """sum_v (p_v - q_v)^2 / q_v.

    Source: Pearson 1900, doi:10.1080/14786440009463897; the names by denominator.
    """
    return _chi_squared(teacher_logprobs, student_logprobs)


def neyman_chi2(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """sum_v (p_v - q_v)^2 / p_v.

    Source: Neyman 1949; the names by denominator.
    """
    return _chi_squared(student_logprobs, teacher_logprobs)


def todi(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """sum_v w_v p_v log(p_v / q_v) + (1 - w_v) q_v log(q_v / p_v), w = p / (p + q) a constant.

    Source: ToDi, arXiv:2505.16297, eq. (6).
    """
    neither = (teacher_logprobs == -math.inf) & (student_logprobs == -math.inf)
    teacher_logprobs = teacher_logprobs.masked_fill(neither, 0.0)
    student_logprobs = student_logprobs.masked_fill(neither, 0.0)
    forward = _weighted_log_ratio(teacher_logprobs, student_logprobs)
    reverse = _weighted_log_ratio(student_logprobs, teacher_logprobs)
    return (forward + reverse).masked_fill(neither, 0.0).sum(-1)


def _weighted_log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """a / (a + b) * a log(a / b) per entry, the first factor a constant; 0 where a = 0."""
    weight = (logprobs.detach() - other_logprobs.detach()).sigmoid()
    probs = logprobs.exp()
    absent = probs == 0
    log_ratio = logprobs.masked_fill(absent, 0.0) - other_logprobs.masked_fill(absent, 0.0)
    return weight * probs * log_ratio


def adaptive_kl(
    teacher_logprobs: Tensor, student_logprobs: Tensor, head_mass: float = 0.5
) -> Tensor:
    """(g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), the g constants.

    g is the sum of |p_v - q_v| over the head or the tail. Head: every token with p_v >= theta,
    theta the smallest probability for which those tokens hold at most head_mass together; if even
    the most probable ones hold more, those alone.

    Source: AKL, arXiv:2404.02657, section 4; ties by value, which its sort leaves open.
    """
    head = _head(teacher_logprobs.detach(), head_mass)
    gap = (teacher_logprobs.detach().exp() - student_logprobs.detach().exp()).abs()
    head_gap = (gap * head).sum(-1)
    tail_gap = (gap * ~head).sum(-1)
    total = head_gap + tail_gap
    same = total == 0
    head_share = (head_gap / total.masked_fill(same, 1.0)).masked_fill(same, 0.5)
    tail_share = (tail_gap / total.masked_fill(same, 1.0)).masked_fill(same, 0.5)
    forward = _kullback_leibler(teacher_logprobs, student_logprobs)
    reverse = _kullback_leibler(student_logprobs, teacher_logprobs)
    return _scaled(head_share, forward) + _scaled(tail_share, reverse)


def _scaled(share: Tensor, value: Tensor) -> Tensor:
    """share * value, 0 where the share is 0: also of an infinite value."""
    return (share * value.masked_fill(share == 0, 0.0)).masked_fill(share == 0, 0.0)


def _head(logprobs: Tensor, head_mass: float) -> Tensor:
    """Which tokens are in the head of `adaptive_kl`, by their probability alone."""
    ascending = logprobs.sort(-1).values
    # mass of {u : p_u >= p_v}: a suffix sum, taken at the first place in the order that p_v has
    suffix = ascending.exp().flip(-1).cumsum(-1).flip(-1)
    first = torch.searchsorted(ascending, logprobs.contiguous(), side="left")
    mass = suffix.gather(-1, first.clamp_max(logprobs.shape[-1] - 1))
    head = mass <= head_mass
    most_probable = logprobs == ascending[..., -1:]
    return torch.where(head.any(-1, keepdim=True), head, most_probable)


def alpha_beta(
    teacher_logprobs: Tensor, student_logprobs: Tensor, alpha: float = 0.2, beta: float = 0.7
) -> Tensor:
    """-sum_v (p^alpha q^beta - alpha/s p^s - beta/s q^s) / (alpha beta), s = alpha + beta.

    Where alpha, beta or s is 0, the continuous limit.

    Source: Cichocki et al. 2011, doi:10.3390/e13010134, eqs. (5) and (14); ABKD, arXiv:2505.04560.
    """
    no_teacher, no_student = teacher_logprobs == -math.inf, student_logprobs == -math.inf
    either = no_teacher | no_student
    terms = _alpha_beta_terms(
        teacher_logprobs.masked_fill(either, 0.0),
        student_logprobs.masked_fill(either, 0.0),
        alpha,
        beta,
    )
    terms = terms.masked_fill(either, 0.0)
    # q = 0 < p: p^s / (beta s) if 0^beta and 0^s are 0, else infinite; and the mirror image. An
    # infinite summand is a constant here, as its gradient need not exist
    total = alpha + beta
    for power, present, absent in (
        (beta, teacher_logprobs, no_student & ~no_teacher),
        (alpha, student_logprobs, no_teacher & ~no_student),
    ):
        if power > 0 and total > 0:
            alone = (total * present.masked_fill(~absent, 0.0)).exp() / (power * total)
        else:
            alone = torch.full_like(present, math.inf)
        terms = torch.where(absent, alone, terms)
    if beta == 0 and alpha > 0:
        # as in forward_kl the gradient is finite, -p^alpha / alpha; p^alpha = 0 weighs nothing
        p_alpha = (alpha * teacher_logprobs).exp()
        weighed = no_student & (p_alpha != 0)
        alone = -p_alpha * student_logprobs.masked_fill(~weighed, 0.0) / alpha
        terms = torch.where(no_student, alone, terms)
    return terms.sum(-1)


def _alpha_beta_terms(lp: Tensor, lq: Tensor, alpha: float, beta: float) -> Tensor:
    """The summands for finite log p and log q."""
    total = alpha + beta
    if alpha == 0 and beta == 0:
        return 0.5 * (lp - lq).square()
    if alpha == 0:
        p_beta, q_beta = (beta * lp).exp(), (beta * lq).exp()
        return (q_beta * beta * (lq - lp) - q_beta + p_beta) / beta**2
    if beta == 0:
        p_alpha, q_alpha = (alpha * lp).exp(), (alpha * lq).exp()
        return (p_alpha * alpha * (lp - lq) - p_alpha + q_alpha) / alpha**2
    if total == 0:
        return (alpha * (lq - lp) + (alpha * (lp - lq)).exp() - 1.0) / alpha**2
    product = (alpha * lp + beta * lq).exp()
    p_total, q_total = (total * lp).exp(), (total * lq).exp()
    return -(product - alpha / total * p_total - beta / total * q_total) / (alpha * beta)


def concrete_score(
    teacher_logprobs: Tensor,
    student_logprobs: Tensor,
    weights: tuple[str, str] = ("student", "student"),
) -> Tensor:
    """sum_x sum_v w1(v) w2(x) (d_x - d_v)^2 / 2, d = log q - log p; weights constant.

    A weight is the law of the student or of the teacher, or uniform over the tokens that both
    models give a finite logit. The double sum is E1[d^2] / 2 + E2[d^2] / 2 - E1[d] E2[d], written
    around a mean so that nothing large cancels.

    Source: CSD, arXiv:2509.25837, section 4.
    """
    first, second = (_weighting(name, teacher_logprobs, student_logprobs) for name in weights)
    unweighted = (first == 0) & (second == 0)
    left, right = (x.masked_fill(unweighted, 0.0) for x in (student_logprobs, teacher_logprobs))
    d = left - right
    infinite = d.isinf()
    finite_d = d.masked_fill(infinite, 0.0)
    # a constant: every difference of two d is unchanged by it
    finite_d = finite_d - (second * finite_d).sum(-1, keepdim=True).detach()
    squares = (first * finite_d.square()).sum(-1) * second.sum(-1)
    other_squares = (second * finite_d.square()).sum(-1) * first.sum(-1)
    value = 0.5 * (squares + other_squares)
    value = value - (first * finite_d).sum(-1) * (second * finite_d).sum(-1)
    # one infinite d with any weight makes an infinite difference to every other
    return value + d.masked_fill(~infinite, 0.0).square().sum(-1)


def _weighting(name: str, teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    if name == "student":
        return student_logprobs.detach().exp()
    if name == "teacher":
        return teacher_logprobs.detach().exp()
    absent = (teacher_logprobs == -math.inf) | (student_logprobs == -math.inf)
    return (~absent).double() / (~absent).sum(-1, keepdim=True)


def cross_entropy(student_logprobs: Tensor, labels: Tensor, label_weights: Tensor) -> Tensor:
    """-sum_k label_weights[k] log q(labels[k]) over the labels that are not negative.

    Source: SeqKD, arXiv:1606.07947; weighted sparse labels: RS-KD, arXiv:2503.16870.
    """
    ignored = (labels < 0) | (label_weights == 0)
    chosen = student_logprobs.gather(-1, labels.masked_fill(ignored, 0))
    weighted = label_weights.masked_fill(ignored, 0.0) * chosen.masked_fill(ignored, 0.0)
    return -weighted.sum(-1)


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "jeffreys": jeffreys,
    "squared_hellinger": squared_hellinger,
    "alpha": alpha,
    "renyi": renyi,
    "pearson_chi2": pearson_chi2,
    "neyman_chi2": neyman_chi2,
    "todi": todi,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "concrete_score": concrete_score,
    "cross_entropy": cross_entropy,
}


def name_and_params(divergence: object) -> tuple[str, dict]:
    """Of a name (no parameters: its defaults) or an object with `.name` and `.params`."""
    if isinstance(divergence, str):
        return divergence, {}
    return divergence.name, dict(divergence.params)  # type: ignore[attr-defined]


def evaluate(divergence: object, teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """D(p, q) for a name (with its defaults) or an object with `.name` and `.params`."""
    name, params = name_and_params(divergence)
    return DIVERGENCES[name](teacher_logprobs, student_logprobs, **params)
