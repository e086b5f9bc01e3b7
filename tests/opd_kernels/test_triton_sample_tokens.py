# SPDX-License-Identifier: Apache-2.0
"""The Triton sample_tokens kernel under the interpreter, by the public, fused and raw op."""

from __future__ import annotations

import pytest
import torch

from tests.row_kernels.gpu import TRITON
from tests.row_kernels.sample_tokens import *  # noqa: F403
from tests.row_kernels.sample_tokens import on

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON


def test_triton_sample_tokens_of_several_rows_in_one_program(monkeypatch):
    from opd_kernels.triton import sample_tokens as kernels

    logits, uniforms = torch.randn(5, 200), torch.rand(5, 9)
    expected = on(TRITON)(logits, uniforms)
    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", 2)
    for one, two in zip(on(TRITON)(logits, uniforms), expected, strict=True):
        assert torch.equal(one, two)
    assert on(TRITON)(logits[:0], uniforms[:0]).ids.shape == (0, 9)
