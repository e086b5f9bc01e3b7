# SPDX-License-Identifier: Apache-2.0
"""The Triton speculative_verify kernels under the interpreter."""

from __future__ import annotations

import pytest

from tests.row_kernels.gpu import TRITON
from tests.row_kernels.speculative_verify import *  # noqa: F403

pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("interpreted_triton"),
    # -inf - -inf in masked lanes, which numpy reports and a GPU does not
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


@pytest.fixture
def gpu():
    return TRITON
