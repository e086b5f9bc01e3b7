# SPDX-License-Identifier: Apache-2.0
"""Gradients of the reference, which are autograd's, against closed forms worked out by hand.

In mass form dD/dz_v = (u_v - q_v sum_w u_w) / temperature with u_v = q_v dD/dq_v.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_kernels import reference, targets
from tests.cases import LIMIT_SPECS, SPECS, Spec, spec

F64 = torch.float64
EVERY = list(dict.fromkeys((*SPECS, *LIMIT_SPECS)))


def mass(divergence: Spec, b: Tensor, a: Tensor) -> Tensor:
    """u_v from b = log p and a = log q, up to a multiple of q."""
    p, q = b.exp(), a.exp()
    match divergence.name, dict(divergence.params):
        case "forward_kl", _:
            return -p
        case "reverse_kl", _:
            return q * (a - b)
        case "jsd", {"beta": beta}:
            m = beta * p + (1 - beta) * q
            return (1 - beta) * q * (a - m.log())
        case "skew_forward_kl", {"alpha": alpha}:
            return -(1 - alpha) * p * q / (alpha * p + (1 - alpha) * q)
        case "skew_reverse_kl", {"alpha": alpha, **rest}:
            m = (1 - alpha) * p + alpha * q
            through_mixture = 0.0 if rest.get("detach_mixture") else alpha * q**2 / m
            return q * (a - m.log()) - through_mixture
        case "total_variation", _:
            return 0.5 * q * (q - p).sign()
        case "jeffreys", {"weight": weight}:
            return -weight * p + (1 - weight) * q * (a - b)
        case "squared_hellinger", _:
            return -0.5 * (p * q).sqrt()
        case "alpha", {"alpha": alpha}:
            return -(p**alpha) * q ** (1 - alpha) / alpha
        case "renyi", {"alpha": alpha}:
            return -torch.softmax((1 - alpha) * a + alpha * b, dim=-1)
        case "pearson_chi2", _:
            return -(p**2) / q
        case "neyman_chi2", _:
            return 2 * q**2 / p
        case "todi", _:
            return (q**2 * (a - b + 1) - p**2) / (p + q)
        case "adaptive_kl", {"head_mass": head_mass}:
            return _adaptive_kl_mass(p, q, a - b, head_mass)
        case "alpha_beta", {"alpha": alpha, "beta": beta}:
            if alpha == 0:
                return q**beta * (a - b)
            return -(p**alpha * q**beta - q ** (alpha + beta)) / alpha
        case "concrete_score", {"weights": weights}:
            laws = {"student": q, "teacher": p, "uniform": torch.full_like(p, 1 / p.shape[-1])}
            first, second = (laws[name] for name in weights)
            d = a - b
            first_mean, second_mean = ((w * d).sum(-1, keepdim=True) for w in (first, second))
            return first * (d - second_mean) + second * (d - first_mean)
    raise AssertionError(f"no closed form for {divergence}")


def _adaptive_kl_mass(p: Tensor, q: Tensor, gap: Tensor, head_mass: float) -> Tensor:
    """Row by row in plain Python: the head grows by whole groups of equal probability."""
    rows = []
    for p_row, q_row, gap_row in zip(p, q, gap, strict=True):
        values = sorted(set(p_row.tolist()), reverse=True)
        theta = values[0]
        for value in values:
            if p_row[p_row >= value].sum() > head_mass:
                break
            theta = value
        head = p_row >= theta
        difference = (p_row - q_row).abs()
        head_gap, tail_gap = difference[head].sum(), difference[~head].sum()
        share = head_gap / (head_gap + tail_gap)
        rows.append(-share * p_row + (1 - share) * q_row * gap_row)
    return torch.stack(rows)


def rows(scale: float, num_tokens: int = 6, vocab_size: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(round(scale * 10))
    teacher = torch.randn(num_tokens, vocab_size, generator=generator, dtype=F64) * scale
    noise = torch.randn(num_tokens, vocab_size, generator=generator, dtype=F64)
    return (teacher + noise * min(scale, 1.5)).requires_grad_(), teacher


def assert_gradient(student: Tensor, loss: Tensor, expected: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    size = expected.abs().amax().clamp_min(1.0)
    assert float((gradient - expected).abs().amax() / size) < 1e-13


@pytest.mark.parametrize("temperature", [1.0, (1.7, 0.6)])
@pytest.mark.parametrize("scale", [0.3, 2.0, 5.0])
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_reference_gradient_is_the_closed_form(divergence, scale, temperature):
    student, teacher = rows(scale)
    student_temperature, teacher_temperature = (
        temperature if isinstance(temperature, tuple) else (temperature,) * 2
    )
    loss = reference.divergence(student, teacher, divergence=divergence, temperature=temperature)
    a = torch.log_softmax(student.detach() / student_temperature, dim=-1)
    b = torch.log_softmax(teacher / teacher_temperature, dim=-1)
    u = mass(divergence, b, a)
    expected = (u - a.exp() * u.sum(-1, keepdim=True)) / student_temperature
    assert_gradient(student, loss, expected)


# without what holds a part of itself constant: there the gradient is not that of the value
DETACHED = ("todi", "adaptive_kl", "concrete_score")


@pytest.mark.parametrize(
    "divergence",
    [s for s in EVERY if s.name not in DETACHED and not dict(s.params).get("detach_mixture")],
    ids=str,
)
def test_reference_gradient_is_the_slope_of_the_value(divergence):
    student, teacher = rows(1.0, num_tokens=2, vocab_size=5)
    torch.autograd.gradcheck(
        lambda z: reference.divergence(z, teacher, divergence=divergence), student
    )


def geometric(student: Tensor, teacher: Tensor, third: Tensor, target) -> Tensor:
    logits = target.student * student + target.teacher * teacher + target.reference * third
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.parametrize("coefficients", [(0.6, 0.4, 0.0), (0.8, 1.0, 0.0), (0.3, 1.25, -0.25)])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_reference_gradient_through_a_geometric_target(name, detach, coefficients):
    student, teacher = rows(2.0)
    third = rows(1.0)[1]
    target = targets.geometric(*coefficients, detach=detach)
    loss = reference.divergence(
        student, teacher, divergence=name, target=target, reference_logits=third
    )
    z = student.detach()
    a, l = torch.log_softmax(z, -1), geometric(z, teacher, third, target)  # noqa: E741
    p, q = l.exp(), a.exp()
    live = 0.0 if detach else target.student
    if name == "forward_kl":
        value = (p * (l - a)).sum(-1, keepdim=True)
        expected = q - p + live * p * (l - a - value)
    else:
        value = (q * (a - l)).sum(-1, keepdim=True)
        expected = q * (a - l - value) - live * (q - p)
    torch.testing.assert_close(loss, value.squeeze(-1))
    assert_gradient(student, loss, expected)


@pytest.mark.parametrize("divergence", EVERY, ids=str)
@pytest.mark.parametrize("kind", ["geometric", "mixture"])
def test_reference_detached_target_is_a_fixed_teacher(divergence, kind):
    student, teacher = rows(2.0)
    weight = torch.linspace(0.1, 0.9, 6, dtype=F64)
    z = student.detach()
    if kind == "geometric":
        target = targets.geometric(0.4, 0.7)
        fixed = 0.4 * z + 0.7 * teacher
    else:
        target = targets.mixture(weight)
        p, q = torch.softmax(teacher, -1), torch.softmax(z, -1)
        fixed = (weight.unsqueeze(1) * p + (1 - weight).unsqueeze(1) * q).log()
    loss = reference.divergence(student, teacher, divergence=divergence, target=target)
    other = z.clone().requires_grad_()
    expected = reference.divergence(other, fixed, divergence=divergence)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(expected.sum(), other)
    assert_gradient(student, loss, gradient)


@pytest.mark.parametrize(
    "divergence",
    [s for s in EVERY if s.name not in DETACHED and not dict(s.params).get("detach_mixture")],
    ids=str,
)
@pytest.mark.parametrize("kind", ["geometric", "mixture"])
def test_reference_live_target_gradient_is_the_slope_of_the_value(divergence, kind):
    student, teacher = rows(1.0, num_tokens=2, vocab_size=5)
    if kind == "geometric":
        target = targets.geometric(0.4, 0.7, detach=False)
    else:
        target = targets.mixture(0.6, detach=False)
    torch.autograd.gradcheck(
        lambda z: reference.divergence(z, teacher, divergence=divergence, target=target), student
    )


def test_cross_entropy_gradient_is_the_closed_form():
    student, teacher = rows(2.0)
    labels = torch.tensor([[3, -1, 7]] * 6)
    weights = torch.tensor([[0.5, 9.0, -0.2]] * 6, dtype=F64)
    loss = reference.divergence(
        student,
        teacher,
        divergence=spec("cross_entropy"),
        labels=labels,
        label_weights=weights,
        temperature=0.7,
    )
    q = torch.softmax(student.detach() / 0.7, dim=-1)
    expected = (0.5 - 0.2) * q
    expected[:, 3] -= 0.5
    expected[:, 7] += 0.2
    assert_gradient(student, loss, expected / 0.7)
    torch.testing.assert_close(loss, -0.5 * q[:, 3].log() + 0.2 * q[:, 7].log())


def test_adaptive_kl_head_is_made_by_value():
    head = reference.divergences._head

    def of(probabilities, head_mass):
        return head(torch.tensor([probabilities], dtype=F64).log(), head_mass)[0].tolist()

    assert of([0.5, 0.3, 0.15, 0.05], 0.51) == [True, False, False, False]
    assert of([0.05, 0.5, 0.3, 0.15], 0.81) == [False, True, True, False]
    # even the most probable holds more: it alone; two of them: both
    assert of([0.6, 0.3, 0.1, 0.0], 0.5) == [True, False, False, False]
    assert of([0.1, 0.4, 0.4, 0.1], 0.5) == [False, True, True, False]
    # a group of equals that would pass head_mass together stays out together
    assert of([0.4, 0.2, 0.2, 0.2], 0.7) == [True, False, False, False]
    # all of a uniform law is one group
    assert of([0.25] * 4, 0.5) == [True] * 4
    # what has no probability is not in the head until everything is
    assert of([0.5, 0.5, 0.0, 0.0], 0.9) == [True, True, False, False]
    assert math.isfinite(
        reference.divergence(
            torch.zeros(1, 4, dtype=F64), torch.zeros(1, 4, dtype=F64), divergence="adaptive_kl"
        ).item()
    )
