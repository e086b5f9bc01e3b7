# SPDX-License-Identifier: Apache-2.0
"""Every option set of tests/options.py through both divergence ops on CPU."""

from __future__ import annotations

import pytest
import torch

from tests.cases import ALL_DTYPES, BF16, F32, F64, Case, FusedCase
from tests.checks import check_divergence, check_fused_divergence, dtype_id, workspace_for
from tests.options import OPTIONS, option_cases

CASE = Case("options", 12, 150, weights="some_zero", student_padding=4, teacher_padding=9)
# in float32 only
MORE_CASES = (Case("options_wide", 9, 3001), Case("options_minus_inf", 6, 300, minus_inf="both"))
FUSED = FusedCase("options", 23, 301, 24, 40, weights="some_zero", student_padding=3)


@pytest.mark.parametrize(
    ("case", "option", "divergence", "dtype"),
    [
        pytest.param(case, *row, id=f"{case.name}-{row[0]}-{row[1]}-{dtype_id(row[2])}")
        for case, dtypes in ((CASE, ALL_DTYPES), *((case, (F32,)) for case in MORE_CASES))
        for row in option_cases(*dtypes)
    ],
)
def test_divergence_with_options_matches_reference(case, option, divergence, dtype):
    check_divergence(case, dtype, divergence, "cpu", option=option)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_fused_linear_divergence_with_options_matches_reference(option, dtype, reduction):
    divergence = None if option.divergences is None else option.divergences[0]
    generator = torch.Generator().manual_seed(7)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    vocab_size, hidden_size = FUSED.vocab_size, FUSED.student_hidden_size
    # a head, its bias and its low-rank update are padded alike
    rows = vocab_size + FUSED.student_padding
    differentiable = {
        "student_bias": gaussian(rows),
        "student_lora": (gaussian(4, hidden_size) / 5, gaussian(rows, 4) / 2, 0.5),
    }
    check_fused_divergence(
        FUSED,
        dtype,
        divergence,
        "cpu",
        reduction,
        workspace_for(FUSED, 8),
        option=option,
        differentiable=differentiable,
    )
