# SPDX-License-Identifier: Apache-2.0
"""tail="drop": the summands of the definitions, on masses that sum to anything."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _drop
from opd_kernels.divergences import DIVERGENCES
from tests.cases import F64, LIMIT_SPECS, SPECS
from tests.checks import leaf
from tests.sparse import BY_NAME, is_refused, sparse_of

INF = math.inf


@pytest.mark.parametrize(
    "spec", [s for s in SPECS + LIMIT_SPECS if not is_refused(s, "drop")], ids=str
)
def test_drop_u_is_the_slope_of_the_summand(spec):
    # by log q, held against finite differences where nothing is detached
    detached = spec.name == "todi" or dict(spec.params).get("detach_mixture")
    public = spec.public()
    lp = torch.tensor([[0.3, 0.05, 0.2, 1e-6]], dtype=F64).log()
    lq = torch.tensor([[0.1, 0.3, 0.2 + 1e-3, 1e-3]], dtype=F64).log()

    def drop(lq):
        arguments = (None, None, [public.id], list(public.kernel_params))
        return torch.ops.opd.topk_divergence_drop(lp, lq, *arguments)

    _, u = drop(lq)
    assert bool(u.isfinite().all())
    if detached:
        return
    for k in range(4):
        step = torch.zeros_like(lq)
        step[0, k] = 1e-6
        slope = (drop(lq + step)[0] - drop(lq - step)[0]) / 2e-6
        assert u[0, k].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def test_drop_knows_every_divergence_that_is_a_sum():
    no_sums = {"renyi", "adaptive_kl", "concrete_score", "cross_entropy"}
    assert set(_drop.NAMES) == set(DIVERGENCES) - no_sums


def test_drop_weighs_and_leaves_out():
    lp, lq = (torch.randn(3, 4, dtype=F64).log_softmax(-1) for _ in range(2))
    lp[2, 1], lq[2, 1] = -INF, -INF
    lq[1, 0] = -INF
    weights, coefficients = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([[1.0, 1.0, 0.5]])
    loss, grad = torch.ops.opd.topk_divergence_drop(lp, lq, weights, coefficients, [0], [0.0, 0.0])
    # an infinite row of weight 0 is 0
    assert loss[1].item() == 0.0 and bool((grad[1] == 0).all())
    expected = (lp.exp() * (lp - lq))[0].sum()
    assert loss[0].item() == pytest.approx(2 * expected.item())
    assert grad[2, 1].item() == 0.0 and bool(loss.isfinite().all())


def test_topk_divergence_drop_of_sampled_weights_is_cross_entropy():
    # weights that sum to 1: the gradient is q - t, as arXiv:2503.16870 has it
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 40, generator=generator, dtype=F64)
    ids = torch.stack([torch.randperm(40, generator=generator)[:5] for _ in range(4)])
    weights = torch.rand(4, 5, generator=generator, dtype=F64)
    weights /= weights.sum(-1, keepdim=True)
    student = leaf(z)
    opk.topk_divergence(student, ids, weights.log(), tail="drop", support="given").sum().backward()
    sparse = torch.zeros_like(z).scatter(1, ids, weights)
    torch.testing.assert_close(student.grad, z.softmax(-1) - sparse, rtol=1e-12, atol=1e-14)


def test_topk_divergence_drop_has_the_minimum_of_its_raw_target():
    # D19: gradient q p(S) - p on S
    data = sparse_of(BY_NAME["all_but_one"], F64)
    z = leaf(data.student_logits)
    opk.topk_divergence(
        z, data.teacher_ids[:, :6], data.teacher_logprobs[:, :6], tail="drop"
    ).sum().backward()
    p = torch.zeros_like(z).scatter(1, data.teacher_ids[:, :6], data.teacher_logprobs[:, :6].exp())
    expected = z.detach().softmax(-1) * p.sum(-1, keepdim=True) - p
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-14)


def test_topk_divergence_drop_of_reverse_kl_rewards_leaving_the_ids():
    # the known failure: less student mass on the ids, and the loss falls below that of equal laws
    law = torch.tensor([[0.6, 0.3, 0.1]], dtype=F64).log()
    ids, logprobs = torch.tensor([[0, 1]]), law[:, :2]

    def loss(student, tail):
        return opk.topk_divergence(
            student, ids, logprobs, divergence="reverse_kl", tail=tail
        ).item()

    off = torch.tensor([[0.2, 0.1, 0.7]], dtype=F64).log()
    assert loss(law, "drop") == pytest.approx(0.0, abs=1e-12)
    assert loss(off, "drop") < -0.3
    assert loss(off, "bucket") > 0.9
