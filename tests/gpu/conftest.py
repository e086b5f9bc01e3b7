# SPDX-License-Identifier: Apache-2.0
"""The device under test and the sizes; a dry run (OPD_GPU_DRY_RUN=1) has a CPU and tiny ones."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from benchmarks.gpu.device import Device
from benchmarks.shapes import Shape

DRY_RUN = os.environ.get("OPD_GPU_DRY_RUN") == "1"


class Sizes(NamedTuple):
    """What a dry run has smaller."""

    fused: Shape
    # more than 2^31 elements in one matrix of logits
    large: Shape
    slice_tokens: int
    row: tuple[int, int]
    workspace_bytes: int


REAL = Sizes(
    Shape(8192, 151_936, 2048, 4096), Shape(14_200, 151_936, 64, 64), 512, (24, 151_936), 1 << 30
)
TINY = Sizes(Shape(24, 401, 16, 24), Shape(20, 211, 8, 8), 7, (5, 307), 1 << 15)


@pytest.fixture(autouse=True)
def _reproducible():
    """Seeds, and float32 products in float32; otherwise torch is as a user has it."""
    torch.manual_seed(0)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.fixture
def poisoned():
    """NaN in all memory that torch hands out: what an op leaves unwritten shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    # the one does nothing without the other
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def the_device():
    """The GPU; skips where there is none, unless this is a dry run."""
    if not DRY_RUN and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return Device("cpu" if DRY_RUN else "cuda")


@pytest.fixture
def device(the_device):
    """The same, with what a test has left there given back."""
    yield the_device
    the_device.free(above_bytes=32 << 30)


@pytest.fixture
def sizes() -> Sizes:
    return TINY if DRY_RUN else REAL


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    """Each of the two; in a dry run the CPU kernels stand in for C++."""
    if not DRY_RUN:
        return request.param
    if request.param == "triton":
        pytest.skip("tests/opd_kernels/test_triton_*.py interpret it, in minutes")
    return "cpu"
