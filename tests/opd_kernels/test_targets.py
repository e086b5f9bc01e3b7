# SPDX-License-Identifier: Apache-2.0
"""Targets as values: constructors, canonical types, error texts. Their mathematics is in
test_identities.py and, by hand, in test_reference_options.py."""

from __future__ import annotations

import math

import pytest
import torch

import opd_kernels as opk
from opd_kernels import targets


def test_geometric_is_a_value():
    assert opk.targets is targets
    assert targets.geometric() == targets.Geometric(0.0, 1.0, 0.0, True)
    assert targets.geometric(1, 2, -1) == targets.geometric(1.0, 2.0, -1.0)
    assert targets.geometric(detach=False) != targets.geometric()
    assert len({targets.geometric(), targets.geometric(0.0, 1), targets.geometric(0.5)}) == 2
    assert isinstance(targets.geometric(1, 2).student, float)
    assert repr(targets.geometric(0.6, 0.4)) == (
        "Geometric(student=0.6, teacher=0.4, reference=0.0, detach=True)"
    )


def test_mixture_takes_a_number_or_a_tensor():
    assert targets.mixture(1).teacher_weight == 1.0
    assert isinstance(targets.mixture(0).teacher_weight, float)
    weight = torch.tensor([0.0, 0.5, 1.0])
    assert targets.mixture(weight).teacher_weight is weight
    assert targets.mixture(0.5).detach and not targets.mixture(0.5, detach=False).detach


def test_targets_do_not_change():
    for target in (targets.geometric(), targets.mixture(0.5)):
        with pytest.raises(AttributeError):
            target.detach = False


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: targets.geometric("0.5"),
            TypeError,
            "geometric: student must be a number, got '0.5'",
        ),
        (lambda: targets.geometric(teacher=True), TypeError, "teacher must be a number, got True"),
        (
            lambda: targets.geometric(reference=torch.ones(2)),
            TypeError,
            "geometric: reference must be a number, got tensor",
        ),
        (
            lambda: targets.geometric(student=math.inf),
            ValueError,
            "geometric: student must be finite, got inf",
        ),
        (lambda: targets.geometric(teacher=math.nan), ValueError, "teacher must be finite"),
        (
            lambda: targets.geometric(detach=1),
            TypeError,
            "geometric: detach must be True or False, got 1",
        ),
        (
            lambda: targets.mixture(None),
            TypeError,
            r"mixture: teacher_weight must be a number or a tensor \[T\], got None",
        ),
        (lambda: targets.mixture(False), TypeError, "teacher_weight must be a number"),
        (
            lambda: targets.mixture(1.5),
            ValueError,
            r"mixture: teacher_weight must be in \[0, 1\], got 1.5",
        ),
        (lambda: targets.mixture(-0.1), ValueError, r"must be in \[0, 1\], got -0.1"),
        (lambda: targets.mixture(math.nan), ValueError, "teacher_weight must be finite, got nan"),
        (
            lambda: targets.mixture(torch.ones(2, requires_grad=True)),
            ValueError,
            r"mixture: teacher_weight must not require grad.*detach\(\) it",
        ),
        (lambda: targets.mixture(0.5, detach=None), TypeError, "mixture: detach must be True or"),
    ],
)
def test_targets_reject_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()
