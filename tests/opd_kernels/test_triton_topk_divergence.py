# SPDX-License-Identifier: Apache-2.0
"""The Triton topk_divergence kernels under the interpreter, by the public op and the raw ops."""

from __future__ import annotations

import pytest

from tests.row_kernels.gpu import TRITON
from tests.row_kernels.topk_divergence import *  # noqa: F403

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf and log 0, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    # in the backward's pass over a row, at the ids, which are written after it
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON
