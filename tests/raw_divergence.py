# SPDX-License-Identifier: Apache-2.0
"""Calls of the raw divergence ops of a backend, and what any two ways through them agree on."""

from __future__ import annotations

import torch

from opd_kernels import divergences as D
from opd_kernels import targets
from opd_kernels.divergence import CLOSE_LSE, FINISH, LSE, OPEN, ROW_SUMS, TERMS
from tests.cases import F64, SPECS
from tests.checks import laws_of

NUM_TOKENS, VOCAB, WIDTH = 3, 170, 172
SLICES = (slice(0, 61), slice(61, 62), slice(62, 170))
WEIGHTS = torch.tensor([1.0, 0.0, 0.5])
IDS = {
    "token_ids": torch.tensor([61, 3, 0]),
    "topk_ids": torch.tensor([[0, 61, -1, 169], [3, 4, 5, 6], [-1, 62, 60, 100]]),
}
LABELS = {
    "labels": torch.tensor([[3, -1, 61], [4, 5, 6], [169, 3, 3]]),
    "label_weights": torch.tensor([[0.5, 9.0, 1.5], [1.0, 1.0, 1.0], [-0.3, 0.0, 2.0]]),
}
SUM = [
    (WEIGHTS + 0.5, D.renyi(0.3)),
    (0.5, "cross_entropy"),
    (torch.tensor([0.0, 1.0, -0.4]), D.concrete_score(("uniform", "student"))),
    (0.7, D.skew_forward_kl(0.2)),
]
EVERYTHING = {
    "divergence": SUM,
    "temperature": (WEIGHTS + 1.0, 2.0),
    "has_reference": True,
    "softcaps": (5.0, None, 3.0),
    "logit_scales": (0.5, 1.0, 2.0),
    "biases": (torch.randn(VOCAB), None, torch.randn(VOCAB)),
    **LABELS,
    **IDS,
}
CALLS = {
    "plain": {"divergence": D.jsd(0.3)},
    "bias_and_scale": {
        "biases": (torch.randn(VOCAB), torch.randn(VOCAB), None),
        "logit_scales": (1.5, -0.5, 1.0),
    },
    "sum": {"divergence": SUM, **LABELS},
    "labels": {"divergence": "cross_entropy", **LABELS},
    "geometric": {"target": targets.geometric(0.4, 0.5), **IDS},
    "geometric_live": {"target": targets.geometric(0.4, 0.5, detach=False)},
    "veto_without_teacher": {"target": targets.geometric(0.4, 0.0, detach=False)},
    "mixture": {"target": targets.mixture(torch.tensor([0.0, 0.3, 1.0])), **IDS},
    "mixture_live": {"target": targets.mixture(torch.tensor([0.6, 0.3, 0.0]), detach=False)},
    "everything": {**EVERYTHING, "target": targets.geometric(0.3, 0.5, 0.2, detach=False)},
    "everything_mixed": {
        **{**EVERYTHING, "has_reference": False},
        "target": targets.mixture(torch.tensor([0.6, 0.3, 0.2]), detach=False),
    },
}
# every divergence that does not need whole rows
SLICED = [divergence for divergence in SPECS if divergence.name != "adaptive_kl"]
LIVE = {
    "geometric": targets.geometric(0.4, 0.5, detach=False),
    "mixture": targets.mixture(0.4, detach=False),
}


def call_of(name, **changes):
    """([student, teacher, reference], laws); the row of weight 0 holds NaN."""
    keywords = {"token_weights": WEIGHTS, **CALLS[name], **changes}
    logits = list(torch.randn(3, NUM_TOKENS, WIDTH) * 2)
    for side in logits:
        side[1] = float("nan")
    if not keywords.get("has_reference"):
        logits[2] = None
    return logits, laws_of(logits[0], VOCAB, **keywords)


def assert_same(actual, expected, rtol=1e-5, atol=2e-6):
    for one, two in zip(actual, expected, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol, equal_nan=True)


def columns(logits, part):
    return [None if side is None else side[:, part].contiguous() for side in logits]


def in_slices(ops, logits, laws, with_statistics):
    """(loss, state, statistics) by phases over SLICES."""
    state = torch.empty(NUM_TOKENS, laws.state_size, dtype=F64)
    for phase in (OPEN, LSE, CLOSE_LSE, ROW_SUMS, TERMS, FINISH):
        for part in SLICES if phase in (LSE, ROW_SUMS, TERMS) else SLICES[:1]:
            loss, statistics = ops.divergence_phase_(
                state, *columns(logits, part), *laws.columns(part), phase, part.start,
                with_statistics,
            )  # fmt: skip
    return loss, state, statistics


def backward_in_slices(ops, grad_loss, state, logits, laws):
    grads = []
    for part in SLICES:
        student, *others = columns(logits, part)
        ops.divergence_bwd_(grad_loss, state, student, *others, *laws.columns(part), part.start, -1)
        grads.append(student)
    return torch.cat(grads, dim=1)


def check_in_place(ops, logits, laws, with_statistics, truth=None):
    """divergence_fwd_grad_ is the forward and the backward call, in the place of the logits.

    truth: whose; None is those of ops, which then must agree bit by bit but for the gradient.
    """
    other = truth or ops
    expected = other.divergence_fwd(*logits, *laws, with_statistics)
    ones = torch.ones(len(logits[0]))
    gradient = other.divergence_bwd(ones, expected[1], *logits, *laws)
    student, teacher = logits[0].clone(), logits[1].clone()
    loss, statistics = ops.divergence_fwd_grad_(
        student, teacher, logits[2], *laws, with_statistics, -1
    )
    near = {"rtol": 0, "atol": 0} if truth is None else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(loss, expected[0], **near)
    torch.testing.assert_close(statistics, expected[2], equal_nan=True, **near)
    size = laws.vocab_size
    near = {"rtol": 2e-6, "atol": 1e-8} if truth is None else {"rtol": 1e-5, "atol": 2e-7}
    torch.testing.assert_close(student[:, :size], gradient[:, :size], **near)
    # what is not the call's stays
    assert torch.equal(student[:, size:].isnan(), logits[0][:, size:].isnan())
