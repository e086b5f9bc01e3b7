# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from opd.objectives import Alm
from opd.objectives.alm import binary_divergence, log1mexp
from tests.opd.objectives.two_tokenizers import Case, check_hostile

F64 = torch.float64


def _logs(*probabilities):
    return torch.tensor(probabilities, dtype=F64).log()


def test_the_number_of_the_paper_s_formula():
    value = binary_divergence(_logs(0.5), _logs(0.25), "cross_entropy", 1.0)
    expected = -(0.5 * math.log(0.25) + 0.5 * math.log(0.75))
    assert float(value) == pytest.approx(expected, abs=1e-12)
    assert float(value) == pytest.approx(0.836988, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 100.0])
def test_kls_are_those_of_two_outcomes(temperature):
    lt, ls = _logs(0.7, 0.01, 0.999), _logs(0.2, 0.02, 0.5)
    p, q = (lt / temperature).exp(), (ls / temperature).exp()
    forward = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    reverse = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    for name, expected in (
        ("forward_kl", forward),
        ("reverse_kl", reverse),
        ("cross_entropy", forward + entropy),
    ):
        got = binary_divergence(lt, ls, name, temperature)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_null_is_the_limit(name):
    lt, ls = _logs(0.7, 1e-8, 0.9), _logs(0.2, 1e-3, 0.99)
    warm = 1e6 * binary_divergence(lt, ls, name, 1e6)
    torch.testing.assert_close(binary_divergence(lt, ls, name, None), warm, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_the_one_of_the_docstring():
    lt, ls = _logs(0.3, 0.8, 1e-9), _logs(0.6, 0.1, 1e-4).requires_grad_()
    binary_divergence(lt, ls, "cross_entropy", 100.0).sum().backward()
    p, q = (lt / 100).exp(), (ls.detach() / 100).exp()
    torch.testing.assert_close(ls.grad, (q - p) / (100 * (1 - q)), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 100.0, None])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "cross_entropy"])
def test_certain_and_impossible_chunks_have_finite_losses_and_gradients(name, temperature):
    if temperature is None and name == "cross_entropy":
        return
    ends = torch.tensor([0.0, -1e-9, -0.5, -80.0, -4000.0])
    lt = ends.repeat_interleave(5)
    ls = ends.repeat(5).requires_grad_()
    values = binary_divergence(lt, ls, name, temperature)
    values.sum().backward()
    assert bool(values.isfinite().all()) and bool(ls.grad.isfinite().all())
    if name != "cross_entropy":
        assert float(values.detach().min()) > -1e-5
        assert values.detach()[::6].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("temperature", [1.0, 100.0, None])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "cross_entropy"])
def test_what_is_impossible_is_infinite_or_zero_and_never_nan(name, temperature, dtype):
    if temperature is None and name == "cross_entropy":
        return
    pairs = [(-math.inf, -2.0), (-2.0, -math.inf), (-math.inf, -math.inf)]
    lt, ls = torch.tensor(pairs, dtype=dtype).unbind(1)
    ls = ls.clone().requires_grad_()
    values = binary_divergence(lt, ls, name, temperature)
    values.sum().backward()
    scale = temperature or 1.0
    p = math.exp(-2.0 / scale)
    # log of what one of the two leaves for the rest, where the other has no part in the chunk
    rest = -math.log1p(-p)
    limit = temperature is None
    expected = {
        "forward_kl": [math.inf if limit else rest, math.inf, 0.0],
        "reverse_kl": [math.inf, math.inf if limit else rest, 0.0],
        "cross_entropy": [rest, math.inf, 0.0],
    }[name]
    torch.testing.assert_close(values.detach(), torch.tensor(expected, dtype=dtype))
    grad = ls.grad.tolist()
    assert grad[0] > 0 and grad[1] <= 0 and grad[2] == 0
    if not limit and name != "reverse_kl":
        # of the docstring: q - p over T times 1 - q
        assert grad[0] == pytest.approx(p / (1 - p) / scale)
        assert grad[1] == pytest.approx(-p / scale)


def test_log1mexp_at_both_ends():
    values = torch.tensor([-1e-12, -1e-3, -0.6931, -0.6932, -40.0], dtype=F64)
    expected = [math.log(-math.expm1(float(x))) for x in values]
    torch.testing.assert_close(log1mexp(values), torch.tensor(expected, dtype=F64))
    assert torch.autograd.gradcheck(log1mexp, values[1:].clone().requires_grad_(), eps=1e-7)


@pytest.mark.parametrize("bent", [False, True], ids=["plain", "bent"])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_alm_is_the_textbook_sum_over_chunks(temperature, bent):
    case = Case(bent=bent)
    sides = [rows.log_softmax(-1) for rows in case.rows()]
    total = 0.0
    for _, *spans in case.spans():
        logs = [
            sum(law[t, ids[t]] for t in span)
            for law, ids, span in zip(sides, case.ids, spans, strict=True)
        ]
        q, p = ((value / temperature).exp() for value in logs)
        total = total - p * q.log() - (1 - p) * (1 - q).log()
    case.check(Alm(binarization_temperature=temperature), total / case.steps)


def test_alm_of_one_tokenizer_is_the_binary_loss_of_each_token():
    case = Case(num_tokens=6)
    student, teacher = (rows.log_softmax(-1) for rows in case.rows())
    places = torch.arange(6)
    q, p = (law[places, case.ids[0]].exp() for law in (student, teacher))
    losses = -(p * q.log() + (1 - p) * (1 - q).log())
    case.check(Alm(binarization_temperature=1.0), losses.sum() / case.steps)


def test_alm_needs_no_token_in_common():
    case = Case(("both", "split"))
    case.parts = None
    signal, _ = case.run(Alm())
    assert signal.statistics["chunk_logprob"].shape == (2,)
    torch.testing.assert_close(
        signal.statistics["reverse_kl_k1"],
        signal.statistics["chunk_logprob"] - signal.statistics["teacher_chunk_logprob"],
    )
    assert signal.statistics["entropy"].shape == (case.batch.num_tokens,)


@pytest.mark.parametrize("divergence", ["cross_entropy", "reverse_kl"])
def test_alm_without_anything_to_compare_is_zero(divergence):
    check_hostile(Alm(divergence=divergence))


def test_alm_refuses_a_limit_that_there_is_not():
    with pytest.raises(ValidationError, match="must be forward_kl or reverse_kl"):
        Alm(binarization_temperature=None)
