# SPDX-License-Identifier: Apache-2.0
"""The divergences as the papers define them: on two probability rows, in float64.

Nothing here is shared with compiled code, on purpose: sharing code with the truth would share its
bugs. Each function takes log-probabilities `[..., V]` of the teacher (p) and of the student (q),
float64, and returns `[...]` in nats. `0 * log 0` is 0: a term of weight exactly 0 is left out,
in value and in gradient; one that is infinite by definition (forward_kl where q = 0 < p) stays so.
"""

from __future__ import annotations

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


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def evaluate(divergence: object, teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """D(p, q) for a name (with its defaults) or an object with `.name` and `.params`."""
    if isinstance(divergence, str):
        return DIVERGENCES[divergence](teacher_logprobs, student_logprobs)
    name, params = divergence.name, dict(divergence.params)  # type: ignore[attr-defined]
    return DIVERGENCES[name](teacher_logprobs, student_logprobs, **params)
