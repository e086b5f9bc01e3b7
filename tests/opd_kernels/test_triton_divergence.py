# SPDX-License-Identifier: Apache-2.0
"""The Triton divergence kernels under the interpreter, through the public op and the raw ops."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import reference
from tests.cases import (
    F32,
    F64,
    INF,
    Case,
    FusedCase,
    fused_of,
    logits_of,
)
from tests.checks import (
    laws_of,
    leaf,
)
from tests.row_kernels.divergence import *  # noqa: F403
from tests.row_kernels.gpu import TRITON

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON


# -- rows ------------------------------------------------------------------------------------------


def test_triton_coefficient_zero_leaves_out_infinity():
    student = leaf(torch.zeros(2, 3))
    teacher = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, 1.0]])
    total = [(torch.tensor([0.0, 1.0]), "reverse_kl"), (1.0, "forward_kl")]
    loss = opk.divergence(student, teacher, divergence=total, backend="triton")
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(student.grad.isfinite().all())
    alone = opk.divergence(student, teacher, divergence="forward_kl", backend="triton")
    assert loss[0] == alone[0]


def test_triton_negative_scale_leaves_padding_without_mass():
    case = Case("negative", 2, 130, student_padding=5, teacher_padding=3)
    logits = logits_of(case, F32)
    keywords = {"student_logit_scale": -0.5, "vocab_size": 130}
    loss = opk.divergence(logits.student, logits.teacher, backend="triton", **keywords)
    truth = reference.divergence(logits.student, logits.teacher, **keywords)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)


def test_triton_divergence_is_deterministic_between_runs():
    student, teacher = torch.randn(2, 3, 700)
    losses = [opk.divergence(student, teacher, backend="triton") for _ in range(2)]
    assert torch.equal(*losses)


def test_triton_rejects_float64():
    logits = torch.randn(2, 5, dtype=F64)
    with pytest.raises(opk.UnsupportedBackendError, match="float64 is not supported by the Triton"):
        opk.divergence(logits, logits, backend="triton")


# -- the fused op ----------------------------------------------------------------------------------


def test_triton_fused_linear_divergence_opcheck():
    inputs = fused_of(FusedCase("triton", 3, 40, 8, 8), F32)
    laws = laws_of(inputs.student_hidden, 40, biases=(torch.randn(40), None, None))
    pair = torch.randn(2, 8), torch.randn(40, 2)
    tensors = [*inputs.tensors(), None, None, *pair]
    trained = [leaf(x) if i in (0, 1, 6, 7) else x for i, x in enumerate(tensors)]
    live = laws._replace(student_bias=leaf(laws.student_bias))
    ops = torch.ops.opd
    torch.library.opcheck(
        ops.fused_linear_divergence_sum,
        (*trained, *live, 1 << 20, [True] * 5, True, "", 0.0, None, "triton"),
    )
    torch.library.opcheck(
        ops.fused_linear_divergence_fwd, (*trained, *live, 1 << 20, True, "", None, "triton")
    )
