# SPDX-License-Identifier: Apache-2.0
"""The law of what comes out of the CUDA speculative_verify kernels under emulation."""

from __future__ import annotations

import pytest

from tests.native import needs_kernels
from tests.row_kernels.gpu import CUDA
from tests.row_kernels.speculative_verify_law import *  # noqa: F403

pytestmark = [needs_kernels("speculative_verify"), pytest.mark.usefixtures("emulated_cuda")]


@pytest.fixture
def gpu():
    return CUDA
