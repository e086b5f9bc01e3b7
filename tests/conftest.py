# SPDX-License-Identifier: Apache-2.0
"""Every test: seeded, one thread, uninitialised memory filled with NaN, Triton interpreted."""

from __future__ import annotations

import os

# read by triton.jit when a kernel is decorated, so it must be set before triton is imported
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

# tests that several files take
pytest.register_assert_rewrite("tests.row_kernels")

# two threads on a machine that others use too spend their time waiting for each other; what depends
# on the thread count sets it (the determinism tests)
NUM_THREADS = 1

# the same few examples each time; --hypothesis-profile=search draws new ones
settings.register_profile("fixed", max_examples=8, deadline=None, derandomize=True, database=None)
settings.register_profile("search", max_examples=200, deadline=None, print_blob=True)
settings.load_profile("fixed")

# files of half a minute and more, longest first: a long one that begins last runs alone
LONG_FILES = (
    "test_cuda_compile.py",
    "test_divergence.py",
    "test_triton_divergence.py",
    "test_triton_compile.py",
    "test_triton_divergence_phases.py",
    "test_gpu_paths.py",
    "test_train.py",
    "test_triton_segment_scan.py",
)


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True)
def _reproducible():
    """Seeds, thread count, and NaN in all memory that torch hands out, in C++ as in Python.

    An op that reads what it has not written, or leaves a part of its output unwritten, then fails.
    """
    torch.manual_seed(0)
    torch.set_num_threads(NUM_THREADS)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def emulated_cuda_library():
    """Path of the CUDA kernels as C++ on CPU tensors; compiled if they are not."""
    from tests import native

    return native.build("opd_torch_emulated") / "opd_emulated.so"


@pytest.fixture
def emulated_cuda(emulated_cuda_library, monkeypatch):
    """backend="cuda" takes CPU tensors; skips, with the reason, where nothing compiles them."""
    from opd_kernels import _library

    monkeypatch.setenv("OPD_CUDA_EMULATION", str(emulated_cuda_library))
    assert _library.cuda_emulated()


@pytest.fixture(scope="session")
def interpreted_triton():
    """The Triton kernels on CPU tensors; skips, with the reason, where they can't run."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1, so Triton can't take CPU tensors")
    from opd_kernels import triton as opd_triton

    reason = opd_triton.available()
    if reason is not None:
        pytest.skip(f"triton backend: {reason}")
    from tests import interpreter

    with pytest.MonkeyPatch.context() as patch:
        interpreter.compute_as_hardware_does(patch)
        interpreter.work_things_out_once(patch)
        yield opd_triton
