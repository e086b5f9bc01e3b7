# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from opd.batch import Head
from opd.server.projection import project_head


def make(softcap=None, scale=1.0, bias=False):
    torch.manual_seed(0)
    # a head of falling singular values, as trained ones have
    weight = torch.randn(300, 24) @ torch.diag(0.8 ** torch.arange(24)) @ torch.randn(24, 24)
    return Head(weight, torch.randn(300) if bias else None, softcap, scale)


@pytest.mark.parametrize("head", [make(), make(30.0), make(None, 0.25), make(5.0, -2.0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logit_is_off_by_more_than_the_bound(head, dtype):
    hidden = torch.randn(50, 24)
    for rank in (1, 8, 20, 24):
        projection = project_head(head, rank)
        sent, bound = projection.project(hidden, dtype)
        assert sent.shape == (50, rank) and sent.dtype == dtype
        error = (projection.head.logits(sent) - head.logits(hidden)).abs().amax(1)
        assert (error <= bound).all()
    # all directions: only rounding is left
    assert dtype != torch.float32 or float(bound.max()) < 1e-2


def test_directions_are_the_leading_singular_ones():
    head = make()
    projection = project_head(head, 5)
    expected = torch.linalg.svd(head.weight.double(), full_matrices=False).Vh[:5]
    overlap = (projection.basis.double().T @ expected.T).abs()
    torch.testing.assert_close(overlap, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
    gram = projection.basis.T @ projection.basis
    torch.testing.assert_close(gram, torch.eye(5), rtol=0, atol=1e-5)


def test_a_rank_that_the_head_has_not():
    for rank in (0, 25):
        with pytest.raises(ValueError, match=r"must be in \[1, 24\]"):
            project_head(make(), rank)
