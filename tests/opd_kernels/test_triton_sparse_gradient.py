# SPDX-License-Identifier: Apache-2.0
"""The Triton sparse_gradient kernels under the interpreter: the results of the CPU's."""

from __future__ import annotations

import pytest

from tests.row_kernels.gpu import TRITON
from tests.row_kernels.sparse_gradient import *  # noqa: F403

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # NaN in comparisons, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON
