# SPDX-License-Identifier: Apache-2.0
"""The device under test and the sizes; a dry run (OPD_GPU_DRY_RUN=1) has a CPU and tiny ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.device import Device, Run
from benchmarks.shapes import Shape

DRY_RUN = os.environ.get("OPD_GPU_DRY_RUN") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Triton's last: what a time limit cuts off are kernels that take seconds each to compile."""
    places = [place for place, item in enumerate(items) if HERE in item.path.parents]
    found = sorted((items[place] for place in places), key=_is_of_triton)
    for place, item in zip(places, found, strict=True):
        items[place] = item


def _is_of_triton(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return call is not None and call.params.get("backend") == "triton"


class Sizes(NamedTuple):
    """What a dry run has smaller."""

    fused: Shape
    # more than 2^31 elements in one matrix of logits
    large: Shape
    slice_tokens: int
    row: tuple[int, int]
    workspace_bytes: int

    def of_operands(self, dtype: torch.dtype) -> Shape:
        """`fused`, or one slice of its tokens in float32, which no tensor core multiplies."""
        if dtype == torch.float32:
            return self.fused._replace(num_tokens=self.slice_tokens)
        return self.fused


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


def logits_of(device: Device, hidden: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden @ head.T in `dtype`; in float32 by the product that the ops take, of the operands.

    Tensor cores cut their float32 sums off where a float32 product rounds them (docs/numerics.md).
    A baseline with the same cuts leaves to be held to its error what the ops themselves add.
    """
    if dtype != torch.float32:
        return hidden.to(dtype) @ head.to(dtype).t()
    out = torch.empty(hidden.shape[0], head.shape[0], dtype=dtype, device=hidden.device)
    return device.mm(hidden, head.t(), out)


def check_replay(
    device: Device, replay: Callable[[], object], run: Run, out: dict[str, Tensor]
) -> None:
    """A replay writes to the bit what an eager `run`, which puts it into `out`, computes."""
    found = []
    for call in (replay, replay, run):
        call()
        device.synchronize()
        found.append({name: value.clone() for name, value in out.items()})
    first, second, eager = found
    for name, value in first.items():
        if torch.equal(value, eager[name]):
            continue
        raise AssertionError(
            f"{name}: the graph's bits are not the eager call's. "
            + (
                "Two replays agree: look first whether the GEMM library chose another kernel in "
                "the capture (its workspace there), then at ours."
                if torch.equal(value, second[name])
                else "Two replays differ as well: no choice of a GEMM, a race or unwritten memory."
            )
        )
    assert all(bool(value.isfinite().all()) for value in first.values())
